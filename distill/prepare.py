"""`python -m distill prepare SOURCE OUT --model FOLDER`: videos and captions, encoded once, as the stages read them.

    1 distill.data.videos.read_source   the lines of the source
    2   videos.read_clip                frames as the model wants them, or why not; in processes of their own, in order
    3   distill.encoders                latents, what is kept of the picture's conditions, the caption's
    4     OUT/clips-*.safetensors       a file for so many lines of the source; OUT/run/ says what became of each line
    5 distill.data.prepared             OUT/clips.jsonl, report.md, rejected.csv, and last index.json

The same command goes on after the last whole file, and leaves the bytes that it would have left without a stop.
`merge` joins what several machines prepared.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor

from distill import student
from distill.backbones import base
from distill.backbones.conditions import Conditions
from distill.config import ConfigError, PrepareConfig
from distill.data import prepared, videos
from distill.data.prepared import DataError, Row, Tensors
from distill.data.videos import Clip, Item, Rejected, Wanted
from distill.encoders import Encoders
from distill.loop import Run, remember, write_json
from distill.prompt import PromptError
from distill.report import write

REJECTED, REPORT = "rejected.csv", "report.json"
SAY_EVERY_S = 10.0

Look = Clip | Rejected | np.ndarray | None
"""What was found at a line of the source: a clip, a picture, nothing but its caption, or why it is not taken."""


class Refused(BaseModel):
    """A line of the source that gives no clip, as `rejected.csv` has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    source: str
    reason: str
    detail: str
    caption: str


