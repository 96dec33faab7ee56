"""ICMD / VDMini (arXiv 2411.18375): fewer blocks, as many steps. Features follow the teacher's, and look like them.

    L = |F_S(x_s) - (e - x_0)|^2 + w_f sum_{l kept} |h_l^S - h_l^T|^2 / |h_l^T|^2 + w_a mean softplus(-D(h_last^S, s))
    D: mean max(0, 1 - D(h^T, s)) + max(0, 1 + D(h^S, s)),   a spatial and a temporal head

Secondary: the three terms, w_f = .1, w_a = 1, the two heads, that shallow blocks go first. Ours: the port to a
transformer (the residual stream after each kept block, the norm by the teacher's, what "shallow first" takes).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from distill import losses
from distill.baselines.base import TRAINED, Made, Passes, Start, in_the_teacher_s_steps, pruned_blocks
from distill.config import ConfigError, DistillConfig, IcmdConfig, MethodConfig, OptimiserConfig
from distill.loop import Rival, Run, compile_blocks, fit
from distill.stages import heads
from distill.stages.given import Batch, Given, noised
from distill.stages.importance import smallest_prefix


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "teacher") -> MethodConfig:
    """The defaults: as many parameters as FastLightGen's student has, the optimiser of the recipe's stage II."""
    batch = recipe.matching.fit.batch
    own = IcmdConfig(
        rho=recipe.importance.rho,
        feature_weight=0.1,
        adversarial_weight=1.0,
        head=OptimiserConfig(
            optimiser="adamw", learning_rate=3e-4, warmup_steps=10, betas=(0.0, 0.99), weight_decay=0.0, clip_norm=1.0,
            ema_decay=0.0,
        ),
        fit=recipe.pruning.fit.model_copy(update={"batch": batch}),
    )  # fmt: skip
    return MethodConfig(method="icmd", weights=weights, recipe=recipe, own=own)


def passes(config: MethodConfig, blocks: int) -> Passes:
    """The teacher's and the student's for its loss, both again for the discriminator's."""
    own = config.own
    assert isinstance(own, IcmdConfig)
    student = blocks - pruned_blocks(blocks, own.rho)
    told_apart = blocks + student if own.adversarial_weight > 0 else 0
    clips = own.fit.batch
    return Passes(before=0, update=(blocks + TRAINED * student) * clips * own.fit.accumulate + told_apart * clips)


def shallow_first(parameters: list[int], rho: float) -> list[int]:
    """Which blocks go: from the third on every other one, then those between, until the budget is met; never the last.

    Raises:
        ConfigError: the budget wants more than that.
    """
    last = len(parameters) - 1
    order = [*range(2, last, 2), *range(3, last, 2)]
    gone = smallest_prefix(order, parameters, rho)
    if not gone:
        raise ConfigError(f"rho={rho} wants more than {len(order)} of {len(parameters)} blocks; lower it")
    return sorted(gone)


def train(run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """Train a teacher without some of its blocks to pass through the same states."""
    own, of = config.own, given.backbone
    assert isinstance(own, IcmdConfig)
    if len(of.groups(given.teacher)) > 1:
        raise ConfigError("ICMD compares the states of one network; the teacher is of two experts")
    torch.manual_seed(run.seed)  # of the discriminator's new weights
    parameters = [sum(p.numel() for p in block.parameters()) for block in of.blocks(given.teacher)]
    pruned = shallow_first(parameters, own.rho)
    student = of.without_blocks(start.whole, pruned).train().requires_grad_(True)
    head = heads.SpaceTimeHead(of.width(student)).to(given.device)
    if given.config.compile:
        compile_blocks(run, of.blocks(student))
    sides = Sides(given, student, pruned)

    def batch_of(number: int, generator: torch.Generator) -> tuple[Batch, Tensor, Tensor]:
        rows_B = given.train.rows(run, number, own.fit.batch)
        drop_B = torch.rand(len(rows_B), generator=generator) < given.config.text_drop
        batch = given.batch(given.train, rows_B, drop_B)
        return batch, given.sigmas(len(rows_B), generator), batch.noise(generator)

    def loss(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch, sigma_B, noise = batch_of(number, generator)
        x_BCTHW = noised(batch.x0_BCTHW, noise, sigma_B)
        velocity, made = sides.student(x_BCTHW, sigma_B, batch)
        task = losses.flow_matching(*batch.made(velocity, batch.x0_BCTHW, noise))
        apart = content(made, sides.teacher(x_BCTHW, sigma_B, batch), of.GIVEN_FRAMES)
        value = task + own.feature_weight * apart
        values = {"task": task.item(), "features": apart.item()}
        if own.adversarial_weight > 0:
            deceived = losses.deceive(head(made[-1], sigma_B))
            value = value + own.adversarial_weight * deceived
            values["deceive"] = deceived.item()
        return value, values

    def head_loss(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch, sigma_B, noise = batch_of(number, generator)
        x_BCTHW = noised(batch.x0_BCTHW, noise, sigma_B)
        with torch.no_grad():
            made = sides.student(x_BCTHW, sigma_B, batch)[1]
            wanted = sides.teacher(x_BCTHW, sigma_B, batch)
        return losses.hinge(head(wanted[-1], sigma_B), head(made[-1], sigma_B)), {}

    rivals = [Rival("head", head, head_loss, own.head, 1)] if own.adversarial_weight > 0 else []
    fit(run, "icmd", student, loss, own.fit, lambda path: start.watched.look(student, path), rivals=rivals)
    return in_the_teacher_s_steps(student.eval().requires_grad_(False), pruned, given)


class Sides:
    """Residual streams after the blocks that both networks have, ``[B, T, N, D]`` each."""

    def __init__(self, given: Given, student: Any, pruned: list[int]) -> None:
        self._given = given
        self._student = student
        self._kept = [i for i in range(len(given.backbone.blocks(given.teacher))) if i not in pruned]

    def student(self, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Its velocity too."""
        return self._run(self._student, list(range(len(self._kept))), x_BCTHW, sigma_B, batch)

    @torch.no_grad()
    def teacher(self, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch) -> list[Tensor]:
        """After its blocks of the same places."""
        return self._run(self._given.teacher, self._kept, x_BCTHW, sigma_B, batch)[1]

    def _run(
        self, transformer: Any, places: list[int], x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        with self._given.backbone.tokens_after(transformer, places) as seen:
            velocity = self._given.velocity(transformer, x_BCTHW, sigma_B, batch)
        return velocity, [tokens_BND.unflatten(1, (x_BCTHW.shape[2], -1)) for tokens_BND in seen]


def content(made: list[Tensor], wanted: list[Tensor], given_frames: int) -> Tensor:
    """The feature term: the sum over the kept blocks, of the frames that are not given."""
    pairs = ([tokens_BTND[:, given_frames:] for tokens_BTND in pair] for pair in zip(made, wanted, strict=True))
    return torch.stack([losses.feature_distance(*pair) for pair in pairs]).sum()
