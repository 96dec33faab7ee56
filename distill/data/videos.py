"""A source of clips: which videos, pictures and captions there are, and the frames of each as a model wants them.

No torch here: `distill prepare` reads videos in processes of their own, which should start at once. Arrays are uint8;
their axes are T frame, H row, W column, C channel.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps

from distill.config import ConfigError, FiltersConfig

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
"""Files that are taken out of a folder."""
COLUMNS = {
    "video": ("video", "path", "file", "video_path"),
    "caption": ("caption", "text", "prompt"),
    "image": ("image", "image_path", "first_frame"),
    "start_s": ("start_s",),
}
"""What a column of a table may be called."""

_SIDE = 32
"""Rows and columns of the small frames that motion, cuts and likeness are measured on."""
_HASHED_FRAMES = 4
SIGNATURE_BYTES = 8 * _HASHED_FRAMES


@dataclass(frozen=True)
class Item:
    """One line of the source."""

    number: int
    caption: str
    video: str | None
    """Path as the source has it, relative to ``root``."""
    image: str | None
    start_s: float
    root: str

    @property
    def key(self) -> str:
        """What decides the split: clips of one video stay together, whatever comes before or after them."""
        return self.video or self.image or self.caption

    def path(self, name: str) -> Path:
        """Of its video or image on this machine."""
        return Path(self.root) / name


@dataclass(frozen=True)
class Wanted:
    """The clip that a model makes, and what a video has to be for it."""

    width: int
    height: int
    num_frames: int
    fps: int
    filters: FiltersConfig


@dataclass(frozen=True)
class Clip:
    """A video as it was wanted."""

    frames_THWC: np.ndarray
    motion: float
    cut: float
    signature: bytes
    """Perceptual hash of 256 bits: few of them differ between copies."""


@dataclass(frozen=True)
class Rejected:
    """Why a line of the source gives no clip."""

    reason: str
    detail: str


# --- what there is ----------------------------------------------------------------------------------------------------


def read_source(source: Path) -> list[Item]:
    """The lines of a source: a folder of videos, each with a `.txt` of the same name; a `.csv` or `.parquet` with a
    column `caption` and perhaps `video`, `image`, `start_s`; or a `.txt` with a caption a line.

    Raises:
        ConfigError: it is none of these, or holds nothing.
    """
    if source.is_dir():
        items = list(_of_folder(source))
        nothing = f"no video ({' '.join(VIDEOS)})"
    elif not source.is_file():
        raise ConfigError(f"{source}: there is no such file or folder; name a folder of videos, a table or a text file")
    elif source.suffix == ".txt":
        lines = (line.strip() for line in _text(source).splitlines())
        items = [Item(i, line, None, None, 0.0, str(source.parent)) for i, line in enumerate(filter(None, lines))]
        nothing = "no line with a caption"
    elif source.suffix in (".csv", ".parquet"):
        rows = _of_csv(source) if source.suffix == ".csv" else _of_parquet(source)
        items = list(_of_table(source, rows))
        nothing = "no row"
    else:
        raise ConfigError(
            f"{source}: what ends in {source.suffix or 'nothing'} is not read; give a folder of videos, "
            "a .csv, a .parquet, or a .txt of captions"
        )
    if not items:
        raise ConfigError(f"{source} holds {nothing}; there is nothing to prepare")
    return items


def source_sha256(items: Iterable[Item]) -> str:
    """Identity of what there is: names, captions, and the sizes of files that are there."""
    found = hashlib.sha256()
    for item in items:
        sizes = [_size(item.path(name)) for name in (item.video, item.image) if name]
        found.update(repr((item.caption, item.video, item.image, item.start_s, sizes)).encode())
    return found.hexdigest()


def held_out(key: str, share: float) -> bool:
    """Whether a clip goes to the dev split: its source's name alone decides, so that more videos move none."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def _of_folder(folder: Path) -> Iterator[Item]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file())
    for number, path in enumerate(sorted(found, key=lambda p: p.relative_to(folder).as_posix())):
        beside = path.with_suffix(".txt")
        caption = _text(beside).strip() if beside.is_file() else ""
        yield Item(number, caption, path.relative_to(folder).as_posix(), None, 0.0, str(folder))


def _of_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no table that can be read: {error}; save it as CSV in UTF-8") from None