class Part(BaseModel):
    """What became of the lines of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[Row, ...]
    refused: tuple[Refused, ...]
    tensors: dict[str, Tensors]
    file: prepared.File | None
    """None where no line gave a clip."""


def prepare(
    source: Path, out: Path, model: Path, config: PrepareConfig, workers: int = 2, shard: tuple[int, int] = (1, 1)
) -> Path:
    """Prepare a source, or what is left of it, and return the folder.

    Args:
        source: see ``videos.read_source``.
        out: a new folder, or the one that this was begun in.
        model: a model's folder; its encoders are what is used.
        config: see ``PrepareConfig``.
        workers: processes that read videos; they change nothing in the result.
        shard: (i, n) takes every n-th line of the source from the i-th on, for the i-th of n machines.

    Raises:
        ConfigError: source, model and settings do not go together, or no line of the source gives a clip.
        FolderError: the model's folder is broken.
        Interrupted: a signal came; the same command goes on.
    """
    card = student.read_card(model)
    base.load(card.backbone, card.task)
    items = videos.read_source(source)
    _check_fit(source, items, card, config)
    mine = items[shard[0] - 1 :: shard[1]]
    if not mine:
        raise ConfigError(f"--shard {shard[0]}/{shard[1]}: {source} has {len(items)} lines only; take fewer shards")
    if out.exists() and not (out / prepared.WORK).is_dir():
        raise ConfigError(f"{out} is there, and `distill prepare` did not begin it; name a new folder")
    index = prepared.Index(
        backbone=card.backbone,
        task=card.task,
        model=student.Origin(name=card.name, sha256=card.sha256),
        encoders=prepared.encoders(card),
        call=prepared.encoding_call(card),
        video=card.video,
        config=config,
        source_sha256=(videos.source_sha256(items),),
        shard=f"{shard[0]}/{shard[1]}",
        latents=items[0].video is not None or config.from_teacher,
        tensors={},
        counts={},
        files=(),
    )
    run = Run(out / prepared.WORK, config.seed)
    with run.handling_signals():
        _begin(out, index)
        if (out / prepared.INDEX).exists():
            run.say(f"{out} is finished already")
            return out
        work = _Work(run, out, model, card, config)
        parts = work.all_parts(mine, workers)
        _finish(out, index, parts)
    return out


def _check_fit(source: Path, items: Sequence[Item], card: student.Card, config: PrepareConfig) -> None:
    has_videos = items[0].video is not None
    if config.from_teacher and has_videos:
        raise ConfigError(f"--from-teacher: {source} has videos; give captions alone, or leave it out")
    if config.from_teacher and card.kind != "teacher":
        raise ConfigError(f"--from-teacher: {card.name} is a {card.kind}; give the folder of a teacher")
    if not has_videos and card.task == "ti2v" and any(item.image is None for item in items):
        raise ConfigError(
            f"{source} has captions without pictures, and {card.name} starts from a picture; "
            "give a table with a column `image`, or videos"
        )


def _begin(out: Path, index: prepared.Index) -> None:
    """Write down what is prepared here, or check that it is what was begun."""
    work = out / prepared.WORK
    remember(work, index.config)
    path = work / "begun.json"
    wanted = index.model_dump(mode="json")
    if not path.exists():
        write_json(path, wanted)
        return
    before = json.loads(path.read_text())
    if changed := [name for name, value in wanted.items() if value != before[name]]:
        raise ConfigError(
            f"{out} was begun with another source, model or shard (they differ in: {', '.join(changed)}); "
            "give the same to go on, or name a new folder"
        )


class _Work:
    """The files of one machine, one after the other."""

    def __init__(self, run: Run, out: Path, model: Path, card: student.Card, config: PrepareConfig) -> None:
        self._run, self._out, self._model, self._card, self._config = run, out, model, card, config
        video = card.video
        # Of some pipelines the video is shorter than what is denoised.
        self._wanted = Wanted(video.width, video.height, card.call["num_frames"], video.fps, config.filters)
        self._taken: list[bytes] = []
        """Hashes of the clips so far."""

    @cached_property
    def _encoders(self) -> Encoders:
        """Loaded when there is something to encode."""
        return Encoders(self._model, self._card, self._config)

    def all_parts(self, items: Sequence[Item], workers: int) -> list[Part]:
        """Every part, found or made."""
        size = self._config.clips_per_file
        chunks = [items[first : first + size] for first in range(0, len(items), size)]
        parts: list[Part] = []
        while len(parts) < len(chunks) and (found := self._found(len(parts))) is not None:
            parts.append(found)
            self._taken += [bytes.fromhex(row.signature) for row in found.rows]
        left = [item for chunk in chunks[len(parts) :] for item in chunk]
        progress = _Progress(self._run, len(items), len(items) - len(left))
        with closing(self._looks(left, workers)) as looks:
            for chunk in chunks[len(parts) :]:
                parts.append(self._make(len(parts), islice(looks, len(chunk)), progress))
        return parts

    def _found(self, number: int) -> Part | None:
        """A part that an earlier attempt made, if its file is there."""
        path = self._path(number)
        if not path.exists():
            return None
        part = Part.model_validate_json(path.read_bytes())
        kept = part.file and self._out / part.file.name
        if part.file and kept and not (kept.is_file() and kept.stat().st_size == part.file.size_bytes):
            return None
        return part

    def _path(self, number: int) -> Path:
        return self._out / prepared.WORK / f"part-{number:05d}.json"

    def _looks(self, items: Sequence[Item], workers: int) -> Generator[tuple[Item, Look]]:
        """What there is at each line, in order, with the caption as the model is given it."""
        checked = [self._with_caption(item) for item in items]
        if not items or items[0].video is None:
            for item, refusal in checked:
                yield item, refusal or (videos.read_image(item.path(item.image), self._wanted) if item.image else None)
            return
        yield from _read_clips(checked, self._wanted, workers, self._config.decode_timeout_s)

    def _with_caption(self, item: Item) -> tuple[Item, Rejected | None]:
        if not item.caption:
            return item, Rejected("no caption", "give one beside the video, or in its row")
        try:
            return replace(item, caption=self._card.prompt.canonical(item.caption)), None
        except PromptError as error:
            return item, Rejected("caption not understood", str(error))

    def _make(self, number: int, looks: Iterable[tuple[Item, Look]], progress: _Progress) -> Part:
        """Encode what is taken of some lines, and write it down."""
        name = f"clips-{number:05d}.safetensors"
        rows: list[Row] = []
        refused: list[Refused] = []
        tensors: Conditions = {}
        kinds: dict[str, Tensors] = {}
        for item, look in looks:
            self._run.check_stop()
            refusal = look if isinstance(look, Rejected) else None
            signature = _signature(item, look)
            refusal = refusal or self._seen_before(signature)
            if refusal is not None:
                refused.append(
                    Refused(
                        number=item.number,
                        source=item.video or item.image or "",
                        reason=refusal.reason,
                        detail=refusal.detail,
                        caption=item.caption,
                    )
                )
            else:
                self._taken.append(signature)
                for kind, value in self._encoded(item, look).items():
                    _keep(kinds, kind, value)
                    is_text = kind.startswith("text.")
                    tensors[f"{len(rows):05d}/{kind}"] = prepared.without_end(value) if is_text else value
                rows.append(self._row(item, look, signature, name, len(rows)))
            progress.one(refusal is None)
        if rows:
            self._write_negative(kinds)
        part = Part(
            rows=tuple(rows),
            refused=tuple(refused),
            tensors=kinds,
            file=_save(self._out / name, tensors) if rows else None,
        )
        write_json(self._path(number), part.model_dump(mode="json"))
        return part

    def _write_negative(self, kinds: dict[str, Tensors]) -> None:
        """Once for all clips."""
        path = self._out / prepared.NEGATIVE
        for kind, value in self._encoders.negative.items():
            _keep(kinds, kind, value)
        if not path.exists():
            _save(path, {f"00000/{kind}": value for kind, value in self._encoders.negative.items()})

    def _seen_before(self, signature: bytes) -> Rejected | None:
        others = np.frombuffer(b"".join(self._taken), np.uint8).reshape(-1, videos.SIGNATURE_BYTES)
        bits = videos.bits_apart(signature, others)
        wanted = self._config.filters.min_difference_bits
        return Rejected("near-duplicate", f"{bits} bits from a clip before, wanted {wanted}") if bits < wanted else None

    def _encoded(self, item: Item, look: Look) -> Conditions:
        assert not isinstance(look, Rejected)
        if isinstance(look, Clip):
            return self._encoders.of_video(look.frames_THWC, item.caption)
        if self._config.from_teacher:
            return self._encoders.of_sample(look, item.caption, _seed(self._config.seed, item))
        return self._encoders.of_caption(look, item.caption)

    def _row(self, item: Item, look: Look, signature: bytes, file: str, row: int) -> Row:
        return Row(
            number=item.number,
            source=item.video or item.image or "",
            start_s=item.start_s,
            caption=item.caption,
            split="dev" if videos.held_out(item.key, self._config.held_out) else "train",
            file=file,
            row=row,
            truncated=self._encoders.too_long(item.caption),
            motion=look.motion if isinstance(look, Clip) else None,
            cut=look.cut if isinstance(look, Clip) else None,
            signature=signature.hex(),
        )


class _Progress:
    """A line now and then, and an event for each."""

    def __init__(self, run: Run, count: int, found: int) -> None:
        self._run, self._count, self._found, self._done, self._taken = run, count, found, found, 0
        self._started_s = self._said_s = time.monotonic()
        if found:
            run.say(f"{found} of {count} lines are done already")

    def one(self, taken: bool) -> None:
        """One more line of the source is dealt with."""
        self._done += 1
        self._taken += taken
        now_s = time.monotonic()
        if now_s - self._said_s < SAY_EVERY_S and self._done < self._count:
            return
        self._said_s = now_s
        new = self._done - self._found
        rate = new / max(now_s - self._started_s, 1e-3)
        left_min = (self._count - self._done) / rate / 60
        self._run.event("prepare", self._done, steps=self._count, taken=self._taken, lines_per_s=rate)
        self._run.say(
            f"prepared {self._done}/{self._count}  {self._taken} of {new} taken  {rate:.2f} lines/s  "
            f"{left_min:.1f} min left"
        )


def _read_clips(
    items: Iterable[tuple[Item, Rejected | None]], wanted: Wanted, workers: int, timeout_s: float
) -> Iterator[tuple[Item, Clip | Rejected]]:
    """Videos as they are wanted, in order, read ahead in processes of their own: a video that ends its decoder, or
    keeps it for ever, costs that video alone."""
    waiting: deque[tuple[Item, Rejected | ProcessFuture]] = deque()
    # Not of our process group: what is meant to stop us (Ctrl-C, a batch system) would end them first.
    pool = ProcessPool(workers, initializer=os.setsid, context=get_context("spawn"))
    try:
        for item, refusal in items:
            task = refusal or pool.schedule(videos.read_clip, args=(item, wanted), timeout=timeout_s)
            waiting.append((item, task))
            if len(waiting) > 2 * workers:
                yield _read(*waiting.popleft())
        while waiting:
            yield _read(*waiting.popleft())
    finally:
        pool.stop()
        pool.join()


def _read(item: Item, task: Rejected | ProcessFuture) -> tuple[Item, Clip | Rejected]:
    if isinstance(task, Rejected):
        return item, task
    try:
        return item, task.result()
    except TookTooLong:
        return item, Rejected("unreadable", "decoding it took longer than decode_timeout_s")
    except ProcessExpired as error:
        return item, Rejected("unreadable", f"the decoder crashed on it (exit code {error.exitcode})")


def _signature(item: Item, look: Look) -> bytes:
    """Of a clip its perceptual hash; of a caption one that only the same caption and picture have."""
    if isinstance(look, Clip):
        return look.signature
    return hashlib.sha256(repr((item.image, item.caption)).encode()).digest()


def _seed(seed: int, item: Item) -> int:
    """Of the noise that a line's clip is sampled from."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item.image}/{item.caption}".encode()).digest()[:4], "big")


