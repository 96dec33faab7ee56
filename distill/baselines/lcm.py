"""LCM: consistency distillation of the teacher's guided path (Luo et al. 2023, arXiv 2310.04378), for flow matching.

    f(x_s, s) = x_s - s F_theta(x_s, s, c)                                       f(x, 0) = x without further ado
    n ~ {1..N},  s = S_n,  s' = S_{n-1},  S_n = shift_k(n / N)
    x' = x_s + (s' - s) v,   v = F_T(x_s,s,0) + w (F_T(x_s,s,c) - F_T(x_s,s,0))
    L  = mean sqrt(d^2 + c^2) - c,   d = f_theta(x_s, s) - sg f_ema(x', s')

Map, solver and loss as open code for video models has them (FastVideo, DCM); w is fixed. N = 50, c = .001, EMA .95.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from distill import losses, schedule
from distill.baselines.base import TRAINED, Made, Passes, Start, depth_of_student, few_steps
from distill.config import DistillConfig, LcmConfig, MethodConfig
from distill.loop import Run, compile_blocks, fit
from distill.stages.given import Batch, Given, noised


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "teacher") -> MethodConfig:
    """The defaults: the optimiser of the recipe's stage III with LCM's averaging, guidance as the teacher's."""
    scores = recipe.matching.scores
    # Below 1 nothing is left that the solver's step could be guided by.
    guidance = max(sum(scores.beta_1) / 2 + (1 if scores.cfg_unit == "extra" else 0), 1.0)
    fit = recipe.matching.fit.model_copy(update={"ema_decay": 0.95, "betas": (0.9, 0.99)})
    own = LcmConfig(solver_steps=50, guidance_scale=guidance, huber=0.001, fit=fit)
    return MethodConfig(method="lcm", weights=weights, recipe=recipe, own=own)


def passes(config: MethodConfig, blocks: int) -> Passes:
    """One or two of the teacher, one of the target, and the student's."""
    assert isinstance(config.own, LcmConfig)
    student = depth_of_student(config, blocks)
    teacher = blocks * (2 if config.own.guidance_scale > 1 else 1)
    clips = config.own.fit.batch * config.own.fit.accumulate
    return Passes(before=0, update=(teacher + student + TRAINED * student) * clips)


def train(run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """Train the student to say the same at neighbouring points of the teacher's path."""
    own = config.own
    assert isinstance(own, LcmConfig)
    student = given.backbone.without_blocks(start.whole, start.pruned).train().requires_grad_(True)
    target = copy.deepcopy(student).requires_grad_(False)
    if given.config.compile:
        for transformer in (student, target):
            compile_blocks(run, given.backbone.blocks(transformer))

    def loss(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = given.batch(given.train, given.train.rows(run, number, own.fit.batch))
        place_B = torch.randint(1, own.solver_steps + 1, (len(batch),), generator=generator)
        return consistency(given, student, target, batch, batch.noise(generator), place_B, own), {}

    fit(run, "lcm", student, loss, own.fit, lambda path: start.watched.look(student, path), shadow=target)
    return few_steps(student.eval().requires_grad_(False), start, given)


def consistency(
    given: Given, student: Any, target: Any, batch: Batch, noise_BCTHW: Tensor, place_B: Tensor, config: LcmConfig
) -> Tensor:
    """The loss at the points ``place_B`` of the solver's path, 1 to N; on the exact path of one clip it is 0."""
    levels = schedule.shift(torch.arange(config.solver_steps + 1) / config.solver_steps, given.config.shift)
    sigma_B, after_B = (levels[places].to(noise_BCTHW.device) for places in (place_B, place_B - 1))
    x_BCTHW = noised(batch.x0_BCTHW, noise_BCTHW, sigma_B)
    with torch.no_grad():
        velocity = given.velocity(given.teacher, x_BCTHW, sigma_B, batch)
        if config.guidance_scale > 1:
            uncond = given.velocity(given.teacher, x_BCTHW, sigma_B, batch, batch.empty)
            velocity = losses.guided(velocity, uncond, None, sigma_B.new_full((1,), config.guidance_scale - 1), sigma_B)
        after_BCTHW = x_BCTHW + losses.over_clips(after_B - sigma_B) * velocity
        wanted = losses.clean(after_BCTHW, after_B, given.velocity(target, after_BCTHW, after_B, batch))
    made = losses.clean(x_BCTHW, sigma_B, given.velocity(student, x_BCTHW, sigma_B, batch))
    (apart,) = batch.made(made - wanted)
    return losses.pseudo_huber(apart, config.huber)
