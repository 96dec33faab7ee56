"""One row of the comparison: a method trained within a budget, its student in a folder of its own.

Rows that have stages I and II in common take them over from one folder, and every row is found again by the hash of
what its result depends on. A budget is in generator-update equivalents: one, the unit, is one update of the unpruned
DMD2 student with its critic's. It is counted from the teacher on, stages I and II included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distill import lineage, report, schedule, student
from distill.baselines import base, dmd2, euler, f3, fastlightgen, icmd, lcm, magic
from distill.baselines.base import Made, Passes, Start
from distill.config import (
    ConfigError,
    DistillConfig,
    F3Config,
    FitConfig,
    IcmdConfig,
    LcmConfig,
    MethodConfig,
)
from distill.loop import Run, remember, write_json
from distill.recipes import RECIPES
from distill.run import opened, prepare, write_student
from distill.stages import importance, pruning, watch
from distill.stages.given import Given

UNLIMITED = {name: (0.0, 1e9) for name in ("motion", "contrast", "saturation", "flicker")} | {"critic": 1e9}
"""No row is stopped early: every method has its whole budget."""

METHOD_VERSION = 1
"""Raise it when a loss, a stage or what a method does with its settings changes: rows are trained anew."""

SHORT_IMPORTANCE_CLIPS = 32
"""Of stage I where the schedule is short: of the recipe's it would use up the budget."""

LOOKED_AT = 4
"""Clips that are drawn at the end of a row's training, for a person: what it is worth is measured elsewhere."""


@dataclass(frozen=True)
class Method:
    """What a file of `distill.baselines` holds."""

    title: str
    settings: Callable[..., MethodConfig]
    train: Callable[[Run, Given, Start, MethodConfig], Made]
    passes: Callable[[MethodConfig, int], Passes]


METHODS = {
    "euler": Method("Euler", euler.settings, euler.train, euler.passes),
    "lcm": Method("LCM", lcm.settings, lcm.train, lcm.passes),
    "dmd2": Method("DMD2", dmd2.settings, dmd2.train, dmd2.passes),
    "magic": Method("MagicDistillation", magic.settings, magic.train, magic.passes),
    "icmd": Method("ICMD", icmd.settings, icmd.train, icmd.passes),
    "f3": Method("F3-Pruning", f3.settings, f3.train, f3.passes),
    "fastlightgen": Method("FastLightGen", fastlightgen.settings, fastlightgen.train, fastlightgen.passes),
}


# --- budgets --------------------------------------------------------------------------------------------------------


def unit_passes(recipe: DistillConfig, blocks: int) -> float:
    """Block passes of one unit of a budget."""
    return dmd2.passes(dmd2.settings(recipe), blocks).update


def spent_passes(config: MethodConfig, blocks: int) -> dict[str, float]:
    """Block passes of each part of a row, as configured."""
    recipe, own = config.recipe, METHODS[config.method].passes(config, blocks)
    spent: dict[str, float] = {config.method: own.before + own.update * (fit.steps if (fit := fit_of(config)) else 0)}
    if config.weights == "pruned":
        spent["importance"] = base.importance_passes(recipe.importance, blocks)
        spent["pruning"] = base.pruning_passes(recipe.pruning, recipe.importance.rho, blocks) * recipe.pruning.fit.steps
    return spent


def fit_of(config: MethodConfig) -> FitConfig | None:
    """How the method itself trains; None where it trains nothing."""
    if isinstance(config.own, (LcmConfig, IcmdConfig)):
        return config.own.fit
    return config.recipe.matching.fit if config.own is None else None


def within(config: MethodConfig, passes: float, pruning_share: float, blocks: int) -> MethodConfig:
    """The row with so many updates that it spends so many block passes, looked at only at its end.

    Args:
        pruning_share: of the passes that stages I and II have, where the row starts from their weights.

    Raises:
        ConfigError: stage I, which has no updates to be fewer, leaves nothing of the share.
    """
    recipe = config.recipe
    if config.weights == "pruned":
        first = base.importance_passes(recipe.importance, blocks)
        each = base.pruning_passes(recipe.pruning, recipe.importance.rho, blocks)
        steps = int((passes * pruning_share - first) / each)
        if steps < 1:
            raise ConfigError(
                f"stage I takes {first:.0f} block passes, of {passes * pruning_share:.0f} that it has together with "
                "stage II: raise the budget, or lower importance.clips"
            )
        passes -= first + steps * each
        recipe = _changed(recipe, "pruning", fit=_of_steps(recipe.pruning.fit, steps))
    fit = fit_of(config)
    if fit is not None:
        own = METHODS[config.method].passes(config, blocks)
        fit = _of_steps(fit, max(1, int((passes - own.before) / own.update)))
        if config.own is None:
            recipe = _changed(recipe, "matching", fit=fit)
    limits = recipe.matching.limits.model_copy(update=UNLIMITED)
    recipe = _changed(_changed(recipe, "matching", limits=limits), "pruning", drift_limit=1e9)
    recipe = recipe.model_copy(update={"watched": min(recipe.watched, LOOKED_AT)})
    own_settings = config.own.model_copy(update={"fit": fit}) if fit is not None and config.own else config.own
    return config.model_copy(update={"recipe": recipe, "own": own_settings})


def with_short_importance(recipe: DistillConfig) -> DistillConfig:
    """The recipe for a short schedule."""
    clips = min(recipe.importance.clips, SHORT_IMPORTANCE_CLIPS)
    return recipe.model_copy(update={"importance": recipe.importance.model_copy(update={"clips": clips})})


