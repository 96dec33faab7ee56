"""HunyuanVideo image-to-video, the released one: the image's tokens replace those of the first latent frame.

`HunyuanVideoImageToVideoPipeline` with ``image_condition_type="token_replace"``; these tokens are told the noise level
0. The prompt is read together with the image (LLaVA). The negative prompt, which is the same for all clips, is read
with a black one. What is not here is as in `distill.backbones.hunyuan_t2v`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from distill.backbones import hunyuan_autoencoder, hunyuan_t2v
from distill.backbones.conditions import Conditions, Shapes, joined
from distill.backbones.wan_i2v import picture

TASKS = ("ti2v",)
GIVEN_FRAMES = 1
TEXT_SEES_IMAGE = True
EXPORT_AXES: Mapping[str, tuple[int, ...]] = dict.fromkeys(hunyuan_t2v.EXPORT_AXES, (0,))
"""Clips alone: where the given frame's tokens end is a number in the graph."""
EVERY_IMAGE_TOKEN, NEGATIVE_EVERY = 4, 2
"""One image token of so many goes before the prompt's, and before the negative prompt's, whatever the call asks."""
CUT_OUT = 4
"""Tokens of the template between prompt and answer, which the stock pipeline takes out of the prompt's."""
START = 0.999
"""Share of the noise in what the stock pipeline starts from; the rest is the image."""


def encode_text(pipe: Any, prompts: list[str], call: Mapping[str, Any], first_BCHW: Tensor | None = None) -> Conditions:
    """As of text-to-video, the image's tokens before the prompt's.

    Without images it is the text of negative prompts. Either is padded to the longer of the two.
    """
    return encoded_with(pipe, prompts, call, first_BCHW, EVERY_IMAGE_TOKEN)


def encoded_with(
    pipe: Any, prompts: list[str], call: Mapping[str, Any], first_BCHW: Tensor | None, every: int
) -> Conditions:
    """See ``encode_text``; of the image one token of ``every``."""
    asked = {name: call[name] for name in hunyuan_t2v.ENCODING if name in call}
    device = pipe.text_encoder.device
    if first_BCHW is None:
        black = Image.new("RGB", (call["width"], call["height"]))
        pictures, every_token = [black] * len(prompts), NEGATIVE_EVERY
    else:
        pictures = [picture(first_CHW) for first_CHW in first_BCHW]
        every_token = call.get("image_embed_interleave") or every
    parts = []
    # One by one: where a prompt is too long the stock pipeline copes with no other.
    for image, prompt in zip(pictures, prompts, strict=True):
        encoded = pipe.encode_prompt(
            image=image, prompt=[prompt], image_embed_interleave=every_token, device=device, **asked
        )
        parts.append(hunyuan_t2v.conditions(pipe, call, encoded))
    made = joined(parts)
    missing = _image_tokens(call, min(every, NEGATIVE_EVERY)) - _image_tokens(call, every_token)
    return {**made, "text": F.pad(made["text"], (0, 0, 0, missing)), "mask": F.pad(made["mask"], (0, missing))}


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """``first``; the text with the image's tokens before it."""
    channels, _, height, width = hunyuan_t2v.latent_shape(pipe, call)
    tokens = call["max_sequence_length"] - CUT_OUT + _image_tokens(call, NEGATIVE_EVERY)
    return {"first": (channels, 1, height, width)}, hunyuan_t2v.text_shapes(pipe, tokens)


def _image_tokens(call: Mapping[str, Any], every: int) -> int:
    count: int = call.get("prompt_template", {}).get("image_emb_len", 576)
    return -(-count // every)


def encode_image(pipe: Any, first_BCHW: Tensor | None, call: Mapping[str, Any]) -> Conditions:
    """``first``, the clean latent ``[B, C, 1, H, W]`` of the given image."""
    assert first_BCHW is not None
    return {"first": hunyuan_autoencoder.encode_video(pipe.vae, first_BCHW[:, :, None].to(pipe.vae.device))}


def image_of(x0_BCTHW: Tensor, kept: Conditions) -> Conditions:
    """What was kept: the first latent of a clip is another one (see `hunyuan_autoencoder`)."""
    return kept


def to_keep(image: Conditions) -> Conditions:
    """All of it."""
    return image


def with_given(x_BCTHW: Tensor, image: Conditions) -> Tensor:
    """The latents with the given first one in its place."""
    return torch.cat([image["first"].to(x_BCTHW), x_BCTHW[:, :, 1:]], dim=2)


def starting(noise_BCTHW: Tensor, image: Conditions) -> Tensor:
    """From noise with a little of the image in every frame."""
    return noise_BCTHW * START + image["first"].to(noise_BCTHW) * (1 - START)


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame; what stands at the first one has no meaning."""
    return hunyuan_t2v.predict_velocity(transformer, with_given(x_BCTHW, image), sigma_B, {}, text)
