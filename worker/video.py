"""Frames to files: MP4 that every browser plays and seeks in, and a thumbnail."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode_mp4(frames_THWC: NDArray[np.uint8], fps: int) -> bytes:
    """H.264, yuv420p, index first (`faststart`), the same bytes for the same frames.

    Args:
        frames_THWC: RGB, height and width even.
        fps: frames a second.

    Raises:
        ValueError: an odd side, which yuv420p cannot hold.
    """
    _, height, width, _ = frames_THWC.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames are {width} x {height}; H.264 in yuv420p needs even sides")
    with tempfile.TemporaryDirectory(prefix="flg-") as folder:
        path = Path(folder) / "video.mp4"  # faststart rewrites the file, so it needs a real one
        writer = imageio_ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_in="rgb24",
            pix_fmt_out="yuv420p",
            macro_block_size=2,
            quality=None,
            ffmpeg_log_level="error",
            output_params=[
                *("-crf", "14", "-preset", "medium", "-threads", "1"),
                *("-movflags", "+faststart", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
                # Say what swscale's RGB conversion made, or players guess by size.
                *("-colorspace", "smpte170m", "-color_primaries", "smpte170m", "-color_trc", "smpte170m"),
            ],
        )
        writer.send(None)
        for frame in frames_THWC:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()


def encode_thumbnail(frames_THWC: NDArray[np.uint8]) -> bytes:
    """JPEG of the middle frame: the first one is the input, which the client has."""
    buffer = io.BytesIO()
    Image.fromarray(frames_THWC[len(frames_THWC) // 2]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
