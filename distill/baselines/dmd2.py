"""DMD2 (Yin et al. 2024, arXiv 2405.14867): distribution matching with the plain guided teacher and a discriminator.

    R = A + beta_1 (A - N)                             A, N: the teacher with and without the caption; beta_1 is fixed
    g = (X_fake - R) / mean |y - R|,   dL/dy = g / numel + w_s d/dy mean softplus(-D(y_s))
    L_fake = |F_phi(y_s) - (e - y)|^2 + w_c mean [softplus(-D(x_s)) + softplus(D(y_s))]

Stage III with nothing pruned and beta_2 = 0: a full copy of the teacher as the critic, backward simulation, the
discriminator on the critic's features. Weights 5e-3 and 1e-2 as in DMD2's code.
"""

from __future__ import annotations

from typing import Literal

from distill.baselines.base import Made, Passes, Start, copy_of, depth_of_student, few_steps, matching_passes
from distill.config import DistillConfig, GanConfig, MethodConfig
from distill.loop import Run
from distill.stages import matching
from distill.stages.given import Given


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "teacher") -> MethodConfig:
    """The defaults, on the recipe's optimisers; a full critic has the student's learning rate, as in DMD2's code."""
    low, high = recipe.matching.scores.beta_1
    fixed = (low + high) / 2
    scores = recipe.matching.scores.model_copy(
        update={"source": "full", "beta_1": (fixed, fixed), "beta_2": (0.0, 0.0), "alpha_weak": 0.0}
    ).model_copy(update={"intra_mode": "extrapolate"})
    critic = recipe.matching.critic.model_copy(
        update={"kind": "full", "learning_rate": recipe.matching.fit.learning_rate}
    )
    changed = recipe.matching.model_copy(
        update={
            "scores": scores,
            "critic": critic,
            "gan": GanConfig(student_weight=5e-3, critic_weight=1e-2),
            "rollout": "renoise",
        }
    )
    return MethodConfig(method="dmd2", weights=weights, recipe=recipe.model_copy(update={"matching": changed}))


def passes(config: MethodConfig, blocks: int) -> Passes:
    """See ``base.matching_passes``."""
    recipe = config.recipe
    steps, student = recipe.student.num_inference_steps, depth_of_student(config, blocks)
    return Passes(before=0, update=matching_passes(recipe.matching, steps, blocks, student, gap=False))


def train(run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """Both scores come from the teacher's weights, whatever the student starts as."""
    student = given.backbone.without_blocks(start.whole, start.pruned)
    transformer = matching.run(
        run, given, (), copy_of(given, given.teacher), config.recipe.matching, start.scheduler, start.watched, student
    )
    return few_steps(transformer, start, given)
