"""Many clips at once through a stock pipeline's parts: the stock call takes one image at a time.

For the same noise it gives what the stock pipeline gives (tests/distill/test_teach.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.backbones import wan


def draw_noise(pipe: Any, seeds: Sequence[int], call: dict[str, Any]) -> Tensor:
    """Starting noise ``[B, C, T, H, W]``, a clip for each seed: what the stock pipeline draws from that seed."""
    shape = (
        pipe.transformer.config.in_channels,
        1 + (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal,
        call["height"] // pipe.vae_scale_factor_spatial,
        call["width"] // pipe.vae_scale_factor_spatial,
    )
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    pipe: Any,
    first_BCHW: Tensor,
    prompts: Sequence[str],
    call: dict[str, Any],
    noise_BCTHW: Tensor,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Videos ``[B, C, T, H, W]`` in [-1, 1]: deterministic Euler steps, with classifier-free guidance if ``call`` asks.

    Args:
        pipe: a `WanImageToVideoPipeline` (its vae, tokenizer, text_encoder, transformer and scheduler are used).
        first_BCHW: first frames in [-1, 1].
        prompts: one for each of them.
        call: a model card's ``call``: num_inference_steps, guidance_scale, num_frames, max_sequence_length.
        noise_BCTHW: see ``draw_noise``.
        precision: of the transformer's matrix products; bfloat16 is three times as fast on a CPU that has it.
    """
    first_BC1HW, text_BLD = encode(pipe, first_BCHW, prompts, call)
    x_BCTHW = denoise(pipe, first_BC1HW, text_BLD, call, noise_BCTHW, precision)
    return wan.decode_latents(pipe.vae, x_BCTHW)


@torch.no_grad()
def encode(pipe: Any, first_BCHW: Tensor, prompts: Sequence[str], call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The conditions: latents ``[B, C, 1, H, W]`` of the first frames, and embeddings of the prompts.

    Where ``call`` asks for guidance the embeddings of as many empty prompts follow.
    """
    first_BC1HW = wan.encode_video(pipe.vae, first_BCHW[:, :, None].to(pipe.transformer.device))
    texts = [*prompts, *([""] * len(prompts) if call["guidance_scale"] > 1 else [])]
    return first_BC1HW, wan.encode_text(pipe.tokenizer, pipe.text_encoder, texts, call["max_sequence_length"])


@torch.no_grad()
def denoise(
    pipe: Any, first_BC1HW: Tensor, text_BLD: Tensor, call: dict[str, Any], noise_BCTHW: Tensor,
    precision: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Latents ``[B, C, T, H, W]`` from noise and ``encode``'s conditions."""
    device, scale = pipe.transformer.device, call["guidance_scale"]
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    guided = scale > 1
    firsts = torch.cat([first_BC1HW] * 2) if guided else first_BC1HW
    x_BCTHW = noise_BCTHW.to(device)
    for sigma, after in pairwise(pipe.scheduler.sigmas.tolist()):
        both = torch.cat([x_BCTHW] * 2) if guided else x_BCTHW
        sigma_B = torch.full((len(both),), sigma, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            predicted = wan.predict_velocity(pipe.transformer, both, sigma_B, firsts, text_BLD).float()
        if guided:
            with_text, without = predicted.chunk(2)
            predicted = without + scale * (with_text - without)
        x_BCTHW = x_BCTHW + (after - sigma) * predicted
    return torch.cat([first_BC1HW, x_BCTHW[:, :, 1:]], dim=2)
