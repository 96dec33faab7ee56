"""The part of the video firewall that decodes: a program of its own, which may only compute, and not for long.

python -I transcode.py '{"width": .., "height": .., "num_frames": .., "fps": ..}' <FILE >MP4

A decoder is a large piece of C that reads whatever somebody has made, so it runs where it can break nothing: no file
and no socket can be opened any more when the first byte is looked at, and the kernel ends what takes too much memory or
time. Exit status 3: the file is refused, and stdout says why as JSON.

It is run by its path and imports nothing of ours (`service.clips` is its caller), so that it starts in a moment.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import av
import av.subtitles.stream  # or av itself would, once no file can be opened any more
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

CODECS = {"h264": "H.264", "hevc": "H.265", "vp8": "VP8", "vp9": "VP9", "av1": "AV1"}
MIN_SIDE = 16
MAX_PIXELS = 3840 * 2160
MAX_SECONDS = 60
REFUSED = 3

_MAX_FRAMES = 2000
"""Decoded at most: what is taken of a clip lasts for seconds, and no camera takes more."""
_MAX_STREAMS = 16
_CPU_S = 20
_DATA_BYTES = 512 * 2**20
_ROTATIONS = {0: "", 90: "transpose=cclock", -90: "transpose=clock", 180: "hflip,vflip", -180: "hflip,vflip"}
"""By the degrees counter-clockwise that a player turns a frame by (phones film upright and say so)."""


class Refusal(Exception):
    """A file that is not taken: the error's code and message."""


@dataclass(frozen=True)
class Size:
    """What the clip is made to."""

    width: int
    height: int
    num_frames: int
    fps: int


def transcode(data: bytes, size: Size) -> bytes:
    """The beginning of a video as an MP4 of ``size``. Raises ``Refusal``, and whatever PyAV raises for broken files."""
    container = av.open(
        io.BytesIO(data),
        "r",
        format="mp4" if data[4:8] == b"ftyp" else "webm",
        io_open=_open_nothing,
        container_options={
            "protocol_whitelist": "none",
            "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm",
            "max_streams": str(_MAX_STREAMS),
        },
    )
    with container:
        stream = _video_of(container.streams.video, len(container.streams.audio))
        seconds = max(float(container.duration or 0) / av.time_base, float((stream.duration or 0) * _base(stream)))
        if seconds > MAX_SECONDS:
            message = f"the video lasts {seconds:.0f} s; at most {MAX_SECONDS} s are taken. Cut it: only the first "
            raise Refusal("video_too_long", f"{message}{size.num_frames / size.fps:g} s are used")
        stream.thread_type = ThreadType.NONE
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return _encoded(_sampled(_frames(container, stream), size), size, stream.sample_aspect_ratio or Fraction(1))


def _open_nothing(_url: str, _flags: int, _options: dict[str, str]) -> NoReturn:
    raise Refusal("video_damaged", "the video refers to another file; send one that holds all of itself")


def _video_of(streams: tuple[VideoStream, ...], num_audio: int) -> VideoStream:
    """The one that is a video and no picture of a cover, if it can be taken."""
    moving = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not moving:
        has = "a picture alone" if streams else "sound alone" if num_audio else "it is empty or cut short"
        raise Refusal("video_no_stream", f"the file holds no video ({has}); send one that does")
    [stream, *_] = moving
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
    if codec not in CODECS:
        message = f"the video's codec is {codec}; wanted {', '.join(CODECS.values())}. Convert it and send it again"
        raise Refusal("video_codec", message)
    _check_size(stream.codec_context.width, stream.codec_context.height)
    return stream


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        message = f"the video is {width} x {height}; at most {MAX_PIXELS} pixels a frame are taken. Scale it down"
        raise Refusal("video_too_large", message)
    if min(width, height) < MIN_SIDE:
        message = f"the video is {width} x {height} pixels; each side must be at least {MIN_SIDE}"
        raise Refusal("video_too_small", message)


