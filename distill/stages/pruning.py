"""Stage II: weights that work at many depths, by dynamic probabilistic pruning (docs/method.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import distributed, losses
from distill.config import PruningConfig
from distill.loop import Run, fit
from distill.stages.given import Batch, Given, noised
from distill.stages.importance import Importance

LEFT = "pruning.safetensors"
"""What this stage leaves in the run's folder."""


def run(run: Run, given: Given, found: Importance, config: PruningConfig) -> Any:
    """Train the teacher's weights to do without the unimportant blocks; returns the transformer, of full depth.

    Of several processes it is returned without its weights: the next stage reads its parts of them from ``LEFT``.
    """
    if run.world.is_sharded and run.world.exists(run.folder / LEFT):
        return given.empty_teacher()
    transformer = given.teachers_copy()
    given.ready(run, transformer)
    if run.world.is_sharded:
        given.spread(transformer, distributed.Stored.of_model(given.folder))

    def loss(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows_B = given.train.rows(run, number, config.fit.batch)
        drop_B = torch.rand(len(rows_B), generator=generator) < given.config.text_drop
        batch = given.mine(given.train, rows_B, drop_B)
        sigma_B, noise = batch.share.rows(given.sigmas(batch.whole, generator)), batch.noise(generator)
        mask = draw_mask(found, config, generator)
        return depth_loss(given, transformer, batch, noise, sigma_B, mask, config), {"skipped": float(len(mask))}

    def sample(_path: Path) -> dict[str, float]:
        return drift(run, given, transformer, found.pruned)

    def alarm(values: dict[str, float]) -> str | None:
        drifted = values["drift_full"]
        return f"the full-depth path has drifted by {drifted:.3f}" if drifted > config.drift_limit else None

    fit(run, "pruning", transformer, loss, config.fit, sample, alarm=alarm)
    return given.empty_teacher() if run.world.is_sharded else transformer.eval().requires_grad_(False)


def depth_loss(
    given: Given, transformer: Any, batch: Batch, noise_BCTHW: Tensor, sigma_B: Tensor, mask: frozenset[int],
    config: PruningConfig,
) -> Tensor:  # fmt: skip
    """L_II of one batch and one mask. With an empty mask and the weights themselves as target it is 0."""
    x_BCTHW = noised(batch.x0_BCTHW, noise_BCTHW, sigma_B)
    with torch.no_grad():
        target = transformer if config.target == "self" else given.teacher
        unpruned = given.velocity(target, x_BCTHW, sigma_B, batch)
    with given.backbone.skipping(transformer, mask):
        pruned = given.velocity(transformer, x_BCTHW, sigma_B, batch)
    pruned, unpruned, x0, noise = batch.made(pruned, unpruned, batch.x0_BCTHW, noise_BCTHW)
    return losses.depth_matching(pruned, unpruned, x0, noise, config.alpha)


def draw_mask(found: Importance, config: PruningConfig, generator: torch.Generator) -> frozenset[int]:
    """M* with probability q, else each block of U by itself with probability p.

    It comes from the step's generator, which depends on the seed and the step alone: every process draws the same.
    """
    deployed = torch.rand((), generator=generator) < config.deployed_probability
    skipped = torch.rand(len(found.unimportant), generator=generator) < config.skip_probability
    if deployed:
        return frozenset(found.pruned)
    return frozenset(block for block, gone in zip(found.unimportant, skipped.tolist(), strict=True) if gone)


@torch.no_grad()
def drift(run: Run, given: Given, transformer: Any, pruned: list[int]) -> dict[str, float]:
    """On held-out clips: how far full and deployed depth are from the teacher's velocity, and from the data.

    ``drift_full`` and ``drift_pruned``: mean square of the difference over that of the teacher's velocity.
    """
    rows = torch.arange(len(given.dev))
    sigmas = given.sigmas(len(rows), run.generator("pruning/dev", 0))
    masks: dict[str, list[int] | None] = {"teacher": None, "full": [], "pruned": pruned}
    errors: dict[str, list[Tensor]] = {name: [] for name in masks}
    apart: dict[str, list[Tensor]] = {name: [] for name in masks}
    size: list[Tensor] = []
    for number, part, counts in run.world.dealt(rows.split(given.config.looked_at)):
        batch, sigma_B = given.batch(given.dev, part), sigmas[part]
        noise = batch.noise(run.generator("pruning/dev", 1 + number))
        x_BCTHW = noised(batch.x0_BCTHW, noise, sigma_B)
        (teachers,) = batch.made(given.velocity(given.teacher, x_BCTHW, sigma_B, batch))
        x0, noise = batch.made(batch.x0_BCTHW, noise)
        if counts:
            size.append(teachers.square().mean().cpu())
        for name, mask in masks.items():
            made = teachers
            if mask is not None:
                with given.backbone.skipping(transformer, mask):
                    (made,) = batch.made(given.velocity(transformer, x_BCTHW, sigma_B, batch))
            if counts:
                errors[name].append(losses.velocity_error(made, x0, noise).cpu())
                apart[name].append((made - teachers).square().mean().cpu())
    found = run.world.gathered((errors, apart, size))
    values = {f"dev_loss_{name}": torch.cat([e for of in found for e in of[0][name]]).mean().item() for name in masks}
    sizes = torch.stack([s for of in found for s in of[2]])
    for name in ("full", "pruned"):
        aparts = torch.stack([a for of in found for a in of[1][name]])
        values[f"drift_{name}"] = (aparts.mean() / sizes.mean()).item()
    return values
