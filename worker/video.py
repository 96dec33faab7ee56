"""Frames to files: MP4 that every browser plays and seeks in, and a thumbnail."""

from __future__ import annotations

import io
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image


class EncodingError(Exception):
    """The frames could not be made into a video."""


def encode_mp4(frames_THWC: NDArray[np.uint8], fps: int) -> bytes:
    """H.264, yuv420p, index first (`faststart`), the same bytes for the same frames.

    Args:
        frames_THWC: RGB, height and width even.
        fps: frames a second.

    Raises:
        ValueError: an odd side, which yuv420p cannot hold.
        EncodingError: ffmpeg failed; the message ends with what it said.
    """
    _, height, width, _ = frames_THWC.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames are {width} x {height}; H.264 in yuv420p needs even sides")
    with tempfile.TemporaryDirectory(prefix="flg-") as folder:
        path = Path(folder) / "video.mp4"  # faststart rewrites the file, so it needs a real one
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error"),
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"),
            *("-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "14", "-preset", "medium", "-threads", "1"),
            # Say what swscale's RGB conversion made, or players guess by size.
            *("-colorspace", "smpte170m", "-color_primaries", "smpte170m", "-color_trc", "smpte170m"),
            *("-movflags", "+faststart", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
            str(path),
        ]
        # Not imageio_ffmpeg's own writer: it does not look at the exit status, and half a file would be published.
        done = subprocess.run(command, input=frames_THWC.tobytes(), capture_output=True, check=False)  # noqa: S603
        if done.returncode != 0 or not path.is_file():
            raise EncodingError(f"ffmpeg ended with {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}")
        return path.read_bytes()


def encode_thumbnail(frames_THWC: NDArray[np.uint8]) -> bytes:
    """JPEG of the middle frame: the first one is the input, which the client has."""
    buffer = io.BytesIO()
    Image.fromarray(frames_THWC[len(frames_THWC) // 2]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
