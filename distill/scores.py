"""What a student scores, measured part by part and kept: a comparison of many goes on where it was stopped.

The same clips and noise for whoever is measured. A part is so many clips with one seed of noise, half of them with
closed captions; its file is named by the student's hash, by how it is called and by the device that it is called on, so
nothing else has to be remembered.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import evaluate, metrics, sampler, student
from distill.backbones import base as backbones
from distill.baselines import f3
from distill.config import ConfigError
from distill.data import shapes
from distill.evaluate import Setting
from distill.loop import can_compile, training_device

MEASURED_VERSION = 1
"""Raise it when a metric, or what is drawn for it, changes: everything is measured anew."""
PART = 64
SHOWN = 3
"""Clips of either kind whose videos are kept for the sheet."""
REPEATS = 3
PHASES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Asked:
    """What is measured."""

    split: str
    clips: int
    noise_seeds: int
    diversity_pairs: int
    diversity_samples: int
    precision: str


@dataclass(frozen=True)
class Scored:
    """What was measured of one student."""

    closed: np.ndarray
    values: dict[str, np.ndarray]
    """Of every metric ``[noise seeds, clips]``."""
    diversity: np.ndarray
    """``[pairs]``; empty where it was not asked for."""
    seconds: dict[str, float]
    """Median of each phase of one clip by itself."""
    shown_BCTHW: Tensor
    """Of the first clips, half of them closed."""


def measure(folder: Path, out: Path, asked: Asked, check: Callable[[], None]) -> Scored:
    """Measure what is not measured yet of the student (or teacher) in ``folder``.

    Args:
        folder: a model folder. Beside it may lie what F3-Pruning found.
        out: keeps the parts.
        asked: how much.
        check: called between parts; what it raises ends the work, and what is done is kept.

    Raises:
        FolderError: the folder is broken.
        ConfigError: the split has fewer clips.
    """
    measured = _Measured(folder, out, asked)
    with measured.attending():
        parts = [
            [measured.part(seed, number, check) for number in range(measured.num_parts)]
            for seed in range(asked.noise_seeds)
        ]
        chosen = [measured.choices(number, check) for number in range(asked.diversity_samples * measured.has_pairs)]
        seconds = measured.seconds(check)
    names = [name for name in parts[0][0] if name not in ("closed", "shown")]
    made = list(zip(*chosen, strict=True)) if chosen else []
    ratios = metrics.diversity([list(pair) for pair in made], measured.drawn) if made else torch.empty(0)
    return Scored(
        closed=np.concatenate([part["closed"] for part in parts[0]]),
        values={name: np.stack([np.concatenate([p[name] for p in row]) for row in parts]) for name in names},
        diversity=ratios.numpy(),
        seconds=seconds,
        shown_BCTHW=torch.from_numpy(parts[0][0]["shown"]).float() / 127.5 - 1,
    )


def drawn(asked: Asked) -> Tensor:
    """The clips of ``Scored.shown_BCTHW`` as the world drew them."""
    return shapes.clips(0, _shown(*_of_part(asked, 0))).video_BCTHW


def _of_part(asked: Asked, number: int) -> tuple[list[int], list[int]]:
    """Indices of the part's clips with closed and with open captions."""
    half = asked.clips // 2
    closed, opened = evaluate.by_kind(asked.split, half)
    part = slice(number * PART // 2, (number + 1) * PART // 2)
    return closed[part], opened[part]


def _shown(closed: list[int], opened: list[int]) -> list[int]:
    return closed[:SHOWN] + opened[:SHOWN]


class _Measured:
    """One student with what is kept of it. It is loaded when something has to be made."""

    def __init__(self, folder: Path, out: Path, asked: Asked) -> None:
        if asked.clips % 2:
            raise ConfigError(f"half of the clips have closed captions: an even number is wanted; got {asked.clips}")
        self._folder = folder
        self._asked = asked
        self._card = student.read_card(folder)
        call = self._card.call
        self._setting = Setting(call["num_inference_steps"], call["guidance_scale"])
        self._f3 = folder.parent / f3.FOUND
        limited = f"-{student.file_sha256(self._f3)[:8]}" if self._f3.exists() else ""
        name = f"{self._card.sha256[:16]}-{self._setting.num_inference_steps}-{self._setting.guidance_scale:g}"
        self._out = out / f"{name}-{asked.precision}{limited}-{_device_name()}-v{MEASURED_VERSION}"
        self._out.mkdir(parents=True, exist_ok=True)
        self._precision = evaluate.precision_of(asked.precision)
        self.num_parts = -(-asked.clips // PART)
        self.has_pairs = asked.diversity_pairs > 0

    @cached_property
    def _pipe(self) -> Any:
        torch.compiler.reset()  # what was compiled for others
        pipe = evaluate.load(self._folder)
        if self._asked.precision == "bfloat16" and can_compile() and not self._f3.exists():
            pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return pipe

    @contextmanager
    def attending(self, pipe: Any = None, timed: bool = False) -> Iterator[None]:
        """Within it the student attends as F3-Pruning found that it should, where that is how it was made.

        Args:
            pipe: the student's; the one that everything but seconds is measured with, if None.
            timed: see ``f3.as_pruned``.
        """
        if not self._f3.exists():
            yield
            return
        backbone = backbones.load(self._card.backbone, self._card.task)
        pipe = self._pipe if pipe is None else pipe
        num_frames = 1 + (self._card.call["num_frames"] - 1) // pipe.vae_scale_factor_temporal
        with f3.as_pruned(backbone, pipe.transformer, self._folder.parent, num_frames, timed):
            yield

    @cached_property
    def _pairs(self) -> shapes.Clips:
        _, indices = evaluate.by_kind(self._asked.split, self._asked.diversity_pairs)
        return shapes.clips(0, indices)

    @cached_property
    def drawn(self) -> list[list[tuple[str, ...]]]:
        """What the world chooses of what the pairs leave open, pair by pair."""
        futures = metrics.truth_futures(self._pairs, self._asked.diversity_samples)
        return evaluate.by_pair([metrics.choices_of(self._pairs.captions, scene) for scene in futures])

    def _part_path(self, seed: int, number: int) -> Path:
        closed, _ = _of_part(self._asked, number)
        return self._out / f"{self._asked.split}-{number}x{2 * len(closed)}-{seed}.npz"

    def part(self, seed: int, number: int, check: Callable[[], None]) -> dict[str, np.ndarray]:
        """Every metric of every clip of a part, which of them are closed, and the videos of a few as bytes."""
        path = self._part_path(seed, number)
        if not path.exists():
            check()
            closed, opened = _of_part(self._asked, number)
            clips = shapes.clips(0, closed + opened)
            noise = [evaluate.noise_seed(seed, index) for index in closed + opened]
            prompts = [str(caption) for caption in clips.captions]
            first_BCHW = clips.video_BCTHW[:, :, 0]
            made = evaluate.make(self._pipe, self._card, self._setting, first_BCHW, prompts, noise, self._precision)
            found = metrics.measure(made, clips, evaluate.reconstruction(self._pipe)).values
            kept = [(closed + opened).index(index) for index in _shown(closed, opened)]
            shown = ((made[kept].clamp(-1, 1) + 1) * 127.5).round().byte()
            is_closed = np.array([caption.closed for caption in clips.captions])
            _store(path, {n: v.numpy() for n, v in found.items()} | {"closed": is_closed, "shown": shown.numpy()})
        return _stored(path)

    def choices(self, number: int, check: Callable[[], None]) -> list[tuple[str, ...]]:
        """What the student chose in its sample of that number of each pair."""
        path = self._out / f"{self._asked.split}-choices-{self._asked.diversity_pairs}-{number}.npz"
        if not path.exists():
            check()
            made = evaluate.made_choices(
                self._pipe, self._card, self._setting, self._pairs, number, self._precision
            )  # fmt: skip
            _store(path, {"choices": np.array(made)})
        return [tuple(row) for row in _stored(path)["choices"].tolist()]

    def seconds(self, check: Callable[[], None]) -> dict[str, float]:
        """Of each phase of one clip by itself, uncompiled; the first of some is not counted."""
        path = self._out / "seconds.npz"
        if not path.exists():
            check()
            pipe = evaluate.load(self._folder)
            with self.attending(pipe, timed=True):
                taken = np.array([_phases(pipe, self._card, self._precision)])
            _store(path, {"seconds": taken})
        return dict(zip(PHASES, _stored(path)["seconds"][0].tolist(), strict=True))


def _phases(pipe: Any, card: student.Card, precision: torch.dtype) -> list[float]:
    clip = shapes.clips(0, shapes.SPLITS["test"][:1])
    backbone = backbones.load(card.backbone, card.task)
    noise_BCTHW = sampler.draw_noise(backbone, pipe, [0], card.call)
    taken: list[list[float]] = []
    for _ in range(REPEATS + 1):
        at = [_now()]
        given = sampler.encode(backbone, pipe, clip.video_BCTHW[:, :, 0], [str(clip.captions[0])], card.call)
        at.append(_now())
        latents = sampler.denoise(backbone, pipe, given, card.call, noise_BCTHW, precision)
        at.append(_now())
        backbone.decode_latents(pipe.vae, latents).cpu()
        at.append(_now())
        taken.append([after - before for before, after in pairwise(at)])
    return [statistics.median(phase) for phase in zip(*taken[1:], strict=True)]


def _now() -> float:
    """In seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _device_name() -> str:
    """Of what it is measured on, as part of a file's name."""
    if training_device().type != "cuda":
        return training_device().type
    return "cuda-" + re.sub(r"\W+", "-", torch.cuda.get_device_name())


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    aside = path.with_suffix(".tmp.npz")
    np.savez_compressed(aside, allow_pickle=False, **arrays)
    os.replace(aside, path)


def _stored(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)
