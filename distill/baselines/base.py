"""What every method is given and gives back, and how its work is counted.

Work is counted in block passes: one block run forward on one clip is 1, the backward pass through it 2. Embeddings,
heads, the autoencoder and what is looked at on the way are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from distill.config import ImportanceConfig, MatchingConfig, MethodConfig, PruningConfig
from distill.stages.given import Given
from distill.stages.watch import Watch

TRAINED = 3
"""Passes of a block that is run forward and backward."""


@dataclass(frozen=True)
class Start:
    """What a student starts as: ``whole`` without the blocks ``pruned``."""

    whole: Any
    """Of full depth and frozen: a copy of the teacher's transformer, or stage II's."""
    pruned: tuple[int, ...]
    scheduler: Any
    """Of the student's few steps."""
    watched: Watch


@dataclass(frozen=True)
class Made:
    """A method's student."""

    transformer: Any
    pruned: tuple[int, ...]
    """The teacher's blocks that it does not have."""
    scheduler: Any
    call: dict[str, Any]
    """How it is called."""


@dataclass(frozen=True)
class Passes:
    """Block passes of a method."""

    before: float
    """Once, of what is neither of these."""
    update: float
    """For each update."""


def few_steps(transformer: Any, start: Start, given: Given) -> Made:
    """A student that is called in the few steps it was trained for, without guidance."""
    return Made(transformer, start.pruned, start.scheduler, given.few_steps_call)


def in_the_teacher_s_steps(transformer: Any, pruned: Collection[int], given: Given) -> Made:
    """A student that is called as its teacher is."""
    return Made(transformer, tuple(sorted(pruned)), given.pipe.scheduler, given.card.call)


def copy_of(given: Given, transformer: Any) -> Any:
    """A transformer of its own with the same weights, not compiled."""
    return given.backbone.without_blocks(transformer, ()).eval().requires_grad_(False)


def pruned_blocks(blocks: int, rho: float) -> int:
    """How many of so many equal blocks have to go for ``rho`` of their parameters."""
    return math.ceil(rho * blocks - 1e-9)


def importance_passes(config: ImportanceConfig, blocks: int) -> float:
    """Of stage I: the whole network and the one without each block; where it is greedy, again after each removal."""
    rounds = pruned_blocks(blocks, config.rho) if config.greedy else 0
    masks = [blocks, *[blocks - 1] * blocks]
    masks += [blocks - gone - 1 for gone in range(rounds) for _ in range(blocks - gone)]
    return config.clips * config.sigmas * config.noises * sum(masks)


def pruning_passes(config: PruningConfig, rho: float, blocks: int) -> float:
    """Of one update of stage II, on average over its masks."""
    gone = pruned_blocks(blocks, rho)
    skipped = config.skip_probability * max(round(config.unimportant * rho * blocks), gone)
    deployed = config.deployed_probability
    depth = blocks - deployed * gone - (1 - deployed) * skipped
    return (blocks + TRAINED * depth) * config.fit.batch * config.fit.accumulate


def matching_passes(config: MatchingConfig, steps: int, blocks: int, student: int, gap: bool) -> float:
    """Of one update of a student that matches distributions, with the critic's updates before it, on average.

    Args:
        steps: the student's; it stops after a random one of them.
        blocks: of the networks that score.
        student: its own blocks.
        gap: whether the pruned network is run for the intra term.
    """
    calls = 1.0 if config.rollout == "data" else (steps + 1) / 2
    critic = student if config.critic.pruned else blocks
    full = {"full": blocks, "teacher": blocks, "pruned": student, "interpolated": blocks + student}
    # All of the critic is run for the discriminator; the way back begins where it reads.
    read = critic if config.gan.tokens == "last" else critic // 2
    told_apart = critic + (TRAINED - 1) * read if config.gan.student_weight > 0 else 0
    scores = 2 * full[config.scores.source] + (student if gap else 0) + critic
    generator = (calls - 1 + TRAINED) * student + scores + told_apart
    follow = calls * student + TRAINED * critic + told_apart
    return (generator * config.fit.accumulate + follow * config.critic.updates) * config.fit.batch


def has_gap(config: MethodConfig) -> bool:
    """Whether the real score runs the pruned network too."""
    scores = config.recipe.matching.scores
    neutral = (1.0, 1.0) if scores.intra_mode == "interpolate" else (0.0, 0.0)
    return config.method == "fastlightgen" and config.weights == "pruned" and scores.beta_2 != neutral


def depth_of_student(config: MethodConfig, blocks: int) -> int:
    """Blocks of a student that starts as the configuration says."""
    return blocks - (pruned_blocks(blocks, config.recipe.importance.rho) if config.weights == "pruned" else 0)
