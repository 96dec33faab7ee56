"""Many clips at once through a stock pipeline's parts: the stock call takes one image at a time.

For the same noise it gives what the stock pipeline gives (tests/distill/test_teach.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.backbones import wan


def noise_like_stock(count: int, first_BC1HW: Tensor, num_frames: int, seed: int) -> Tensor:
    """Starting noise ``[count, C, T, H, W]`` of latents for videos of ``num_frames`` (4 n + 1) frames."""
    _, channels, _, height, width = first_BC1HW.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, 1 + (num_frames - 1) // 4, height, width, generator=generator)


@torch.no_grad()
def sample(pipe: Any, first_BCHW: Tensor, prompts: list[str], call: dict[str, Any], seed: int) -> Tensor:
    """Videos ``[B, C, T, H, W]`` in [-1, 1]: deterministic Euler steps, with classifier-free guidance if ``call`` asks.

    Args:
        pipe: a `WanImageToVideoPipeline` (its vae, tokenizer, text_encoder, transformer and scheduler are used).
        first_BCHW: first frames in [-1, 1].
        prompts: one for each of them.
        call: a model card's ``call``: num_inference_steps, guidance_scale, num_frames, max_sequence_length.
        seed: of the noise.
    """
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    first_BC1HW = wan.encode_video(pipe.vae, first_BCHW[:, :, None])
    length = call["max_sequence_length"]
    text_BLD = wan.encode_text(pipe.tokenizer, pipe.text_encoder, prompts, length)
    empty_BLD = wan.encode_text(pipe.tokenizer, pipe.text_encoder, [""] * len(prompts), length)
    scale = call["guidance_scale"]
    x_BCTHW = noise_like_stock(len(prompts), first_BC1HW, call["num_frames"], seed)
    for sigma, after in pairwise(pipe.scheduler.sigmas):
        sigma_B = sigma.expand(len(prompts))
        velocity = wan.predict_velocity(pipe.transformer, x_BCTHW, sigma_B, first_BC1HW, text_BLD)
        if scale > 1:
            without = wan.predict_velocity(pipe.transformer, x_BCTHW, sigma_B, first_BC1HW, empty_BLD)
            velocity = without + scale * (velocity - without)
        x_BCTHW = x_BCTHW + (after - sigma) * velocity
    return wan.decode_latents(pipe.vae, torch.cat([first_BC1HW, x_BCTHW[:, :, 1:]], dim=2))
