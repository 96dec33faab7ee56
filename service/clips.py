"""The input firewall for videos: any bytes in, a clean clip of the model's size out, or a 4xx that says what is wrong.

The rule: MP4, MOV, WEBM or MKV, judged by content; H.264, H.265, VP8, VP9 or AV1; pixels and seconds within bounds. Of
the first video stream the beginning is taken, for as long as the model's videos last: for each of their frames the one
that is nearest in time, turned upright, cropped around its centre to the model's aspect ratio and resized. It is
written anew, so no sound, no metadata and nothing hidden in the file survives. What is too short is refused. The
decoding itself is `service.transcode`, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from service import images
from service.errors import ApiError
from worker.contract import VideoSize

_PROGRAM = Path(__file__).with_name("transcode.py")
_REFUSED = 3
_WALL_S = 40
"""Above what it may compute for: the machine may be busy."""
_PATIENCE_S = 20

_DECODING = threading.Lock()
"""It may take a core and half a gigabyte."""


def clean(data: bytes, size: VideoSize) -> bytes:
    """``data`` as an MP4 of ``size``.

    Raises:
        ApiError: 415 not one of the formats; 422 damaged, too large, too long, too short; 503 too many at once.
    """
    if not data:
        raise ApiError(422, "video_empty", "the video is empty; send an MP4, MOV, WEBM or MKV file", param="video")
    if not (data[4:8] == b"ftyp" or data.startswith(b"\x1aE\xdf\xa3")):
        begins = data[:8].hex(" ")
        message = (
            f"the video is not an MP4, MOV, WEBM or MKV file (it begins with {begins}); convert it and send it again"
        )
        raise ApiError(415, "video_format", message, param="video")
    if not _DECODING.acquire(timeout=_PATIENCE_S):
        message = "too many videos are being read at once; try again in 5 s"
        raise ApiError(503, "videos_busy", message, retry_after_s=5)
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-I", str(_PROGRAM), size.model_dump_json()],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            timeout=_WALL_S,
        )
    except subprocess.TimeoutExpired:
        raise _too_complex() from None
    finally:
        _DECODING.release()
    if done.returncode == _REFUSED:
        code, message = json.loads(done.stdout)
        raise ApiError(422, code, message, param="video")
    if done.returncode != 0:  # the kernel or its own bug has ended it
        raise _too_complex()
    return done.stdout


def from_data_url(text: str) -> bytes:
    """The bytes of ``data:video/...;base64,...``. Raises ``ApiError`` 422."""
    try:
        return images.from_data_url(text)
    except ApiError:
        message = f"video: got text that begins {text[:24]!r}; wanted a data URL in base64, data:video/mp4;base64,..."
        raise ApiError(422, "video_not_data_url", message, param="video") from None


def _too_complex() -> ApiError:
    message = "the video takes too much to decode, or breaks its decoder; save it anew, smaller"
    return ApiError(422, "video_too_complex", message, param="video")
