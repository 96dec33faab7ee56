"""Stage I: how much each block matters, as the drop of the ELBO when it alone is skipped (docs/method.md).

One denoising step is enough for an estimate: Tweedie's formula turns a velocity into a clean estimate, and the bound is
an integral of its weighted error over the noise levels. Every mask sees the same clips, levels and noise (common random
numbers), so differences are measured far better than the errors themselves.

Shape suffixes: M mask, K clip, S noise level and draw.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import losses, report, schedule
from distill.config import ConfigError, ImportanceConfig
from distill.loop import Run, write_json
from distill.stages.given import Given, noised

WEIGHTINGS = ("elbo", "uniform_v", "x0")


@dataclass(frozen=True)
class Importance:
    """What stage I found, as `importance.json` holds it."""

    weighting: str
    drop: list[float]
    """Of the weighted error when this block is skipped: I_l = D({l}) - D({})."""
    standard_error: list[float]
    """Of each drop, over clips."""
    error: float
    """D({}), of the whole network."""
    order: list[int]
    """Blocks by importance, the least first."""
    pruned: list[int]
    """M*: the shortest prefix of ``order`` that holds rho of all block parameters; of each expert's where there are
    two."""
    unimportant: list[int]
    """U: what stage II may skip; contains M*."""
    block_parameters: list[int]
    block_ratio: float
    """Block parameters that are left over all block parameters."""
    ratio: float
    """The same of the whole transformer, embeddings and head included."""
    rank_correlation: dict[str, float]
    """Spearman's, of this weighting's drops and each other's."""


def run(run: Run, given: Given, config: ImportanceConfig, unimportant: float) -> Importance:
    """Measure, choose, and write `importance.json` and `importance.png`; read them where they are there already.

    Raises:
        ConfigError: the budget leaves no block, or wants more than there are.
    """
    path = run.folder / "importance.json"
    if run.world.exists(path):
        return Importance(**json.loads(path.read_text()))
    transformer = given.teacher
    count = len(given.backbone.blocks(transformer))
    errors_MKS, sigma_S = _errors(run, given, config, [(), *((block,) for block in range(count))])
    drops = {name: _drops(errors_MKS, sigma_S, given.config.shift, name) for name in WEIGHTINGS}
    drop_KM = drops[config.weighting]
    drop_M = drop_KM.mean(0)
    parameters = [sum(p.numel() for p in block.parameters()) for block in given.backbone.blocks(transformer)]
    groups = given.backbone.groups(transformer)
    order = drop_M.argsort().tolist()
    if config.greedy:
        order = _greedy_order(run, given, config, order, parameters, groups)
    pruned: list[int] = []
    skippable: list[int] = []
    for group in groups:
        within = [block for block in order if block in group]
        gone_here = smallest_prefix(within, _of_group(parameters, group), config.rho)
        size = max(round(unimportant * config.rho * len(group)), len(gone_here))
        if not gone_here or size >= len(group):
            raise ConfigError(
                f"importance.rho={config.rho} with pruning.unimportant={unimportant} lets stage II skip {size} of "
                f"{len(group)} blocks; at least one has to stay: lower one of them"
            )
        pruned += gone_here
        skippable += within[:size]
    whole = sum(p.numel() for p in transformer.parameters())
    gone = sum(parameters[block] for block in pruned)
    found = Importance(
        weighting=config.weighting,
        drop=drop_M.tolist(),
        standard_error=(drop_KM.std(0) / len(drop_KM) ** 0.5).tolist(),
        error=_weighted(errors_MKS, sigma_S, given.config.shift, config.weighting)[0].mean().item(),
        order=order,
        pruned=sorted(pruned),
        unimportant=sorted(skippable),
        block_parameters=parameters,
        block_ratio=1 - gone / sum(parameters),
        ratio=1 - gone / whole,
        rank_correlation={name: rank_correlation(drop_M, other.mean(0)) for name, other in drops.items()},
    )
    with run.world.first_alone():
        if run.world.is_first:
            plot(run.folder / "importance.png", found)
            write_json(path, asdict(found))
    run.event("importance", 1, error=found.error, pruned=found.pruned, ratio=found.ratio)
    run.say(f"importance: blocks {found.pruned} go, {found.ratio:.1%} of the transformer's parameters stay")
    return found


