"""Reading videos back in tests."""

import subprocess

import imageio_ffmpeg
import numpy as np


def decode(mp4: bytes, folder, width: int = 64, height: int = 64) -> np.ndarray:
    """Frames ``[T, H, W, 3]`` of an MP4, by the ffmpeg that the worker writes with."""
    path = folder / "decoded.mp4"
    path.write_bytes(mp4)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(path),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
