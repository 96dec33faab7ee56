"""What a model's encoders make of one clip or caption, as a prepared data set keeps it (`distill.data.prepared`).

Each clip is encoded alone, so that its neighbours change nothing. Shape suffixes: B clip (one), C channel, T frame,
H row, W column.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill import student
from distill.backbones import base
from distill.backbones.conditions import Conditions
from distill.config import ConfigError, PrepareConfig
from distill.loop import training_device


class Encoders:
    """A model that was loaded for what of it encodes."""

    def __init__(self, folder: Path, card: student.Card, config: PrepareConfig) -> None:
        self.card, self.config = card, config
        self.backbone = base.load(card.backbone, card.task)
        self.device = training_device()
        self.pipe = student.load_pipeline(folder, self.device)
        self.pipe.set_progress_bar_config(disable=True)

    def of_video(self, frames_THWC: np.ndarray, caption: str) -> Conditions:
        """What is kept of a clip."""
        video_BCTHW = self._pixels(frames_THWC)
        with self._encoding():
            x0_BCTHW = self.backbone.encode_video(self.pipe.vae, video_BCTHW)
        return self._beside(x0_BCTHW, video_BCTHW[:, :, 0], caption)

    def of_sample(self, image_HWC: np.ndarray | None, caption: str, seed: int) -> Conditions:
        """What is kept of a clip that the model itself makes: the stock pipeline's own latents."""
        given = {} if image_HWC is None else {"image": Image.fromarray(image_HWC)}
        generator = torch.Generator().manual_seed(seed)
        with self._encoding():
            made = self.pipe(**given, prompt=caption, **self.card.call, generator=generator, output_type="latent")
        return self._beside(made.frames, self._first(image_HWC), caption)

    def of_caption(self, image_HWC: np.ndarray | None, caption: str) -> Conditions:
        """What is kept where there is no clip: all of the picture's conditions."""
        first_BCHW = self._first(image_HWC)
        with self._encoding():
            image = self.backbone.encode_image(self.pipe, first_BCHW, self.card.call)
        return {**self._kept("image", image), **self._texts(caption, first_BCHW)}

    def too_long(self, caption: str) -> bool:
        """Whether the text encoder does not see the end of a caption."""
        limit = self.card.call.get("max_sequence_length")
        if limit is None:
            limit = inspect.signature(type(self.pipe).__call__).parameters["max_sequence_length"].default
        return len(self.pipe.tokenizer(caption)["input_ids"]) > limit

    @cached_property
    def negative(self) -> Conditions:
        """Of the negative prompt, where it is the same for every picture; else nothing, and each clip has its own."""
        size = (1, 3, self.card.video.height, self.card.video.width)
        of_black, of_white = (self._negative(torch.full(size, value, device=self.device)) for value in (-1.0, 1.0))
        return of_black if all(torch.equal(value, of_white[name]) for name, value in of_black.items()) else {}

    def _beside(self, x0_BCTHW: Tensor, first_BCHW: Tensor | None, caption: str) -> Conditions:
        with self._encoding():
            image = self.backbone.to_keep(self.backbone.encode_image(self.pipe, first_BCHW, self.card.call))
        x0 = _as("x0", x0_BCTHW, torch.float16)
        return {"x0": x0, **self._kept("image", image), **self._texts(caption, first_BCHW)}

    def _texts(self, caption: str, first_BCHW: Tensor | None) -> Conditions:
        with self._encoding():
            text = self.backbone.encode_text(self.pipe, [caption], self.card.call, first_BCHW)
        own = {} if self.negative else self._negative(first_BCHW)
        return {**self._kept("text", text), **own}

    def _negative(self, first_BCHW: Tensor | None) -> Conditions:
        prompt = self.card.call.get("negative_prompt") or ""
        with self._encoding():
            text = self.backbone.encode_text(self.pipe, [prompt], self.card.call, first_BCHW)
        return self._kept("negative", text)

    def _kept(self, kind: str, values: Conditions) -> Conditions:
        dtype = torch.float16 if kind == "image" else getattr(torch, self.config.text_dtype)
        return {f"{kind}.{name}": _as(f"{kind}.{name}", value, dtype) for name, value in values.items()}

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        reduced = self.config.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=reduced):
            yield

    def _first(self, image_HWC: np.ndarray | None) -> Tensor | None:
        return None if image_HWC is None else self._pixels(image_HWC[None])[:, :, 0]

    def _pixels(self, frames_THWC: np.ndarray) -> Tensor:
        """``[1, C, T, H, W]`` in [-1, 1]."""
        frames_CTHW = torch.tensor(frames_THWC, device=self.device).permute(3, 0, 1, 2)
        return (frames_CTHW.float() / 127.5 - 1)[None]


def _as(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU; what is not counted or masked as this type."""
    if not value.is_floating_point():
        return value.cpu().contiguous()
    kept = value.to(dtype).cpu().contiguous()
    if not kept.isfinite().all():
        raise ConfigError(
            f"{name}: {value.abs().max().item():g} does not fit {str(dtype).removeprefix('torch.')}; "
            "of a text, give --set text_dtype=bfloat16"
        )
    return kept