@torch.no_grad()
def _errors(run: Run, given: Given, config: ImportanceConfig, masks: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Mean square velocity errors ``[M, K, S]`` of the masks, and the noise levels ``[S]``, on held-out clips."""
    clips = config.clips
    position_S = (torch.arange(config.sigmas) + 0.5) / config.sigmas
    sigma_S = schedule.shift(position_S, given.config.shift).clamp(config.sigma_min, config.sigma_max)
    sigma_S = sigma_S.repeat(config.noises)
    errors_MKS = torch.zeros(len(masks), clips, len(sigma_S))
    pieces = given.held_out(clips, "importance.clips").split(given.config.looked_at)
    for _, rows, counts in run.world.dealt(pieces):
        first = int(rows[0])
        batch = given.batch(given.dev, rows)
        for level, sigma in enumerate(sigma_S.tolist()):
            run.check_stop()
            noise = batch.noise(run.generator("importance", first * len(sigma_S) + level))
            sigma_B = torch.full((len(rows),), sigma, device=given.device)
            x_BCTHW = noised(batch.x0_BCTHW, noise, sigma_B)
            for number, mask in enumerate(masks):
                with given.backbone.skipping(given.teacher, mask):
                    velocity = given.velocity(given.teacher, x_BCTHW, sigma_B, batch)
                if counts:
                    errors_MKS[number, rows, level] = losses.velocity_error(
                        *batch.made(velocity, batch.x0_BCTHW, noise)
                    ).cpu()
        run.event("importance", 0, clips=first + len(rows), masks=len(masks))
    return torch.stack(run.world.gathered(errors_MKS)).sum(0), sigma_S


def _weighted(errors_MKS: Tensor, sigma_S: Tensor, shift: float, weighting: Any) -> Tensor:
    """``[M, K]``: each clip's estimate of D(M), the mean over noise levels."""
    return (errors_MKS * losses.error_weight(sigma_S, shift, weighting)).mean(-1)


def _drops(errors_MKS: Tensor, sigma_S: Tensor, shift: float, weighting: Any) -> Tensor:
    """``[K, M - 1]``: D({l}) - D({}), clip by clip; the first mask is the empty one."""
    weighted_MK = _weighted(errors_MKS, sigma_S, shift, weighting)
    return (weighted_MK[1:] - weighted_MK[0]).T


def _greedy_order(
    run: Run, given: Given, config: ImportanceConfig, order: list[int], parameters: list[int], groups: list[range]
) -> list[int]:
    """Remove the block whose removal costs least, given those removed before, until the budget is met."""
    gone: list[int] = []

    def unmet(group: range) -> bool:
        within = [block for block in gone if block in group]
        return not smallest_prefix(within, _of_group(parameters, group), config.rho)

    while wanting := [group for group in groups if unmet(group)]:
        left = [block for block in order if block not in gone and any(block in group for group in wanting)]
        errors_MKS, sigma_S = _errors(run, given, config, [(*gone, block) for block in left])
        costs_M = _weighted(errors_MKS, sigma_S, given.config.shift, config.weighting).mean(-1)
        gone.append(left[int(costs_M.argmin())])
    return gone + [block for block in order if block not in gone]


def _of_group(parameters: list[int], group: range) -> list[int]:
    return [count if block in group else 0 for block, count in enumerate(parameters)]


def smallest_prefix(order: list[int], parameters: list[int], rho: float) -> list[int]:
    """The shortest beginning of ``order`` that holds at least ``rho`` of all parameters; empty where none does."""
    held = 0
    for number, block in enumerate(order):
        held += parameters[block]
        # A third of a billion parameters is not a matter of the last bit.
        if held >= rho * sum(parameters) * (1 - 1e-9):
            return order[: number + 1]
    return []


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: of the places that two lists give the same things."""
    places = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(places)[0, 1].item()


def plot(path: Path, found: Importance) -> None:
    """Bars of the drops with their standard errors, what goes and what may be skipped in colours of their own."""
    kinds = ["goes" if i in found.pruned else "may be skipped" if i in found.unimportant else "stays"
             for i in range(len(found.drop))]  # fmt: skip
    report.columns(
        path, found.drop, found.standard_error, kinds, f"drop of the ELBO without the block ({found.weighting})"
    )
