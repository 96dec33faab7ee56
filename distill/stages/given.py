"""What every stage is given: the teacher, frozen, and clips with their captions.

Shape suffixes: B clip, N clip of all, C channel, T latent frame, H row, W column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import losses, schedule, student
from distill.backbones import base, conditions
from distill.backbones.conditions import Conditions
from distill.config import DEV_CLIPS, DistillConfig
from distill.latents import Latents
from distill.loop import Run, compile_blocks, plain_attention, training_device


@dataclass(frozen=True)
class Batch:
    """Clips with their conditions."""

    x0_BCTHW: Tensor
    image: Conditions
    """It goes into every branch."""
    text: Conditions
    """Of the captions."""
    empty: Conditions
    """Of the negative prompt, for each clip."""
    given_frames: int
    """Latent frames at the start that are given, not made."""

    def made(self, *latents_BCTHW: Tensor) -> tuple[Tensor, ...]:
        """Without the frames that are given: what a loss is taken of."""
        return tuple(x_BCTHW[:, :, self.given_frames :] for x_BCTHW in latents_BCTHW)

    def noise(self, generator: torch.Generator) -> Tensor:
        """Gaussian noise of the clips' shape."""
        return torch.randn(self.x0_BCTHW.shape, generator=generator).to(self.x0_BCTHW.device)


class Given:
    """The teacher's parts, in full precision, and cached latents of training and held-out clips."""

    def __init__(self, run: Run, config: DistillConfig) -> None:
        folder = Path(config.teacher)
        self.folder = folder
        self.card = student.read_card(folder)
        self.backbone = base.load(self.card.backbone, self.card.task)
        self.config = config
        self.device = training_device()
        self.pipe = student.load_pipeline(folder, self.device)
        self.backbone.in_one_pass(self.pipe.vae)
        self.teacher: Any = self.backbone.network(self.pipe)
        self.few_steps_call = self.backbone.calling(self.card.call, config.student.num_inference_steps, 1.0)
        """The stock call of a student."""
        if config.compile:
            compile_blocks(run, self.backbone.blocks(self.teacher))
        self.train = Latents.of_split(run, self.pipe.vae, "train", config.num_clips, config.compile)
        self.dev = Latents.of_split(run, self.pipe.vae, "dev", DEV_CLIPS, compile=False)

    def batch(self, clips: Latents, rows_B: Tensor, drop_B: Tensor | None = None) -> Batch:
        """The clips of these rows; where ``drop_B`` is true the caption is replaced by the empty one."""
        captions = [clips.captions[row] for row in rows_B.tolist()]
        if drop_B is not None:
            captions = ["" if dropped else c for c, dropped in zip(captions, drop_B.tolist(), strict=True)]
        with torch.no_grad():
            text = self.backbone.encode_text(self.pipe, [*captions, ""], self.card.call)
        x0_BCTHW = clips.x0_NCTHW[rows_B].float().to(self.device)
        return Batch(
            x0_BCTHW,
            self.backbone.image_of(x0_BCTHW, {}),
            conditions.rows(text, slice(-1)),
            conditions.repeated(conditions.rows(text, slice(-1, None)), len(captions)),
            self.backbone.GIVEN_FRAMES,
        )

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


def noised(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s noise."""
    return torch.lerp(x0_BCTHW, noise_BCTHW, losses.over_clips(sigma_B))
