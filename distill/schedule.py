"""Noise levels: sigma in [0, 1], 1 is pure noise; x_sigma = (1 - sigma) x_0 + sigma noise (rectified flow)."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.backbones.base import Backbone
from distill.config import StudentConfig


def shift(sigma: Tensor, factor: float) -> Tensor:
    """Move noise levels in [0, 1] towards 1: k s / (1 + (k - 1) s) (Esser et al. 2024, equation 23). Any shape."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def sample_sigmas(count: int, factor: float, generator: torch.Generator) -> Tensor:
    """``[count]`` noise levels of the shifted uniform distribution, stratified: one in each of ``count`` equal parts.

    Stratification leaves each sample's distribution as it is and lowers the variance of the batch's mean loss.
    """
    position_B = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return shift(position_B / count, factor)


def visited(backbone: Backbone, scheduler: Any, num_inference_steps: int) -> tuple[float, ...]:
    """Noise levels that a stock scheduler visits in so many steps, the final 0 left out; sets it to them."""
    backbone.set_steps(scheduler, num_inference_steps)
    return tuple(round(sigma, 6) for sigma in scheduler.sigmas[:-1].tolist())


def few_step_scheduler(backbone: Backbone, few: StudentConfig) -> FlowMatchEulerDiscreteScheduler:
    """The student's scheduler, set to its steps: Euler, the last noise level before 0 is ``shift_terminal``.

    The Wan pipelines take no list of noise levels, so the schedule has to live in the scheduler that is saved. Four
    steps of (2.5, .625) visit 1, .937, .833, .625: the levels that 1000/750/500/250 have under shift 5.
    """
    # The one step of a single one is both the first level and the last.
    terminal = few.shift_terminal if few.num_inference_steps > 1 else None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=few.shift, shift_terminal=terminal)
    backbone.set_steps(scheduler, few.num_inference_steps)
    return scheduler


def started_at(scheduler: Any, first: int, end: int | None = None) -> Any:
    """A copy of a stock scheduler that makes only some of the steps that it is set to: from ``first`` (0 is the first
    of all) up to ``end``, which is not made. The noise levels of those are the same numbers as in the whole.

    It is set to the number of all its steps, as ever, so a stock pipeline that is given noisy latents of level
    ``first`` goes on from there, and one that is made to stop early has latents of level 0 all the same.
    """
    partial = copy.deepcopy(scheduler)
    whole = partial.set_timesteps

    @wraps(whole)  # with its signature, which the Hunyuan pipelines look at
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        partial.timesteps = partial.timesteps[first:end]
        partial.sigmas = torch.cat([partial.sigmas[:-1][first:end], partial.sigmas[-1:]])

    partial.set_timesteps = set_timesteps
    return partial
