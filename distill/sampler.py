"""Many clips at once through a stock pipeline's parts: the stock call takes one image at a time.

For the same noise it gives what the stock pipeline gives (tests/distill/test_teach.py, test_wan.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.backbones import conditions
from distill.backbones.base import Backbone, Call, negative_prompt
from distill.backbones.conditions import Conditions
from distill.backbones.usual import NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Given:
    """The conditions of some clips."""

    image: Conditions
    text: Conditions
    negative: Conditions | None
    """Text conditions of the negative prompt, for each clip; None where there is no guidance."""


def draw_noise(backbone: Backbone, pipe: Any, seeds: Sequence[int], call: Call) -> Tensor:
    """Starting noise ``[B, C, T, H, W]``, a clip for each seed: what the stock pipeline draws from that seed."""
    shape = backbone.latent_shape(pipe, call)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    backbone: Backbone,
    pipe: Any,
    first_BCHW: Tensor | None,
    prompts: Sequence[str],
    call: Call,
    noise_BCTHW: Tensor,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Videos ``[B, C, T, H, W]`` in [-1, 1], by the pipeline's scheduler, with guidance if ``call`` asks.

    Args:
        backbone: the pipeline's.
        pipe: a stock pipeline, of which the parts are used.
        first_BCHW: first frames in [-1, 1]; None for text-to-video.
        prompts: one for each of them.
        call: a model card's ``call``.
        noise_BCTHW: see ``draw_noise``.
        precision: of the transformer's matrix products; bfloat16 is three times as fast on a CPU that has it.
    """
    given = encode(backbone, pipe, first_BCHW, prompts, call)
    return backbone.decode_latents(pipe.vae, denoise(backbone, pipe, given, call, noise_BCTHW, precision))


@torch.no_grad()
def encode(backbone: Backbone, pipe: Any, first_BCHW: Tensor | None, prompts: Sequence[str], call: Call) -> Given:
    """The conditions of clips, with those of the negative prompt where ``call`` asks for guidance."""
    guided = backbone.guidance_at(backbone.network(pipe), call, 1.0) > 1
    unwanted = [negative_prompt(call)] * len(prompts)
    return Given(
        backbone.encode_image(pipe, first_BCHW, call),
        backbone.encode_text(pipe, list(prompts), call, first_BCHW),
        backbone.encode_text(pipe, unwanted, call) if guided else None,
    )


@torch.no_grad()
def denoise(
    backbone: Backbone, pipe: Any, given: Given, call: Call, noise_BCTHW: Tensor,
    precision: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Latents ``[B, C, T, H, W]`` from noise and ``encode``'s conditions."""
    network = backbone.network(pipe)
    device, count = network.device, len(noise_BCTHW)
    scheduler = copy.deepcopy(pipe.scheduler)  # some remember their last steps
    backbone.set_steps(scheduler, call["num_inference_steps"])
    image, text = given.image, given.text
    if given.negative is not None:
        text = conditions.joined([given.text, given.negative])
        image = conditions.joined([given.image, given.image])
    x_BCTHW = backbone.starting(noise_BCTHW.to(device), given.image)
    for timestep in scheduler.timesteps:
        sigma = timestep.item() / NUM_TRAIN_TIMESTEPS  # as the network is told it, which some schedulers round
        both_BCTHW = x_BCTHW if given.negative is None else torch.cat([x_BCTHW] * 2)
        sigma_B = torch.full((len(both_BCTHW),), sigma, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            predicted = backbone.predict_velocity(network, both_BCTHW, sigma_B, image, text).float()
        if given.negative is not None:
            with_text, without = predicted.split(count)
            predicted = without + backbone.guidance_at(network, call, sigma) * (with_text - without)
        x_BCTHW = scheduler.step(predicted, timestep, x_BCTHW, return_dict=False)[0]
    return backbone.with_given(x_BCTHW, given.image)