def _of_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"{path}: Parquet is read with pyarrow; pip install 'fastlightgen[parquet]'") from None
    known = [name for names in COLUMNS.values() for name in names]
    try:
        columns = [name for name in parquet.read_schema(path).names if name in known]
        return parquet.read_table(path, columns=columns).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} is no Parquet file that can be read: {error}") from None


def _of_table(path: Path, rows: list[dict[str, Any]]) -> Iterator[Item]:
    if not rows:
        return
    names = {what: next((n for n in known if n in rows[0]), None) for what, known in COLUMNS.items()}
    if names["caption"] is None:
        raise ConfigError(
            f"{path} has no column of captions, only: {', '.join(map(str, rows[0])) or 'none that is known'}; "
            f"call it one of {', '.join(COLUMNS['caption'])}"
        )
    for number, row in enumerate(rows):
        caption, video, image, start = (row.get(names[what] or "") for what in ("caption", "video", "image", "start_s"))
        if names["video"] and not video:
            raise ConfigError(f"{path}, row {number + 1}: no video; name one in every row, or leave the column out")
        try:
            start_s = float(start or 0)
        except ValueError:
            raise ConfigError(f"{path}, row {number + 1}: start_s is {start!r}; give seconds") from None
        yield Item(number, str(caption or "").strip(), video or None, image or None, start_s, str(path.parent))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8; save it as that") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# --- frames -----------------------------------------------------------------------------------------------------------


