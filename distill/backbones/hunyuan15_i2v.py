"""HunyuanVideo 1.5 image-to-video: `HunyuanVideo15ImageToVideoPipeline`.

The image's latent stands beside those of the first frame, and SigLIP's tokens of it beside the text. All frames are
made, the first one too. What is not here is as in `distill.backbones.hunyuan15_t2v`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.backbones import hunyuan15_autoencoder, hunyuan15_t2v, hunyuan_i2v_concat, hunyuan_t2v
from distill.backbones.conditions import Conditions, Shapes
from distill.backbones.wan_i2v import picture

TASKS = ("ti2v",)
_FROM_THE_IMAGE = ("height", "width")


def arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Without the size, which the pipeline has from the image, and what it cannot be asked for."""
    return {name: value for name, value in hunyuan15_t2v.arguments(call).items() if name not in _FROM_THE_IMAGE}


def encode_image(pipe: Any, first_BCHW: Tensor | None, call: Mapping[str, Any]) -> Conditions:
    """``first``, the clean latent ``[B, C, 1, H, W]`` of the given image, and ``embeds``, SigLIP's tokens of it."""
    assert first_BCHW is not None
    encoder, dtype = pipe.image_encoder, pipe.transformer.dtype
    embeds = [
        pipe.encode_image(picture(first_CHW), batch_size=1, device=encoder.device, dtype=dtype)
        for first_CHW in first_BCHW
    ]
    first_BC1HW = hunyuan15_autoencoder.encode_video(pipe.vae, first_BCHW[:, :, None].to(pipe.vae.device))
    return {"first": first_BC1HW, "embeds": torch.cat(embeds)}


def image_of(x0_BCTHW: Tensor, kept: Conditions) -> Conditions:
    """The latent is that of the first frame; the rest was kept."""
    return {"first": x0_BCTHW[:, :, :1], **kept}


def to_keep(image: Conditions) -> Conditions:
    """SigLIP's tokens."""
    return {"embeds": image["embeds"]}


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """``first`` and ``embeds``; the text."""
    channels, _, height, width = hunyuan_t2v.latent_shape(pipe, call)
    seen = pipe.image_encoder.config
    embeds = ((seen.image_size // seen.patch_size) ** 2, seen.hidden_size)
    return {"first": (channels, 1, height, width), "embeds": embeds}, hunyuan15_t2v.condition_shapes(pipe, call)[1]


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame."""
    input_BCTHW = hunyuan_i2v_concat.beside(x_BCTHW, image)
    return hunyuan15_t2v.called(transformer, input_BCTHW, sigma_B, image["embeds"], text)
