"""A prepared data set: what a model's encoders make of clips and captions, once, in files that are mapped into memory.

`distill prepare` writes a folder; the stages read it in an order that depends on the seed and the step alone:

    index.json                  whose encoders made it, of which videos, what is in it; written last
    clips.jsonl                 a line for each clip: caption, where it came from, its split, where it is
    clips-00000.safetensors     "00000/x0" [1, C, T, H, W], "00000/image.NAME", "00000/text.NAME", "00001/x0", ...
    negative.safetensors        the same of the negative prompt, for all clips

What of a text is zero to its end is not kept. Shape suffixes: B clip, C channel, T latent frame, H row, W column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from distill.backbones import base, conditions
from distill.backbones.conditions import Conditions
from distill.config import ConfigError, PrepareConfig
from distill.loop import Run
from distill.student import Card, Origin, Video, file_sha256, weights_sha256

INDEX, CLIPS, NEGATIVE = "index.json", "clips.jsonl", "negative.safetensors"
WORK = "run"
"""Folder beside the index that an unfinished one goes on from."""


NO_ENCODERS = ("transformer", "transformer_2", "scheduler", "guider")
"""Parts of a model's folder that clips and captions do not go through."""


class DataError(ConfigError):
    """A prepared data set that cannot be used; the message says why and what to do."""


class Tensors(BaseModel):
    """One kind of tensor, of every clip the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    """Without the clips' axis."""
    dtype: str


class File(BaseModel):
    """A file beside the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    size_bytes: int


class Row(BaseModel):
    """A clip, as `clips.jsonl` has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    """Line of the source."""
    source: str
    """The video or picture, as the source has it; empty for a caption alone."""
    start_s: float
    caption: str
    split: Literal["train", "dev"]
    file: str
    row: int
    """Within the file."""
    truncated: bool
    """The caption is longer than the text encoder reads."""
    motion: float | None
    cut: float | None
    signature: str
    """Perceptual hash, hexadecimal; of a caption alone one that only its copies have."""


class Index(BaseModel):
    """What `index.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    backbone: str
    task: str
    model: Origin
    encoders: dict[str, str]
    """sha256 of each part of the model that encodes (`student.weights_sha256`)."""
    call: dict[str, Any]
    """The model's, but for its steps and classifier-free guidance: see ``encoding_call``."""
    video: Video
    config: PrepareConfig
    source_sha256: tuple[str, ...]
    shard: str
    """Which part of the source: "1/1" is all of it."""
    latents: bool
    """Whether there are clips; without, from captions alone, ``image`` is the whole of the image conditions."""
    tensors: dict[str, Tensors]
    counts: dict[str, int]
    """Clips of each split, and how many lines of the source were refused for each reason."""
    files: tuple[File, ...]

    @property
    def sha256(self) -> str:
        """Identity of the data."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Clips:
    """Some clips with what the encoders made of them, on the CPU, as they are kept."""

    captions: list[str]
    x0_BCTHW: Tensor | None
    """Normalised latents; None where there were captions alone."""
    image: Conditions
    """What ``to_keep`` left of the image conditions beside latents; all of them where there are none."""
    text: Conditions
    negative: Conditions
    """Of the negative prompt, for each clip."""


def encoders(card: Card) -> dict[str, str]:
    """Hashes of the parts of a model's folder that encode."""
    parts = {name.split("/")[0] for name in card.files if "/" in name} - set(NO_ENCODERS)
    return {part: weights_sha256(card.files, part) for part in sorted(parts)}


def encoding_call(card: Card) -> dict[str, Any]:
    """A card's call without what changes nothing that is encoded: its steps and classifier-free guidance."""
    return base.load(card.backbone, card.task).calling(card.call, 1, 1.0)


def needs_latents(stage: str) -> str:
    """What to say where a stage is given a data set without clips."""
    return (
        f"{stage} learns from clips, and the data set was prepared from captions alone; prepare it from videos, or "
        "with --from-teacher, which lets the teacher sample the clips"
    )


