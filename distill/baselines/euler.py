"""Euler: the teacher itself in few steps, with its guidance or without. The control: no distillation at all.

    x <- x + (S_{j+1} - S_j) v,   v = F(x,S_j,0) + g (F(x,S_j,c) - F(x,S_j,0)),   S_j = shift_k(1 - j/n)

Literature: Euler's method on the probability flow of rectified flow (Liu et al. 2022), guidance by Ho and Salimans
(2022). It visits the noise levels that the students of as many steps visit.
"""

from __future__ import annotations

from typing import Literal

from distill.baselines.base import Made, Passes, Start, copy_of
from distill.config import DistillConfig, EulerConfig, MethodConfig
from distill.loop import Run
from distill.stages.given import Given


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "teacher") -> MethodConfig:
    """Without guidance."""
    return MethodConfig(method="euler", weights=weights, recipe=recipe, own=EulerConfig(guidance_scale=1.0))


def passes(_config: MethodConfig, _blocks: int) -> Passes:
    """None: nothing is trained."""
    return Passes(before=0, update=0)


def train(_run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """The weights as they are."""
    assert isinstance(config.own, EulerConfig)
    student = given.backbone.without_blocks(copy_of(given, start.whole), start.pruned)
    steps = given.config.student.num_inference_steps
    call = given.backbone.calling(given.card.call, steps, config.own.guidance_scale)
    return Made(student, start.pruned, start.scheduler, call)
