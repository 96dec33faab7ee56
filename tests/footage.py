"""Videos as clients have them, made with PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np


def moving_square(second: float, width: int = 96, height: int = 64) -> np.ndarray:
    """A frame ``[H, W, 3]``: blue, a white square at the left that moves to the right by 16 pixels a second."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 2] = 160
    left = round(width / 4 + 16 * second)
    frame[height // 2 - 8 : height // 2 + 8, left : left + 16] = 255
    return frame


def film(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    seconds: float = 2.125,
    fps: int = 8,
    width: int = 96,
    height: int = 64,
    draw: Callable[..., np.ndarray] = moving_square,
    sound: bool = False,
    options: dict[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
) -> bytes:
    """A video of a few seconds."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if pixel_aspect:
            stream.sample_aspect_ratio = pixel_aspect
        audio = file.add_stream("aac" if container != "webm" else "libopus", rate=48000) if sound else None
        for number in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(draw(number / fps, width, height), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if audio:
            silence = np.zeros((1, 1024), np.float32)
            for number in range(round(seconds * 48000 / 1024)):
                heard = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                heard.sample_rate, heard.pts = 48000, number * 1024
                file.mux(audio.encode(heard))
            file.mux(audio.encode(None))
    return out.getvalue()


def frames_of(data: bytes) -> np.ndarray:
    """Frames ``[T, H, W, 3]`` of a video."""
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