def _keep(kinds: dict[str, Tensors], kind: str, value: Tensor) -> None:
    """Note what a kind of tensor looks like; it is the same for all clips."""
    found = Tensors(shape=tuple(value.shape[1:]), dtype=str(value.dtype).removeprefix("torch."))
    known = kinds.setdefault(kind, found)
    if known != found:
        raise DataError(f"{kind} is {found} of one clip and {known} of others; this backbone's cannot be kept together")


def _save(path: Path, tensors: Conditions) -> prepared.File:
    """Write tensors, aside and renamed."""
    aside = path.with_suffix(".tmp")
    save_file(tensors, aside)
    os.replace(aside, path)
    return prepared.describe(path)


# --- the end ----------------------------------------------------------------------------------------------------------


def _finish(out: Path, index: prepared.Index, parts: Sequence[Part]) -> None:
    """Say what was taken and what not, and write the index."""
    kinds: dict[str, Tensors] = {}
    for part in parts:
        kinds.update(part.tensors)
    rows = [row for part in parts for row in part.rows]
    refused = [line for part in parts for line in part.refused]
    names = [part.file.name for part in parts if part.file]
    _write_down(out, index.model_copy(update={"tensors": kinds}), rows, refused, names)


def _write_down(
    out: Path, index: prepared.Index, rows: Sequence[Row], refused: Sequence[Refused], names: Sequence[str]
) -> None:
    """`clips.jsonl`, what is for people, and last the index."""
    reasons = Counter(line.reason for line in refused)
    counts = {**{split: sum(row.split == split for row in rows) for split in ("train", "dev")}, **reasons}
    prepared.write_rows(out / prepared.CLIPS, rows)
    _write_report(out, index, rows, refused, counts)
    if not rows and index.shard == "1/1":
        said = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise DataError(f"no line of the source gave a clip ({said}); {out / REJECTED} says why for each")
    if (out / prepared.NEGATIVE).exists():
        names = [*names, prepared.NEGATIVE]
    files = tuple(prepared.describe(out / name) for name in (prepared.CLIPS, *names))
    index = index.model_copy(update={"counts": counts, "files": files})
    write_json(out / prepared.INDEX, index.model_dump(mode="json"))


