"""What every stage is given: the teacher, frozen, and clips with their captions.

Shape suffixes: B clip, N clip of all, C channel, T latent frame, H row, W column, L text token, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import losses, schedule, student
from distill.backbones import base
from distill.backbones.wan_autoencoder import in_one_pass
from distill.config import DEV_CLIPS, DistillConfig
from distill.latents import Latents
from distill.loop import Run, compile_blocks, plain_attention, training_device


@dataclass(frozen=True)
class Batch:
    """Clips with the embeddings of their captions and of the empty one."""

    x0_BCTHW: Tensor
    text_BLD: Tensor
    empty_BLD: Tensor

    @property
    def first_BC1HW(self) -> Tensor:
        """The condition: the clean latent of the first frame. It goes into every branch."""
        return self.x0_BCTHW[:, :, :1]

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
        in_one_pass(self.pipe.vae)
        self.teacher: Any = self.pipe.transformer
        if config.compile:
            compile_blocks(run, self.backbone.blocks(self.teacher))
        self.train = Latents.of_split(run, self.pipe.vae, "train", config.num_clips, config.compile)
        self.dev = Latents.of_split(run, self.pipe.vae, "dev", DEV_CLIPS, compile=False)

    def batch(self, clips: Latents, rows_B: Tensor, drop_B: Tensor | None = None) -> Batch:
        """The clips of these rows; where ``drop_B`` is true the caption is replaced by the empty one."""
        captions = [clips.captions[row] for row in rows_B.tolist()]
        if drop_B is not None:
            captions = ["" if dropped else c for c, dropped in zip(captions, drop_B.tolist(), strict=True)]
        text_BLD = self._embed([*captions, ""])
        x0_BCTHW = clips.x0_NCTHW[rows_B].float().to(self.device)
        return Batch(x0_BCTHW, text_BLD[:-1], text_BLD[-1:].expand(len(captions), -1, -1))

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Tensor:
        length = self.card.call["max_sequence_length"]
        return self.backbone.encode_text(self.pipe.tokenizer, self.pipe.text_encoder, captions, length)

    def velocity(
        self, transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch, text_BLD: Tensor | None = None
    ) -> Tensor:
        """Velocity in full precision by ``transformer``, with the captions or with another text."""
        text_BLD = batch.text_BLD if text_BLD is None else text_BLD
        reduced = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced), plain_attention():
            return self.backbone.predict_velocity(transformer, x_BCTHW, sigma_B, batch.first_BC1HW, text_BLD).float()

    def sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels as the teacher was trained on them, ``[count]``."""
        return schedule.sample_sigmas(count, self.config.shift, generator).to(self.device)


def noised(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s noise."""
    return torch.lerp(x0_BCTHW, noise_BCTHW, losses.over_clips(sigma_B))
