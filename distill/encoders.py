"""What a model's encoders make of one clip or caption, as a prepared data set keeps it (`distill.data.prepared`).

Each clip is encoded alone, so that its neighbours change nothing. Shape suffixes: B clip (one), C channel, T frame,
H row, W column.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

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
        self.pipe = student.load_pipeline(folder, self.device) if config.from_teacher else _load(folder, self.device)
        self.pipe.set_progress_bar_config(disable=True)

    def of_video(self, frames_THWC: np.ndarray, caption: str) -> Conditions:
        """What is kept of a clip."""
        video_BCTHW = self._pixels(frames_THWC)
        with self._encoding():
            x0_BCTHW = self.backbone.encode_video(self.pipe.vae, video_BCTHW)
        return self._beside(x0_BCTHW, video_BCTHW[:, :, 0], caption)

    def of_sample(self, image_HWC: np.ndarray | None, caption: str, seed: int) -> Conditions:
        """What is kept of a clip that the model itself makes: the stock pipeline's own latents."""
        given = self.backbone.arguments(self.card.call)
        if image_HWC is not None:
            given["image"] = Image.fromarray(image_HWC)
        generator = torch.Generator().manual_seed(seed)
        with self._encoding():
            made = self.pipe(**given, prompt=caption, generator=generator, output_type="latent")
        wanted = self.backbone.latent_shape(self.pipe, self.card.call)
        if made.frames.shape[1:] != wanted:
            raise ConfigError(
                f"--from-teacher: {type(self.pipe).__name__} gives latents {list(made.frames.shape[1:])} where "
                f"{list(wanted)} are distilled; prepare this model's data from videos"
            )
        return self._beside(made.frames, self._first(image_HWC), caption)

    def of_caption(self, image_HWC: np.ndarray | None, caption: str) -> Conditions:
        """What is kept where there is no clip: all of the picture's conditions."""
        first_BCHW = self._first(image_HWC)
        with self._encoding():
            image = self.backbone.encode_image(self.pipe, first_BCHW, self.card.call)
        return {**self._kept("image", image), **self._texts(caption, first_BCHW)}

    def too_long(self, caption: str) -> bool:
        """Whether the text encoder does not see a caption's end. Where the card has no limit, the stock pipeline's
        own holds, and nothing is counted."""
        limit = self.card.call.get("max_sequence_length")
        return limit is not None and len(self.pipe.tokenizer(caption)["input_ids"]) > limit

    @cached_property
    def negative(self) -> Conditions:
        """Of the negative prompt: the same for all clips, as it is made without a picture."""
        with self._encoding():
            text = self.backbone.encode_text(self.pipe, [base.negative_prompt(self.card.call)], self.card.call)
        return self._kept("negative", text)

    def _beside(self, x0_BCTHW: Tensor, first_BCHW: Tensor | None, caption: str) -> Conditions:
        with self._encoding():
            image = self.backbone.to_keep(self.backbone.encode_image(self.pipe, first_BCHW, self.card.call))
        x0 = _as("x0", x0_BCTHW, torch.float16)
        return {"x0": x0, **self._kept("image", image), **self._texts(caption, first_BCHW)}

    def _texts(self, caption: str, first_BCHW: Tensor | None) -> Conditions:
        with self._encoding():
            text = self.backbone.encode_text(self.pipe, [caption], self.card.call, first_BCHW)
        return self._kept("text", text)

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


@dataclass(frozen=True)
class _Described:
    """What is left of a network without its weights. No module: it would count as the pipeline's device."""

    config: Any
    dtype: torch.dtype


def _load(folder: Path, device: torch.device) -> Any:
    """The stock pipeline of a folder that was checked, with its networks as configurations alone: what encodes may look
    at these, and the weights of 14 B parameters would take the room of everything else."""
    index = DiffusionPipeline.load_config(folder)
    networks = {}
    for name in ("transformer", "transformer_2"):
        _, of_class = index.get(name) or (None, None)
        if of_class is not None:
            with torch.device("meta"):
                model = getattr(diffusers, of_class)
                networks[name] = model.from_config(model.load_config(folder, subfolder=name))
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **networks)
    for name, network in networks.items():
        setattr(pipe, name, _Described(network.config, network.dtype))
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False).to(device)
    return pipe


def _as(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU; what is not counted or masked, nor a single number, as this type."""
    if not value.is_floating_point() or value.ndim == 1:
        return value.cpu().contiguous()
    kept = value.to(dtype).cpu().contiguous()
    if not kept.isfinite().all():
        raise ConfigError(
            f"{name}: {value.abs().max().item():g} does not fit {str(dtype).removeprefix('torch.')}; "
            "of a text, give --set text_dtype=bfloat16"
        )
    return kept
