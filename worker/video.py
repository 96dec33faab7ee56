"""Frames to files: MP4 that every browser plays and seeks in, and a thumbnail. And back, for a video to start from."""

from __future__ import annotations

import io
import os
import select
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import av
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distill.student import Video

_LOOK_S = 1.0
_TILES = 8


class EncodingError(Exception):
    """The frames could not be made into a video."""


class Mp4Writer:
    """ffmpeg, fed with frames as they come: H.264, yuv420p, index first (`faststart`), same frames, same bytes.

    A context manager; what ffmpeg has written is gone when it is left.
    """

    def __init__(self, width: int, height: int, fps: int, look: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            width, height: of the frames, in pixels; both even.
            fps: frames a second.
            look: called once a second while ffmpeg has to be waited for; what it raises ends the waiting.

        Raises:
            ValueError: an odd side, which yuv420p cannot hold.
        """
        if height % 2 or width % 2:
            raise ValueError(f"frames are {width} x {height}; H.264 in yuv420p needs even sides")
        self._input = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
        self._look = look
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flg-")))
            self._path = folder / "video.mp4"  # faststart rewrites the file, so it needs a real one
            self._said = stack.enter_context((folder / "stderr").open("w+b"))
            self._ffmpeg = stack.enter_context(self._start())
            stack.callback(self._ffmpeg.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # Not imageio_ffmpeg's own writer: it does not look at the exit status, and half a file would be published.
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", *self._input),
            *("-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "14", "-preset", "medium", "-threads", "1"),
            # Say what swscale's RGB conversion made, or players guess by size.
            *("-colorspace", "smpte170m", "-color_primaries", "smpte170m", "-color_trc", "smpte170m"),
            *("-movflags", "+faststart", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
            str(self._path),
        ]
        pipe = subprocess.PIPE
        # In a process group of its own: Ctrl-C means the worker, which lets the job finish.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said, process_group=0)  # noqa: S603
        os.set_blocking(_of(process.stdin).fileno(), False)
        return process

    def write(self, frames_THWC: NDArray[np.uint8]) -> None:
        """Hand over the next frames, RGB. Returns when ffmpeg has taken them.

        Raises:
            EncodingError: ffmpeg has ended; the message ends with what it said.
        """
        stdin = _of(self._ffmpeg.stdin)
        rest = np.ascontiguousarray(frames_THWC).data.cast("B")
        try:
            while rest:
                if select.select([], [stdin], [], _LOOK_S)[1]:
                    rest = rest[os.write(stdin.fileno(), rest) :]
                else:
                    self._look()
        except BrokenPipeError:
            raise self._error() from None

    def finish(self) -> bytes:
        """The file, after the last frame.

        Raises:
            EncodingError: ffmpeg failed; the message ends with what it said.
        """
        _of(self._ffmpeg.stdin).close()
        # It writes nothing to stdout, which ends when it does.
        while not select.select([_of(self._ffmpeg.stdout)], [], [], _LOOK_S)[0]:
            self._look()
        if self._ffmpeg.wait() != 0 or not self._path.is_file():
            raise self._error()
        return self._path.read_bytes()

    def _error(self) -> EncodingError:
        status = self._ffmpeg.wait()
        self._said.seek(0)
        return EncodingError(f"ffmpeg ended with {status}: {self._said.read().decode(errors='replace')[-500:]}")


def _of(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # as asked for
    return pipe


def encode_mp4(frames_THWC: NDArray[np.uint8], fps: int) -> bytes:
    """All frames at once; see ``Mp4Writer``."""
    _, height, width, _ = frames_THWC.shape
    with Mp4Writer(width, height, fps) as writer:
        writer.write(frames_THWC)
        return writer.finish()


def read_input(mp4: bytes, size: Video) -> NDArray[np.uint8]:
    """Frames ``[T, H, W, 3]`` of a video to start from, which the service has made to the size of a model.

    They are as they are, unless ``size`` is another one: then each is cropped and resized, the clip goes on at its own
    pace, and its last frame stays where it is too short.

    Raises:
        EncodingError: it cannot be read.
    """
    try:
        with av.open(io.BytesIO(mp4), "r", format="mp4") as container:
            fps = float(container.streams.video[0].average_rate or size.fps)
            frames = [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise EncodingError(f"the video to start from cannot be read: {error}") from None
    wanted = [min(round(i * fps / size.fps), len(frames) - 1) for i in range(size.num_frames)]
    return np.stack([_fitted(frames[i], size) for i in wanted])


def _fitted(frame_HWC: NDArray[np.uint8], size: Video) -> NDArray[np.uint8]:
    if frame_HWC.shape[:2] == (size.height, size.width):
        return frame_HWC
    return np.asarray(ImageOps.fit(Image.fromarray(frame_HWC), (size.width, size.height)))


def encode_thumbnail(frame_HWC: NDArray[np.uint8]) -> bytes:
    """JPEG of one frame."""
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tiles(frames_THWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a clip looks like in little: the mean of each of 8 x 8 tiles of each frame, ``[T, 8, 8, 3]``."""
    num_frames, height, width, channels = frames_THWC.shape
    rows, columns = (np.arange(_TILES) * size // _TILES for size in (height, width))
    sums = np.add.reduceat(np.add.reduceat(frames_THWC, rows, axis=1, dtype=np.int64), columns, axis=2)
    counts = np.diff(np.append(rows, height))[:, None] * np.diff(np.append(columns, width))
    means: NDArray[np.float32] = (sums / counts.reshape(1, _TILES, _TILES, 1)).astype(np.float32)
    assert means.shape == (num_frames, _TILES, _TILES, channels)
    return means
