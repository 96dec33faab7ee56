"""Wan image-to-video with the image beside the latents: Wan2.1-I2V, and Wan2.2-I2V-A14B of two experts.

`WanImageToVideoPipeline(expand_timesteps=False)`: the transformer sees the noisy latents, and in further channels a
mask and the latents of a clip that is the given image and then grey. Wan2.1's also attends to CLIP's tokens of the
image. All frames are made, the first one too. What is not here is as in
`distill.backbones.wan` and `usual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from distill.backbones import wan
from distill.backbones.conditions import Conditions, Shapes
from distill.backbones.wan_t2v import called

TASKS: tuple[str, ...] = ("ti2v",)
EXPORT_AXES: Mapping[str, tuple[int, ...]] = {**wan.EXPORT_AXES, "timestep": (0,), "encoder_hidden_states_image": (0,)}


def encode_image(pipe: Any, first_BCHW: Tensor | None, call: Mapping[str, Any]) -> Conditions:
    """``beside``, mask and latents ``[B, 4 + C, T, H, W]``; and ``clip``, CLIP's last tokens but one, where the
    transformer attends to them."""
    assert first_BCHW is not None
    first_BCHW = first_BCHW.to(pipe.vae.device)
    grey_BCTHW = first_BCHW[:, :, None].new_zeros(*first_BCHW.shape[:2], call["num_frames"] - 1, *first_BCHW.shape[2:])
    latents_BCTHW = wan.encode_video(pipe.vae, torch.cat([first_BCHW[:, :, None], grey_BCTHW], dim=2))
    per_latent = pipe.vae_scale_factor_temporal  # the mask has a channel for each video frame of a latent one
    mask_BCTHW = latents_BCTHW.new_zeros(len(latents_BCTHW), per_latent, *latents_BCTHW.shape[2:])
    mask_BCTHW[:, :, 0] = 1
    image = {"beside": torch.cat([mask_BCTHW, latents_BCTHW], dim=1)}
    if pipe.transformer.config.image_dim is not None:
        image["clip"] = pipe.encode_image([picture(first_CHW) for first_CHW in first_BCHW], pipe.image_encoder.device)
    return image


def picture(first_CHW: Tensor) -> Image.Image:
    """A frame in [-1, 1] as what a pipeline takes."""
    levels_HWC = ((first_CHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(levels_HWC.cpu().numpy())


def image_of(x0_BCTHW: Tensor, kept: Conditions) -> Conditions:
    """What was kept: it cannot be had from the latents."""
    return kept


def to_keep(image: Conditions) -> Conditions:
    """All of it."""
    return image


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """``beside``, and ``clip`` where the transformer attends to it; ``text``."""
    channels, *rest = wan.latent_shape(pipe, call)
    image: Shapes = {"beside": (pipe.vae_scale_factor_temporal + channels, *rest)}
    if pipe.transformer.config.image_dim is not None:
        seen = pipe.image_encoder.config
        image["clip"] = ((seen.image_size // seen.patch_size) ** 2 + 1, seen.hidden_size)
    return image, wan.text_shapes(pipe, call)


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame; of two experts each clip's is by the one that its noise level belongs to."""
    inputs = {"encoder_hidden_states": text["text"]}
    if "clip" in image:
        inputs["encoder_hidden_states_image"] = image["clip"]
    return called(transformer, torch.cat([x_BCTHW, image["beside"]], dim=1), sigma_B, inputs)