def _of_steps(fit: FitConfig, steps: int) -> FitConfig:
    # A longer warm-up than a tenth would be most of a short schedule.
    warmup = min(fit.warmup_steps, steps // 10)
    return fit.model_copy(update={"steps": steps, "warmup_steps": warmup, "sample_every": steps})


def _changed(recipe: DistillConfig, stage: Literal["pruning", "matching"], **values: Any) -> DistillConfig:
    return recipe.model_copy(update={stage: getattr(recipe, stage).model_copy(update=values)})


# --- a row's run ----------------------------------------------------------------------------------------------------


def row_sha256(config: MethodConfig, teacher_sha256: str) -> str:
    """Of everything that the row's student depends on, and nothing else."""
    recipe = config.recipe
    before = lineage.inputs(recipe, teacher_sha256)
    matching = recipe.matching.sha256 if config.own is None else config.own.sha256
    read = [
        METHOD_VERSION, config.method, config.weights, before["latents"], recipe.precision, recipe.shift,
        recipe.text_drop, recipe.student.sha256, recipe.watched, matching,
    ]  # fmt: skip
    if config.weights == "pruned":
        read.append(before["pruning"])
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def train(root: Path, config: MethodConfig) -> Path:
    """The row's folder within ``root``, its student trained, or what was left of that.

    Raises:
        ConfigError: the configuration cannot work.
        FolderError: the teacher's folder is broken.
        Interrupted: a signal came; the same call goes on.
    """
    recipe = config.recipe
    sha256 = student.read_card(Path(recipe.teacher)).sha256
    folder = root / "rows" / f"{config.method}-{row_sha256(config, sha256)[:16]}"
    if (folder / "row.json").exists():  # written last
        return folder
    begun = prepared(root, recipe, sha256, prune=config.weights == "pruned")
    with opened(folder, recipe, begun) as (run, given):
        torch.compiler.reset()  # what rows before this one compiled
        (folder / "method").mkdir(exist_ok=True)
        remember(folder / "method", config)
        start = _start(run, given, config)
        made = METHODS[config.method].train(run, given, start, config)
        settings = config.recipe.matching if config.own is None else config.own
        stage = {"name": config.method, "config_sha256": settings.sha256, "seed": recipe.seed}
        before = [{"name": name, "seed": recipe.seed} for name in ("importance", "pruning")]
        out = folder / "student"
        write_student(
            out, given, made.transformer, made.scheduler, made.pruned, made.call,
            [*(before if config.weights == "pruned" else []), stage], name=f"{recipe.name}-{config.method}",
        )  # fmt: skip
        blocks = len(given.backbone.blocks(given.teacher))
        row = {
            "passes": spent_passes(config, blocks),
            "train_s": {name: round(s, 1) for name, s in report.seconds_by_stage(folder).items()},
            "updates": fit.steps if (fit := fit_of(config)) else 0,
            "code": student.code_version(),
        }
        write_json(folder / "row.json", row)
        for leaf in (*lineage.LEAVES["latents"], *lineage.LEAVES["pruning"]):
            (folder / leaf).unlink(missing_ok=True)  # linked, and of no more use here
        run.check_stop()  # or a signal after the last look would be lost
    return folder


def prepared(root: Path, recipe: DistillConfig, teacher_sha256: str, prune: bool) -> Path:
    """The folder that rows take the latents over from, and stages I and II if ``prune``."""
    inputs = lineage.inputs(recipe, teacher_sha256)
    latents = root / "stages" / f"latents-v{METHOD_VERSION}-{inputs['latents'][:16]}"
    if not (latents / "done").exists():
        prepare(latents, _neutral(recipe, "latents"), None, prune=False)
        (latents / "done").touch()
    if not prune:
        return latents
    stages = root / "stages" / f"pruning-v{METHOD_VERSION}-{inputs['pruning'][:16]}"
    if not (stages / "done").exists():
        torch.compiler.reset()
        prepare(stages, _neutral(recipe, "pruning"), latents, prune=True)
        (stages / "done").touch()
    return stages


def _neutral(recipe: DistillConfig, name: str) -> DistillConfig:
    """The recipe with what shared stages do not read as it always is, so that whoever shares them can go on."""
    usual = RECIPES["shapes"]()
    parts: list[str] = ["matching", "student", "watched", "gate"]
    if name == "latents":
        parts += ["importance", "pruning", "text_drop", "shift"]
    return recipe.model_copy(update={"name": name, **{part: getattr(usual, part) for part in parts}})


def _start(run: Run, given: Given, config: MethodConfig) -> Start:
    recipe, few = config.recipe, config.recipe.student
    scheduler = schedule.few_step_scheduler(given.backbone, few)
    whole: Any = base.copy_of(given, given.teacher)
    pruned: list[int] = []
    if config.weights == "pruned":
        found = importance.run(run, given, recipe.importance, recipe.pruning.unimportant)
        whole, pruned = pruning.run(run, given, found, recipe.pruning), found.pruned
    # A method that keeps the teacher's steps is looked at in them.
    call = given.card.call if isinstance(config.own, (IcmdConfig, F3Config)) else None
    watched = watch.Watch(run, given, scheduler if call is None else given.pipe.scheduler, call)
    return Start(whole, tuple(pruned), scheduler, watched)
