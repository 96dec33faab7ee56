"""What every stage is given: the teacher, frozen, and clips with their captions.

Shape suffixes: B clip, N clip of all, C channel, T latent frame, H row, W column.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import distributed, empty, lineage, losses, schedule, student
from distill.backbones import base, conditions
from distill.backbones.conditions import Conditions
from distill.config import DEV_CLIPS, SHAPES, ConfigError, DistillConfig
from distill.data import prepared, shapes
from distill.distributed import ALL, Share
from distill.latents import Latents
from distill.lineage import EXPERTS
from distill.loop import Run, compile_blocks, computed_again, plain_attention, training_device, write_json


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
    share: Share = ALL
    """Of several processes, which rows of the whole batch these are."""

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

    @property
    def whole(self) -> int:
        """Clips of the batch on all processes: what random numbers are drawn for."""
        return len(self) * self.share.of

    def noise(self, generator: torch.Generator) -> Tensor:
        """Gaussian noise of the clips' shape."""
        return self.share.rows(torch.randn((self.whole, *self.shape), generator=generator)).to(self.device)


class Given:
    """The teacher's parts, in full precision, and cached latents of training and held-out clips."""

    def __init__(self, run: Run, config: DistillConfig) -> None:
        folder = Path(config.teacher)
        self.folder = folder
        self.card = student.read_card(folder)
        self.backbone = base.load(self.card.backbone, self.card.task)
        self.config = config
        self.device = training_device()
        self.world = run.world
        sharded, encoded = run.world.is_sharded, config.data != SHAPES
        # Denoisers in parts get theirs below. What encodes captions and images has done so where they were prepared,
        # and is larger than some denoisers.
        without = empty.networks(
            empty.parts(folder), lambda name, part: (sharded and name in EXPERTS) or (encoded and part.is_encoder)
        )
        self.pipe = student.load_pipeline(folder, self.device, without)
        self.backbone.in_one_pass(self.pipe.vae)
        self.teacher: Any = self.backbone.network(self.pipe)
        self._shape = self.backbone.latent_shape(self.pipe, self.card.call)
        self._empty = copy.deepcopy(self.teacher) if sharded else None
        self.few_steps_call = self.backbone.calling(self.card.call, config.student.num_inference_steps, 1.0)
        """The stock call of a student."""
        if config.compile:
            compile_blocks(run, self.backbone.blocks(self.teacher))
        if sharded:
            self.spread(self.teacher, distributed.Stored.of_model(folder))
        self.train, self.dev = _clips(run, self)

    def batch(self, clips: Clips, rows_B: Tensor, drop_B: Tensor | None = None) -> Batch:
        """The clips of these rows; where ``drop_B`` is true the caption is replaced by the negative prompt."""
        found = clips.batch(rows_B)
        text, empty = self._texts(found, drop_B)
        x0_BCTHW = None if found.x0_BCTHW is None else found.x0_BCTHW.float().to(self.device)
        kept = conditions.moved(found.image, self.device)
        image = kept if x0_BCTHW is None else self.backbone.image_of(x0_BCTHW, kept)
        return Batch(x0_BCTHW, self._shape, image, text, empty, self.backbone.GIVEN_FRAMES, found.captions, self.device)

    def mine(self, clips: Clips, rows_B: Tensor, drop_B: Tensor | None = None) -> Batch:
        """This process's rows of a batch that all of them share."""
        share = self.world.share
        batch = self.batch(clips, share.rows(rows_B), None if drop_B is None else share.rows(drop_B))
        return replace(batch, share=share)

    # --- networks: whole on one process, or in parts on several ---

    def teachers_copy(self) -> Any:
        """The teacher's network once more, to be trained; of several processes still without weights."""
        network = copy.deepcopy(self.teacher if self._empty is None else self._empty)
        return network.train().requires_grad_(True)

    def ready(self, run: Run, *networks: Any) -> None:
        """Compile the blocks of networks that are to be trained, or have their inner values computed twice, as the
        configuration says."""
        for network in {id(n): n for n in networks}.values():
            if self.config.checkpoint_activations:
                for model in self.backbone.networks(network).values():
                    model.enable_gradient_checkpointing(computed_again)
            if self.config.compile:
                compile_blocks(run, self.backbone.blocks(network))

    def without_blocks(self, network: Any, pruned: Collection[int]) -> Any:
        """`Backbone.without_blocks`, of a network without weights too."""
        if self._empty is None:
            return self.backbone.without_blocks(network, pruned)
        return distributed.without_blocks(self.backbone, network, pruned)

    def spread(self, network: Any, weights: distributed.Stored, fresh: dict[str, Tensor] | None = None) -> None:
        """Give a network without weights its own, in parts: see ``distributed.spread``."""
        distributed.spread(self.world, self.backbone, network, weights, self.device, self.config, self._shape, fresh)

    def empty_teacher(self) -> Any:
        """Its network without weights, of several processes; what is asked of a network but for its values it knows."""
        return copy.deepcopy(self._empty)

    def let_the_teacher_go(self) -> None:
        """Of several processes: its weights are needed no more, and their memory is."""
        if self._empty is not None:
            self.teacher = self.empty_teacher()
            self.pipe.register_modules(**self.backbone.networks(self.teacher))

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
        with run.world.first_alone():  # it encodes, the others read
            run.world.wait_for(*(run.folder / f"latents-{split}.safetensors" for split in ("train", "dev")))
            train = Latents.of_split(run, given.pipe.vae, "train", config.num_clips, config.compile)
            return train, Latents.of_split(run, given.pipe.vae, "dev", DEV_CLIPS, compile=False)
    folder = Path(config.data)
    train_set = prepared.Dataset(folder, given.card, "train", config.num_clips)
    path, of = run.folder / lineage.DATA, {"data": folder.name, "sha256": train_set.index.sha256}
    with run.world.first_alone():
        if path.exists() and json.loads(path.read_text()) != of:
            raise ConfigError(f"{run.folder} was begun with other clips than {folder} holds now; take a new folder")
        if run.world.is_first:
            write_json(path, of)
    return train_set, prepared.Dataset(folder, given.card, "dev", DEV_CLIPS)


def noised(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s noise."""
    return torch.lerp(x0_BCTHW, noise_BCTHW, losses.over_clips(sigma_B))
