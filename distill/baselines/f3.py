"""F3-Pruning (AAAI 2024, arXiv 2312.03459): what attends least across frames goes; nothing is trained.

    m_l = T / (T-1)  mean over clips, levels, heads, rows i of  sum_{j: frame(j) != frame(i)} A_ij

The paper ranks temporal-attention layers of models that have such. Ours: the port to attention over space and time at
once, by m_l. The lowest go: whole blocks (``block``: as many parameters as FastLightGen's student), their
self-attention (``sublayer``), or what crosses frames in it (``edges``: the same parameters, fewer products).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from distill import schedule
from distill.baselines.base import Made, Passes, Start, copy_of, in_the_teacher_s_steps
from distill.config import DistillConfig, F3Config, MethodConfig
from distill.loop import Run, write_json
from distill.stages.given import Given, noised
from distill.stages.importance import smallest_prefix

FOUND = "f3.json"


def settings(recipe: DistillConfig, weights: Literal["teacher", "pruned"] = "teacher") -> MethodConfig:
    """The defaults: blocks, as many as FastLightGen prunes."""
    own = F3Config(mode="block", rho=recipe.importance.rho, clips=16, sigmas=8, queries=64)
    return MethodConfig(method="f3", weights=weights, recipe=recipe, own=own)


def passes(config: MethodConfig, blocks: int) -> Passes:
    """The measuring alone."""
    assert isinstance(config.own, F3Config)
    return Passes(before=config.own.clips * config.own.sigmas * blocks, update=0)


@torch.no_grad()
def masses(run: Run, given: Given, transformer: Any, config: F3Config) -> list[float]:
    """m_l of each block, on held-out clips. 1 is attention that does not tell frames apart."""
    batch = given.batch(given.dev, given.held_out(config.clips, "clips"))
    frames = batch.x0_BCTHW.shape[2]
    position_S = (torch.arange(config.sigmas) + 0.5) / config.sigmas
    generator = run.generator("f3", 0)
    between = given.backbone.attention_between_frames(transformer, frames, config.queries, generator)
    with between as shares:
        for sigma in schedule.shift(position_S, given.config.shift).tolist():
            run.check_stop()
            sigma_B = torch.full((config.clips,), sigma, device=given.device)
            x_BCTHW = noised(batch.x0_BCTHW, batch.noise(generator), sigma_B)
            given.velocity(transformer, x_BCTHW, sigma_B, batch)
    return [sum(seen) / len(seen) * frames / (frames - 1) for _, seen in sorted(shares.items())]


def chosen(mass: list[float], parameters: list[int], config: F3Config) -> list[int]:
    """The blocks with the least, so many as the mode wants."""
    order = sorted(range(len(mass)), key=mass.__getitem__)
    if config.mode == "block":
        return sorted(smallest_prefix(order, parameters, config.rho))
    return sorted(order[: round(config.rho * len(mass))])


def train(run: Run, given: Given, start: Start, config: MethodConfig) -> Made:
    """Measure, choose and cut."""
    own, of = config.own, given.backbone
    assert isinstance(own, F3Config)
    transformer = copy_of(given, start.whole)
    parameters = [sum(p.numel() for p in block.parameters()) for block in of.blocks(transformer)]
    path = run.folder / FOUND
    if not path.exists():
        mass = masses(run, given, transformer, own)
        write_json(path, {"mode": own.mode, "mass": mass, "chosen": chosen(mass, parameters, own)})
    gone = json.loads(path.read_text())["chosen"]
    run.event("f3", 1, chosen=gone)
    if own.mode == "sublayer":
        of.silence_self_attention(transformer, gone)
    pruned = gone if own.mode == "block" else ()
    return in_the_teacher_s_steps(of.without_blocks(transformer, pruned), pruned, given)


@contextmanager
def as_pruned(
    given_backbone: Any, transformer: Any, run_folder: Path, num_frames: int, timed: bool = False
) -> Iterator[None]:
    """Within it a loaded student attends as its run's ``edges`` say, which no model folder can hold.

    Args:
        given_backbone: the module.
        transformer: the student's.
        run_folder: holds what was found.
        num_frames: of the latents.
        timed: leave out what ``sublayer`` silenced, too: it adds nothing, but would take its time.
    """
    path = run_folder / FOUND
    found = json.loads(path.read_text()) if path.exists() else {"mode": None, "chosen": []}
    limited = found["chosen"] if found["mode"] == "edges" else []
    left_out = found["chosen"] if timed and found["mode"] == "sublayer" else []
    with (
        given_backbone.within_frames(transformer, limited, num_frames),
        given_backbone.without_self_attention(transformer, left_out),
    ):
        yield