def _write_report(
    out: Path, index: prepared.Index, rows: Sequence[Row], refused: Sequence[Refused], counts: dict[str, int]
) -> None:
    with (out / REJECTED).open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, list(Refused.model_fields), lineterminator="\n")
        lines.writeheader()
        lines.writerows(line.model_dump() for line in refused)
    of_clips = {name: [v for row in rows if (v := getattr(row, name)) is not None] for name in ("motion", "cut")}
    measured = {
        name: [round(float(q), 4) for q in np.quantile(found, [0, 0.1, 0.5, 0.9, 1])]
        for name, found in of_clips.items()
        if found
    }
    size_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    values = {
        "lines": len(rows) + len(refused),
        "clips": len(rows),
        **counts,
        "captions cut short": sum(row.truncated for row in rows),
        "bytes": size_bytes,
        "bytes per clip": size_bytes // max(len(rows), 1),
    }
    write_json(out / REPORT, {"counts": values, "quantiles": measured, "config": index.config.model_dump(mode="json")})
    of = f"{index.model.name} ({index.backbone}, {index.task})"
    text = [f"# {len(rows)} of {len(rows) + len(refused)} lines taken, for {of}", ""]
    text += ["| what | number |", "|---|---:|", *(f"| {name} | {value} |" for name, value in values.items()), ""]
    if measured:
        text += ["| of the clips taken | least | 10 % | median | 90 % | most |", "|---|---:|---:|---:|---:|---:|"]
        text += [f"| {name} | {' | '.join(map(str, quantiles))} |" for name, quantiles in measured.items()]
        text += [""]
    text += [f"Settings: `{index.config.model_dump_json()}`", "", f"What was not taken, and why: `{REJECTED}`."]
    write(out / "report.md", "\n".join(text) + "\n")