def rows_of(run: Run, count: int, batch_number: int, batch: int) -> Tensor:
    """Which of ``count`` clips the batch of that number holds: each once an epoch, in an order drawn for each epoch."""
    position = batch_number * batch
    order = torch.randperm(count, generator=run.generator("epoch", position // count))
    return order.roll(-(position % count))[:batch]


class Dataset:
    """One split of a prepared folder."""

    def __init__(
        self, folder: Path, card: Card, split: Literal["train", "dev"] = "train", count: int | None = None
    ) -> None:
        """Look at the index; clips are read when they are asked for.

        Args:
            folder: what `distill prepare` or `distill merge` wrote.
            card: of the model that is to learn from it.
            split: which clips.
            count: only the first so many.

        Raises:
            DataError: it is unfinished, damaged, or was prepared for another model.
        """
        self.folder = folder
        self.index = read_index(folder)
        _check_model(folder, self.index, card)
        for file in self.index.files:
            _check_size(folder, file)
        found = [row for row in read_rows(folder, self.index) if row.split == split][:count]
        if not found:
            raise DataError(
                f"{folder} has no clip in the {split} split (clips: {self.index.counts}); "
                "prepare more videos, or with another --set held_out=SHARE"
            )
        self._rows = found
        self._files = {file.name: _Reader(folder, file, self.index.tensors) for file in self.index.files}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_latents(self) -> bool:
        """Whether there are clips, or captions alone."""
        return self.index.latents

    @cached_property
    def captions(self) -> list[str]:
        """By row."""
        return [row.caption for row in self._rows]

    def rows(self, run: Run, batch_number: int, batch: int) -> Tensor:
        """Which clips the batch of that number holds."""
        return rows_of(run, len(self), batch_number, batch)

    def batch(self, rows_B: Tensor) -> Clips:
        """The clips of these rows.

        Raises:
            DataError: a file was changed since it was written.
        """
        chosen = [self._rows[row] for row in rows_B.tolist()]
        read = [self._files[row.file].read(row.row) for row in chosen]
        both = conditions.joined(read)
        return Clips(
            [row.caption for row in chosen],
            both.get("x0"),
            _under("image.", both),
            _under("text.", both),
            conditions.repeated(self._negative, len(chosen)),
        )

    @cached_property
    def _negative(self) -> Conditions:
        return _under("negative.", self._files[NEGATIVE].read(0))


@dataclass
class _Reader:
    """One file of tensors, opened (and its hash checked) when the first clip of it is wanted."""

    folder: Path
    file: File
    tensors: Mapping[str, Tensors]
    _opened: Any = field(default=None, init=False)
    _names: dict[int, list[str]] = field(default_factory=dict, init=False)

    def read(self, row: int) -> Conditions:
        """Everything of one clip, ``[1, ...]`` each."""
        if self._opened is None:
            _check_sha256(self.folder, self.file)
            self._opened = safe_open(self.folder / self.file.name, framework="pt")
            for key in self._opened.keys():
                number, name = key.split("/")
                self._names.setdefault(int(number), []).append(name)
        return {name: self._whole(name, self._opened.get_tensor(f"{row:05d}/{name}")) for name in self._names[row]}

    def _whole(self, name: str, kept: Tensor) -> Tensor:
        """With the zeros at its end."""
        shape = self.tensors[name].shape
        if kept.shape[1:] == shape:
            return kept
        return F.pad(kept, (0, 0) * (kept.ndim - 2) + (0, shape[0] - kept.shape[1]))


def without_end(value: Tensor) -> Tensor:
    """``[1, L, D]`` without what is zero from some place to the end of L; anything else as it is."""
    if value.ndim < 3:
        return value
    filled = value[0].flatten(1).ne(0).any(dim=1).nonzero()
    return value[:, : int(filled.max()) + 1 if len(filled) else 1]


def read_index(folder: Path) -> Index:
    """What a finished folder says of itself. Raises ``DataError``."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / WORK).is_dir():
            raise DataError(f"{folder} is not finished; give the same `python -m distill prepare` again, it goes on")
        raise DataError(f"{folder} is no prepared data set (it has no {INDEX}); make one with `distill prepare`")
    try:
        return Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}; prepare it again") from None


def read_rows(folder: Path, index: Index) -> list[Row]:
    """All clips of a folder. Raises ``DataError`` where the list was changed."""
    listed = next(file for file in index.files if file.name == CLIPS)
    _check_size(folder, listed)
    _check_sha256(folder, listed)
    with (folder / CLIPS).open(encoding="utf-8") as lines:
        return [Row.model_validate_json(line) for line in lines]


def describe(path: Path) -> File:
    """A file as the index lists it."""
    return File(name=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)


def _check_model(folder: Path, index: Index, card: Card) -> None:
    own = {
        "backbone": (index.backbone, card.backbone),
        "task": (index.task, card.task),
        **_by_name("video", index.video.model_dump(), card.video.model_dump()),
        **_by_name("call", index.call, encoding_call(card)),
        **_by_name("encoder", index.encoders, encoders(card)),
    }
    for what, (got, wanted) in own.items():
        if got != wanted:
            raise DataError(
                f"{folder} was prepared for {index.model.name} with {what} {_short(got)}, and {card.name} has "
                f"{_short(wanted)}; prepare the videos again with --model set to the folder of {card.name}"
            )


def _by_name(what: str, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {f"{what} {name}": (got.get(name), wanted.get(name)) for name in sorted({*got, *wanted})}


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 24 else str(value)


def _check_size(folder: Path, file: File) -> None:
    path = folder / file.name
    got = path.stat().st_size if path.is_file() else None
    if got != file.size_bytes:
        is_there = "is missing" if got is None else f"has {got} bytes, and {INDEX} says {file.size_bytes}"
        raise DataError(f"{path} {is_there}; copy the whole folder again, or prepare it again")


def _check_sha256(folder: Path, file: File) -> None:
    """Of a file that has not been looked at since it was last changed; that it was is noted beside it."""
    path, noted = folder / file.name, folder / WORK / f"{file.name}.checked"
    found = path.stat()
    state = json.dumps([found.st_size, found.st_mtime_ns, file.sha256])
    if noted.is_file() and noted.read_text() == state:
        return
    if (got := file_sha256(path)) != file.sha256:
        raise DataError(
            f"{path} has sha256 {got[:12]}..., and {INDEX} says {file.sha256[:12]}...: it was changed after it was "
            "written; copy the whole folder again, or prepare it again"
        )
    try:
        noted.parent.mkdir(exist_ok=True)
        aside = noted.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(state)
        os.replace(aside, noted)
    except OSError:  # a folder that can only be read: it is checked again next time
        return


def _under(prefix: str, values: Conditions) -> Conditions:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write `clips.jsonl`, aside and renamed."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)
