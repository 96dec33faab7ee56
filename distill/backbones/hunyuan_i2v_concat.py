"""HunyuanVideo image-to-video of 33 channels: the image's latent stands beside the noisy ones.

`HunyuanVideoImageToVideoPipeline` with ``image_condition_type="latent_concat"``: in further channels the transformer
sees the latent of the image, then zeros, and a mask. All frames are made, the first one too, and the stock pipeline
drops the first latent frame when all are decoded: a call for n frames gives n - 4. What is not here is as in
`distill.backbones.hunyuan_i2v`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.backbones import hunyuan_autoencoder, hunyuan_i2v, hunyuan_t2v
from distill.backbones.conditions import Conditions

GIVEN_FRAMES = 0
EXPORT_AXES = hunyuan_t2v.EXPORT_AXES
EVERY_IMAGE_TOKEN = 2
DROPPED = 4
"""Video frames at the start."""


def encode_text(pipe: Any, prompts: list[str], call: Mapping[str, Any], first_BCHW: Tensor | None = None) -> Conditions:
    """See `hunyuan_i2v.encode_text`."""
    return hunyuan_i2v.encoded_with(pipe, prompts, call, first_BCHW, EVERY_IMAGE_TOKEN)


def with_given(x_BCTHW: Tensor, image: Conditions) -> Tensor:
    """As they are."""
    return x_BCTHW


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame."""
    return hunyuan_t2v.predict_velocity(transformer, beside(x_BCTHW, image), sigma_B, {}, text)


def beside(x_BCTHW: Tensor, image: Conditions) -> Tensor:
    """Noisy latents, those of the image and a mask."""
    batch, _, frames, height, width = x_BCTHW.shape
    first_BC1HW = image["first"].to(x_BCTHW)
    image_BCTHW = torch.cat([first_BC1HW, torch.zeros_like(x_BCTHW[:, :, 1:])], dim=2)
    mask_B1THW = x_BCTHW.new_zeros(batch, 1, frames, height, width)
    mask_B1THW[:, :, 0] = 1
    return torch.cat([x_BCTHW, image_BCTHW, mask_B1THW], dim=1)


def frames_of(call: Mapping[str, Any]) -> int:
    """Without the first ones."""
    return int(call["num_frames"]) - DROPPED


def latents_to_decode(given_BCTHW: Tensor, stepped_BCTHW: Tensor) -> Tensor:
    """What the last step gave: what the stock call gives has lost the first one, which the others are decoded after."""
    return stepped_BCTHW


# --- the autoencoder --------------------------------------------------------------------------------------------------


def decode_latents(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Video in [-1, 1] from all normalised latents, without its first frames."""
    return hunyuan_autoencoder.decode_latents(vae, latents_BCTHW)[:, :, DROPPED:]


def decode_in_pieces(vae: Any, latents_BCTHW: Tensor) -> Iterator[Tensor]:
    """The same video, each piece as soon as it is decoded."""
    pieces = hunyuan_autoencoder.decode_in_pieces(vae, latents_BCTHW)
    yield next(pieces)[:, :, DROPPED:]
    yield from pieces


class WholeDecoder(hunyuan_autoencoder.WholeDecoder):
    """The same video in one call: one graph for an engine."""

    def forward(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Video in [-1, 1] from all normalised latents ``[B, C, T, H, W]``, in a tuple."""
        return (super().forward(latents, return_dict)[0][:, :, DROPPED:],)
