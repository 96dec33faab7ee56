"""MagicDistillation / W2SVD (arXiv 2503.13319): the critic is a LoRA, and the real score holds a weak share of it.

    Q = X(F_{psi + phi}(y_s, s, c)),   A, N = X(F_{psi + alpha_weak sg phi}(y_s, s, .)),   psi: the teacher
    R = A + beta_1 (A - N)             alpha_weak = .25
    g = (Q - R) / mean |y - R|  [+ w_r (Q - x_0) / mean |y - x_0|]

Noised real latents instead of backward simulation, and a discriminator on the tokens at half the depth, as a figure of
W2SVD draws it. w_r = 0: its authors' own ablation has most motion without. The discriminator's weights are not
published; they are DMD2's.
"""

from __future__ import annotations

from typing import Literal

from distill.baselines import dmd2
from distill.baselines.base import Made, Passes, Start
from distill.config import DistillConfig, MethodConfig
from distill.loop import Run
from distill.stages.given import Given


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "teacher") -> MethodConfig:
    """The defaults: DMD2's, with the recipe's LoRA."""
    of = dmd2.settings(recipe, weights).recipe.matching
    changed = of.model_copy(
        update={
            "scores": of.scores.model_copy(update={"alpha_weak": 0.25}),
            "critic": recipe.matching.critic.model_copy(update={"kind": "lora"}),
            "gan": of.gan.model_copy(update={"tokens": "middle"}),
            "rollout": "data",
        }
    )
    return MethodConfig(method="magic", weights=weights, recipe=recipe.model_copy(update={"matching": changed}))


def passes(config: MethodConfig, blocks: int) -> Passes:
    """As DMD2's."""
    return dmd2.passes(config, blocks)


def train(run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """The teacher's weights with the LoRA switched by its scale: one copy is both scores."""
    return dmd2.train(run, given, start, config)
