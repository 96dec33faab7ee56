"""FastLightGen (arXiv 2603.01685): stage III with the well-guided teacher on stage II's weights (docs/method.md).

    R = A + beta_1 (A - N) + beta_2 (A - P),   beta_1 ~ U[a_1, b_1],   beta_2 ~ U[a_2, b_2]

On the teacher's weights nothing is pruned, so the intra term is gone: what is left is the recipe's stage III alone.
"""

from __future__ import annotations

from typing import Literal

from distill.baselines.base import Made, Passes, Start, depth_of_student, few_steps, has_gap, matching_passes
from distill.config import DistillConfig, MethodConfig
from distill.loop import Run
from distill.stages import matching
from distill.stages.given import Given


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "pruned") -> MethodConfig:
    """The recipe as it is."""
    return MethodConfig(method="fastlightgen", weights=weights, recipe=recipe)


def passes(config: MethodConfig, blocks: int) -> Passes:
    """See ``base.matching_passes``."""
    recipe = config.recipe
    steps, student = recipe.student.num_inference_steps, depth_of_student(config, blocks)
    return Passes(before=0, update=matching_passes(recipe.matching, steps, blocks, student, has_gap(config)))


def train(run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """Stage III."""
    transformer = matching.run(
        run, given, start.pruned, start.whole, config.recipe.matching, start.scheduler, start.watched
    )
    return few_steps(transformer, start, given)