def _base(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(0)


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, VideoFrame]]:
    """Each frame with its second since the first. They are all of one size."""
    begin, before, first = 0.0, -1.0, None
    for number, frame in enumerate(container.decode(stream)):
        if number >= _MAX_FRAMES:
            message = f"the video has more than {_MAX_FRAMES} frames in the seconds that are used; send fewer a second"
            raise Refusal("video_too_complex", message)
        if frame.time is None:
            raise Refusal("video_damaged", "the video does not say when its frames are shown; save it anew")
        if first is None:
            first, begin = frame, frame.time
            _check_size(frame.width, frame.height)
        if (frame.width, frame.height, frame.format.name) != (first.width, first.height, first.format.name):
            message = (
                f"the video changes from {first.width} x {first.height} to {frame.width} x {frame.height} on its way; "
                "save it anew with one size"
            )
            raise Refusal("video_damaged", message)
        if frame.time - begin > before:
            before = frame.time - begin
            yield before, frame


def _sampled(frames: Iterator[tuple[float, VideoFrame]], size: Size) -> Iterator[VideoFrame]:
    """So many frames of the model's rate, for each moment the one that is nearest; what comes later is not looked at.

    The last one stays for as long as it was shown, or half of one of the model's frames: that is not noticed.
    """
    taken, shown_s = 0, 0.5 / size.fps
    before: tuple[float, VideoFrame] | None = None
    for second, frame in frames:
        while before and taken < size.num_frames and taken / size.fps < (before[0] + second) / 2:
            yield before[1]
            taken += 1
        if taken == size.num_frames:
            return
        shown_s = max(0.5 / size.fps, second - before[0]) if before else shown_s
        before = second, frame
    if before is None:
        raise Refusal("video_damaged", "no frame of the video can be decoded; the file is damaged or cut short")
    lasts_s, last_s = before[0] + shown_s, (size.num_frames - 1) / size.fps
    if lasts_s < last_s:
        message = f"the video lasts {lasts_s:.3g} s; this model makes {size.num_frames / size.fps:g} s, so send as much"
        raise Refusal("video_too_short", message)
    for _ in range(taken, size.num_frames):
        yield before[1]


def _encoded(frames: Iterator[VideoFrame], size: Size, pixel_aspect: Fraction) -> bytes:
    """An MP4 of the frames, each cropped around its centre, resized and upright. In RGB, so that nobody has to know
    which of the many ways its colours were written in."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"crf": "10", "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264rgb", rate=size.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, "rgb24"
        graph = None
        for number, frame in enumerate(frames):
            graph = graph or _fitting(frame, size, pixel_aspect)
            graph.push(frame)
            fitted = graph.vpull()
            fitted.pts, fitted.time_base = number, Fraction(1, size.fps)
            container.mux(stream.encode(fitted))
        container.mux(stream.encode(None))
    return out.getvalue()


def _fitting(frame: VideoFrame, size: Size, pixel_aspect: Fraction) -> av.filter.Graph:
    """What makes frames like this one ``size``."""
    turn = _ROTATIONS.get(frame.rotation, "")
    is_turned = turn.startswith("transpose")
    width, height = (size.height, size.width) if is_turned else (size.width, size.height)
    aspect = Fraction(width, height) / pixel_aspect  # of the part that is used, in the file's own pixels
    cut_width = min(frame.width, round(frame.height * aspect)) or 1
    cut_height = min(frame.height, round(frame.width / aspect)) or 1
    steps = [f"crop={cut_width}:{cut_height}", f"scale={width}:{height}:flags=lanczos", turn, "format=rgb24"]
    graph = av.filter.Graph()
    last = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    for step in ",".join(filter(None, steps)).split(","):
        name, _, arguments = step.partition("=")
        following = graph.add(name, arguments)
        last.link_to(following)
        last = following
    last.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def _confine() -> None:
    """Give up what decoding does not need. There is no way back."""
    with suppress(OSError):  # where memory runs out all the same, this ends and not the service
        Path("/proc/self/oom_score_adj").write_text("1000")
    for what, limit in (
        (resource.RLIMIT_DATA, _DATA_BYTES),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),  # stdin, stdout, stderr: no other file, no socket
    ):
        resource.setrlimit(what, (limit, limit))


def main() -> int:
    """See above."""
    size = Size(**json.loads(sys.argv[1]))
    data = sys.stdin.buffer.read()
    _confine()
    try:
        sys.stdout.buffer.write(transcode(data, size))
    except Refusal as refusal:
        sys.stdout.write(json.dumps(refusal.args))
        return REFUSED
    except (av.FFmpegError, ValueError, MemoryError) as error:
        why = f"the video cannot be decoded ({type(error).__name__}): the file is damaged or cut short; save it anew"
        sys.stdout.write(json.dumps(["video_damaged", why]))
        return REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
