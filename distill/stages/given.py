"""What every stage is given: the teacher, frozen, and clips with their captions.

Shape suffixes: B clip, N clip of all, C channel, T latent frame, H row, W column.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import lineage, losses, schedule, student
from distill.backbones import base, conditions
from distill.backbones.conditions import Conditions
from distill.config import DEV_CLIPS, SHAPES, ConfigError, DistillConfig
from distill.data import prepared, shapes
from distill.latents import Latents
from distill.loop import Run, compile_blocks, plain_attention, training_device, write_json


@dataclass(frozen=True)
class Batch:
    """Clips with their conditions."""

    latents_BCTHW: Tensor | None
    """None where there are captions alone."""
    shape: tuple[int, ...]
    """Of one clip's latents: C, T, H, W."""
    image: Conditions
    """It goes into every branch."""
    text: Conditions
    """Of the captions."""
    empty: Conditions
    """Of the negative prompt, for each clip."""
    given_frames: int
    """Latent frames at the start that are given, not made."""
    captions: list[str]
    device: torch.device

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def x0_BCTHW(self) -> Tensor:
        """Clean latents. Raises ``ConfigError`` where there are none."""
        if self.latents_BCTHW is None:
            raise ConfigError(prepared.needs_latents("this stage"))
        return self.latents_BCTHW

    def made(self, *latents_BCTHW: Tensor) -> tuple[Tensor, ...]:
        """Without the frames that are given: what a loss is taken of."""
        return tuple(x_BCTHW[:, :, self.given_frames :] for x_BCTHW in latents_BCTHW)

    def noise(self, generator: torch.Generator) -> Tensor:
        """Gaussian noise of the clips' shape."""
        return torch.randn((len(self), *self.shape), generator=generator).to(self.device)


class Given:
    """The teacher's parts, in full precision, and cached latents of training and held-out clips."""

    def __init__(self, run: Run, config: DistillConfig) -> None:
        folder = Path(config.teacher)
        self.folder = folder
        self.card = student.read_card(folder)
        self.backbone = base.load(self.card.backbone, self.card.task)
        self.config = config
        self.device = training_device()
        if config.data == SHAPES:
            self.pipe = student.load_pipeline(folder, self.device)
        else:  # what encodes captions and images has done so, and is larger than some transformers
            self.pipe = student.load_pipeline(folder, "cpu")
            self.pipe.vae.to(self.device)
            self.backbone.network(self.pipe).to(self.device)
        self.backbone.in_one_pass(self.pipe.vae)
        self.teacher: Any = self.backbone.network(self.pipe)
        self.few_steps_call = self.backbone.calling(self.card.call, config.student.num_inference_steps, 1.0)
        """The stock call of a student."""
        if config.compile:
            compile_blocks(run, self.backbone.blocks(self.teacher))
        self.train, self.dev = _clips(run, self)
        self._shape = self.backbone.latent_shape(self.pipe, self.card.call)

    def batch(self, clips: Clips, rows_B: Tensor, drop_B: Tensor | None = None) -> Batch:
        """The clips of these rows; where ``drop_B`` is true the caption is replaced by the negative prompt."""
        found = clips.batch(rows_B)
        text, empty = self._texts(found, drop_B)
        x0_BCTHW = None if found.x0_BCTHW is None else found.x0_BCTHW.float().to(self.device)
        kept = conditions.moved(found.image, self.device)
        image = kept if x0_BCTHW is None else self.backbone.image_of(x0_BCTHW, kept)
        return Batch(x0_BCTHW, self._shape, image, text, empty, self.backbone.GIVEN_FRAMES, found.captions, self.device)

    def held_out(self, count: int, setting: str) -> Tensor:
        """Rows of so many held-out clips. Raises ``ConfigError``, which names the setting, where there are fewer."""
        if count > len(self.dev):
            raise ConfigError(f"{setting}={count}, and {len(self.dev)} clips are held out; lower it or hold out more")
        return torch.arange(count)

    @torch.no_grad()
    def _texts(self, found: prepared.Clips, drop_B: Tensor | None) -> tuple[Conditions, Conditions]:
        """Of the captions and of the negative prompt: as they were prepared, or encoded now."""
        drop_B = torch.zeros(len(found.captions), dtype=torch.bool) if drop_B is None else drop_B
        unwanted = base.negative_prompt(self.card.call)
        if found.text:
            text, empty = (conditions.moved(of, self.device) for of in (found.text, found.negative))
            if unwanted:  # no real clip is what it says, and the empty one was not prepared
                return text, empty
            return conditions.chosen(drop_B.to(self.device), empty, text), empty
        captions = [unwanted if dropped else c for c, dropped in zip(found.captions, drop_B.tolist(), strict=True)]
        both = self.backbone.encode_text(self.pipe, [*captions, unwanted], self.card.call)
        empty = conditions.repeated(conditions.rows(both, slice(-1, None)), len(captions))
        return conditions.rows(both, slice(-1)), empty

    def velocity(
        self, transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch, text: Conditions | None = None
    ) -> Tensor:
        """Velocity in full precision by ``transformer``, with the captions or with another text."""
        text = batch.text if text is None else text
        reduced = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced), plain_attention():
            return self.backbone.predict_velocity(transformer, x_BCTHW, sigma_B, batch.image, text).float()

    def sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels as the teacher was trained on them, ``[count]``."""
        return schedule.sample_sigmas(count, self.config.shift, generator).to(self.device)


Clips = Latents | prepared.Dataset


def check(config: DistillConfig, teacher: student.Card) -> None:
    """Whether teacher, clips and settings go together, before a run is begun or anything is loaded.

    Raises:
        ConfigError: they do not.
    """
    if config.experts != "both" and "transformer_2" not in teacher.parameters:
        raise ConfigError(f"experts={config.experts}: the teacher is of one network; leave it out")
    if config.data != SHAPES:
        prepared.Dataset(Path(config.data), teacher)
    elif (teacher.backbone, teacher.prompt.grammar) != ("wan", shapes.GRAMMAR):
        raise ConfigError(
            f"data={SHAPES}: {teacher.name} is no model of that world; prepare clips for it with "
            "`python -m distill prepare`, and give their folder as data="
        )


def _clips(run: Run, given: Given) -> tuple[Clips, Clips]:
    """For training, and held out."""
    config = given.config
    if config.data == SHAPES:
        train = Latents.of_split(run, given.pipe.vae, "train", config.num_clips, config.compile)
        return train, Latents.of_split(run, given.pipe.vae, "dev", DEV_CLIPS, compile=False)
    folder = Path(config.data)
    train_set = prepared.Dataset(folder, given.card, "train", config.num_clips)
    path, of = run.folder / lineage.DATA, {"data": folder.name, "sha256": train_set.index.sha256}
    if path.exists() and json.loads(path.read_text()) != of:
        raise ConfigError(f"{run.folder} was begun with other clips than {folder} holds now; take a new folder")
    write_json(path, of)
    return train_set, prepared.Dataset(folder, given.card, "dev", DEV_CLIPS)


def noised(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s noise."""
    return torch.lerp(x0_BCTHW, noise_BCTHW, losses.over_clips(sigma_B))