def read_clip(item: Item, wanted: Wanted) -> Clip | Rejected:
    """The clip that a video holds from ``item.start_s`` on: resized, cropped about the centre, at the model's rate."""
    assert item.video is not None
    try:
        # What the file says is its content must not be followed to other files or hosts.
        with av.open(str(item.path(item.video)), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                return Rejected("unreadable", "no video stream")
            stream = container.streams.video[0]
            return _unfit(stream, wanted) or _measured(_frames(container, stream, item.start_s, wanted), wanted)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        return Rejected("unreadable", _said(error))


def read_image(path: Path, wanted: Wanted) -> np.ndarray | Rejected:
    """A picture, resized and cropped about the centre, ``[H, W, C]``."""
    try:
        with Image.open(path) as opened:
            turned = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return Rejected("unreadable", _said(error))
    size = (wanted.width, wanted.height)
    scale = min(turned.width / wanted.width, turned.height / wanted.height)
    if scale < wanted.filters.min_scale:
        return Rejected("too small", f"{turned.width} x {turned.height}, wanted {wanted.width} x {wanted.height}")
    return np.asarray(ImageOps.fit(turned, size, Image.Resampling.LANCZOS))


def _said(error: BaseException) -> str:
    """Without the path: it is another one on another machine."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def bits_apart(signature: bytes, others: np.ndarray) -> int:
    """Fewest bits that a clip's hash differs by from any of others ``[N, 32]``."""
    if not len(others):
        return 8 * len(signature)
    differ = np.bitwise_count(others ^ np.frombuffer(signature, np.uint8))
    return int(differ.sum(axis=1, dtype=np.int64).min())


def _unfit(stream: Any, wanted: Wanted) -> Rejected | None:
    """What can be said before any frame is decoded."""
    width, height = stream.width * float(stream.sample_aspect_ratio or 1), stream.height
    sides = sorted((width, height)), sorted((wanted.width, wanted.height))  # it may yet be turned
    if min(got / need for got, need in zip(*sides, strict=True)) < wanted.filters.min_scale:
        return Rejected("too small", f"{width:g} x {height:g}, wanted {wanted.width} x {wanted.height}")
    rate = stream.average_rate
    if rate is not None and rate < wanted.filters.min_frame_rate * wanted.fps:
        return Rejected("low frame rate", f"{float(rate):.3g} frames/s, wanted {wanted.fps}")
    return None


def _frames(container: Any, stream: Any, start_s: float, wanted: Wanted) -> Rejected | np.ndarray:
    """For each moment of the clip the frame that is nearest."""
    aspect = float(stream.sample_aspect_ratio or 1)
    first_s = float((stream.start_time or 0) * stream.time_base)
    if start_s:
        container.seek(int((first_s + start_s) / stream.time_base), stream=stream)
    times_s = [first_s + start_s + number / wanted.fps for number in range(wanted.num_frames)]
    taken: list[np.ndarray] = []
    before: tuple[float, Any] | None = None
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        while len(taken) < len(times_s):
            time_s = times_s[len(taken)]
            if before is None or abs(frame.time - time_s) < abs(before[0] - time_s):
                break  # this frame is nearer, and the next may be nearer still
            taken.append(_fitted(before[1], aspect, wanted))
        before = frame.time, frame
        if len(taken) == len(times_s):
            break
    if before is not None:  # the last frame stands for as long as those before it
        shown_s = 1 / float(stream.average_rate or wanted.fps)
        while len(taken) < len(times_s) and times_s[len(taken)] < before[0] + shown_s:
            taken.append(_fitted(before[1], aspect, wanted))
    if len(taken) < len(times_s):
        needed_s, got_s = len(times_s) / wanted.fps, len(taken) / wanted.fps
        return Rejected("too short", f"{got_s:.2f} s from {start_s:g} s on, wanted {needed_s:.2f} s")
    return np.stack(taken)


def _fitted(frame: Any, aspect: float, wanted: Wanted) -> np.ndarray:
    """``[H, W, C]``: turned upright, resized to cover the model's size, cropped about the centre.

    Args:
        aspect: a pixel's width over its height.
    """
    turns = round(frame.rotation / 90) % 4
    width, height = frame.width * aspect, frame.height
    upright = (width, height) if turns % 2 == 0 else (height, width)
    scale = max(wanted.width / upright[0], wanted.height / upright[1])
    # Rounded up: it has to cover what is cropped out of it.
    resized = frame.reformat(
        width=max(1, -int(-width * scale // 1)),
        height=max(1, -int(-height * scale // 1)),
        format="rgb24",
        interpolation=Interpolation.LANCZOS,
    )
    image_HWC = np.rot90(resized.to_ndarray(), turns)
    top = (image_HWC.shape[0] - wanted.height) // 2
    left = (image_HWC.shape[1] - wanted.width) // 2
    return image_HWC[top : top + wanted.height, left : left + wanted.width]


def _measured(frames_THWC: Rejected | np.ndarray, wanted: Wanted) -> Clip | Rejected:
    if isinstance(frames_THWC, Rejected):
        return frames_THWC
    small_THWC = np.stack([_small(frame) for frame in frames_THWC]).astype(np.float32) / 255
    change_TN = np.abs(np.diff(small_THWC, axis=0)).max(axis=3).reshape(wanted.num_frames - 1, -1)
    # Little may move in a picture: what counts is the twentieth of it that changes most.
    motion = float(np.sort(change_TN, axis=1)[:, -change_TN.shape[1] // 20 :].mean()) if len(change_TN) else 0.0
    change_T = change_TN.mean(axis=1)
    cut = float(change_T.max() - np.median(change_T)) if len(change_T) else 0.0
    filters = wanted.filters
    if motion < filters.min_motion:
        return Rejected("static", f"motion {motion:.4f}, wanted {filters.min_motion:g}")
    if cut > filters.max_cut:
        at = int(change_T.argmax()) + 1
        return Rejected("scene cut", f"{cut:.3f} at frame {at}, wanted at most {filters.max_cut:g}")
    return Clip(frames_THWC, motion, cut, signature(small_THWC.mean(axis=3)))


def _small(image_HWC: np.ndarray) -> np.ndarray:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
    return frame.reformat(width=_SIDE, height=_SIDE, interpolation=Interpolation.AREA).to_ndarray()


def signature(small_THW: np.ndarray) -> bytes:
    """Of grey frames ``[T, 32, 32]``: for four of them, which of the 64 slowest cosines are above the median one."""
    places = np.linspace(0, len(small_THW) - 1, _HASHED_FRAMES).round().astype(int)
    cosines = _cosines()
    slow = np.einsum("ih,thw,jw->tij", cosines, small_THW[places], cosines).reshape(_HASHED_FRAMES, -1)
    return np.packbits(slow > np.median(slow[:, 1:], axis=1, keepdims=True), axis=1).tobytes()


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The first rows of the discrete cosine transform, ``[8, 32]``."""
    place = (2 * np.arange(_SIDE) + 1) * np.pi / (2 * _SIDE)
    return np.cos(np.arange(8)[:, None] * place).astype(np.float32)