# --- many machines ----------------------------------------------------------------------------------------------------


def merge(out: Path, folders: Sequence[Path]) -> Path:
    """Join prepared folders, the shards of one source or those of several, into a new one.

    Files are linked where that is possible. A clip that is too near one of another folder is left out of the list.

    Raises:
        ConfigError: they were not prepared alike, a shard of a source is missing, or ``out`` is there.
    """
    if out.exists():
        raise ConfigError(f"{out} is there; name a new folder to merge into")
    indices = [prepared.read_index(folder) for folder in folders]
    _check_alike(folders, indices)
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    found: list[tuple[int, int, Row]] = []
    refused: list[Refused] = []
    names: dict[tuple[Path, str], str] = {}
    sources = list(dict.fromkeys(index.source_sha256 for index in indices))
    for folder, index in zip(folders, indices, strict=True):
        for file in index.files:
            if file.name == prepared.NEGATIVE and not (aside / prepared.NEGATIVE).exists():
                _link(folder / file.name, aside / file.name)
            elif file.name not in (prepared.CLIPS, prepared.NEGATIVE):
                names[folder, file.name] = f"clips-{len(names):05d}.safetensors"
                _link(folder / file.name, aside / names[folder, file.name])
        place = sources.index(index.source_sha256)
        found += [
            (place, row.number, row.model_copy(update={"file": names[folder, row.file]}))
            for row in prepared.read_rows(folder, index)
        ]
        with (folder / REJECTED).open(newline="", encoding="utf-8") as file_of:
            refused += [Refused.model_validate(line) for line in csv.DictReader(file_of)]
    rows, again = _without_copies([row for *_, row in sorted(found, key=lambda entry: entry[:2])], indices[0].config)
    whole = next((index for index in indices if index.tensors), indices[0])
    of = tuple(dict.fromkeys(sha256 for index in indices for sha256 in index.source_sha256))
    joined = whole.model_copy(update={"source_sha256": of, "shard": "1/1"})
    _write_down(aside, joined, rows, [*refused, *again], list(names.values()))
    os.replace(aside, out)
    return out


def _check_alike(folders: Sequence[Path], indices: Sequence[prepared.Index]) -> None:
    for folder, index in zip(folders, indices, strict=True):
        for name in ("backbone", "task", "encoders", "call", "video", "config", "latents"):
            one, other = getattr(index, name), getattr(indices[0], name)
            if one != other:
                raise DataError(
                    f"{folder} and {folders[0]} differ in {name}: {one} and {other}; "
                    "prepare them with the same model and settings"
                )
        first = next((i.tensors for i in indices if i.tensors), {})
        if index.tensors and index.tensors != first:
            raise DataError(f"{folder} holds {index.tensors}, and another {first}; prepare them alike")
    for source in dict.fromkeys(index.source_sha256 for index in indices):
        shards = [index.shard for index in indices if index.source_sha256 == source]
        count = int(shards[0].split("/")[1])
        wanted = {f"{i}/{count}" for i in range(1, count + 1)}
        if sorted(shards) != sorted(wanted):
            raise DataError(
                f"of one source there are the shards {', '.join(shards)}; name each of {', '.join(sorted(wanted))} once"
            )


def _without_copies(rows: Sequence[Row], config: PrepareConfig) -> tuple[list[Row], list[Refused]]:
    kept: list[Row] = []
    again: list[Refused] = []
    taken = np.zeros((len(rows), videos.SIGNATURE_BYTES), np.uint8)
    for row in rows:
        signature = bytes.fromhex(row.signature)
        bits = videos.bits_apart(signature, taken[: len(kept)])
        if bits >= config.filters.min_difference_bits:
            taken[len(kept)] = np.frombuffer(signature, np.uint8)
            kept.append(row)
            continue
        detail = f"{bits} bits from a clip of another folder, wanted {config.filters.min_difference_bits}"
        again.append(
            Refused(number=row.number, source=row.source, reason="near-duplicate", detail=detail, caption=row.caption)
        )
    return kept, again


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system
        shutil.copy(path, to)
