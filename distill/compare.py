"""`python -m distill compare RECIPE FOLDER`: every method on the same teacher, data, noise and budget, in one report.

Rows in three groups: `methods` (each of them, on the teacher's weights and on stage II's pruned ones), `grid` (steps by
pruning) and `ablations` (alpha, beta_1, beta_2); the last two are FastLightGen on a short schedule. Each row is trained
(`distill.method`) and measured (`distill.scores`) in an order of value, the report is written whenever the work stops,
and the same command goes on.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import evaluate, method, metrics, report, scores, student, tune
from distill.backbones import base as backbones
from distill.config import CompareConfig, ConfigError, DistillConfig, EulerConfig, F3Config, MethodConfig, override
from distill.evaluate import Interval
from distill.loop import Diverged, Run, remember, training_device, write_json
from distill.recipes import few_steps
from distill.scores import Asked, Scored

STEPS = (1, 2, 3, 4, 8)
RHOS = (0.0, 0.3, 0.5)
ALPHAS = (0.0, 0.5, 0.7, 1.0)
BETA_1S = (0.0, 0.5, 1.0, 2.0, 3.5)
BETA_2S = (0.0, 0.25, 0.5, 0.75)
LIGHTER = (0.1, 3)
"""Another split of nearly the same work, 27 block evaluations of ten blocks for 28: one block less, in three steps."""
OURS = "FastLightGen"
TEACHER = "teacher"
_OF_STAGE_TWO = "recipe.pruning."
SHOWN = ("trajectory_error_px", "dynamic_degree", "flicker", "explained_psnr_db", "i2v_fidelity")
REPORTED_WANX = {
    "Euler teacher": (50, 0.982, 0.461, 0.653, 0.711, 0.790, 885.0),
    "DMD2": (4, 0.977, 0.160, 0.583, 0.683, 0.716, 35.4),
    "LCM": (4, 0.979, 0.003, 0.570, 0.665, 0.684, 35.4),
    "MagicDistillation": (4, 0.980, 0.561, 0.634, 0.701, 0.798, 35.4),
    "FastLightGen": (4, 0.983, 0.500, 0.656, 0.717, 0.794, 28.3),
}
"""Steps, motion smoothness, dynamic degree, aesthetic and imaging quality, average, seconds: by secondary notes."""


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    group: str
    config: MethodConfig | None
    """None: the teacher as its card says."""

    def of_seed(self, seed: int) -> MethodConfig:
        """As it is trained with this of its seeds, counted from the recipe's own."""
        assert self.config is not None
        recipe = self.config.recipe.model_copy(update={"seed": (self.config.recipe.seed + seed) % 2**32})
        return self.config.model_copy(update={"recipe": recipe})

    @property
    def trained(self) -> bool:
        """Whether the seed of the training matters to it."""
        return self.config is not None and not (self.config.method in ("euler", "f3") and self._of_the_teacher)

    @property
    def _of_the_teacher(self) -> bool:
        return self.config is not None and self.config.weights == "teacher"


@dataclass(frozen=True)
class Done:
    """A row with what was measured of it, over all its training seeds."""

    row: Row
    cards: list[student.Card]
    scored: list[Scored]
    seeds: list[int]
    """Of the training, one for each of these."""
    spent: list[dict[str, Any]]
    """`row.json` of each."""
    blocks: int
    """Of the teacher."""
    attention_share: float
    """Of a block's parameters."""

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """``[training seeds, noise seeds, clips]`` of each metric."""
        return {name: np.stack([s.values[name] for s in self.scored]) for name in self.scored[0].values}

    @property
    def depth(self) -> float:
        """Blocks that one evaluation runs; a block without its self-attention counts as what is left of it."""
        kept = self.cards[0].blocks.kept if self.cards[0].blocks else range(self.blocks)
        own = self.row.config.own if self.row.config else None
        silenced = round(own.rho * self.blocks) if isinstance(own, F3Config) and own.mode == "sublayer" else 0
        return len(kept) - silenced * self.attention_share

    @property
    def block_evaluations(self) -> float:
        """Blocks run for one clip: steps, twice with guidance, times depth."""
        call = self.cards[0].call
        return call["num_inference_steps"] * (2 if call["guidance_scale"] > 1 else 1) * self.depth

    @property
    def passes(self) -> float:
        """Block passes that one training took, stages I and II included; none of the teacher."""
        return sum(self.spent[0].get("passes", {}).values())

    def interval(self, name: str, part: str = "all", minus: Done | None = None) -> Interval:
        """Of a metric, or of its paired difference to another row's; NaN where they have no training seed in common."""
        values = self.values[name]
        if minus is not None:
            values, other = self._paired(name, minus)
            if not len(values):
                return float("nan"), float("nan"), float("nan")
            values = values - other
        closed = self.scored[0].closed
        return evaluate.interval(values if part == "all" else values[..., closed if part == "closed" else ~closed])

    def _paired(self, name: str, other: Done) -> tuple[np.ndarray, np.ndarray]:
        """Values of both for the training seeds that both have; what is not trained has the same for every seed."""
        mine, theirs = self.values[name], other.values[name]
        if not (self.row.trained and other.row.trained):
            return tuple(np.broadcast_arrays(mine, theirs))  # type: ignore[return-value]
        common = [seed for seed in self.seeds if seed in other.seeds]
        return mine[[self.seeds.index(s) for s in common]], theirs[[other.seeds.index(s) for s in common]]

    @property
    def diversity(self) -> Interval:
        """Over all pairs; NaN where it was not measured."""
        if not self.scored[0].diversity.size:
            return float("nan"), float("nan"), float("nan")
        return evaluate.interval(np.stack([s.diversity for s in self.scored]))


def compare(folder: Path, recipe: DistillConfig, config: CompareConfig, say: Callable[[str], None]) -> Path:
    """Train, measure and report what is not there yet; returns the report.

    Raises:
        ConfigError: a setting that cannot work, or another comparison was begun in the folder.
        FolderError: the teacher's folder is broken.
        Interrupted: a signal came; the report is of what was done until then, and the same call goes on.
    """
    blocks, share = _of_teacher(Path(recipe.teacher))
    rows = [row for row in plan(recipe, config, blocks) if not config.rows or row.name in config.rows]
    unknown = set(config.rows) - {row.name for row in rows}
    if unknown:
        known = ", ".join(row.name for row in plan(recipe, config, blocks))
        raise ConfigError(f"--rows: there is no {', '.join(sorted(unknown))}; there are: {known}")
    run = Run(folder, recipe.seed)
    done: dict[str, Done] = {}
    failed: dict[str, list[str]] = {}
    with run.handling_signals():
        remember(folder, recipe)
        try:
            for row, seed in _order(rows, config.seeds):
                say(f"{row.name}, training seed {seed}")
                run.check_stop()
                try:
                    trained = None if row.config is None else method.train(folder, row.of_seed(seed))
                except (FloatingPointError, Diverged) as error:
                    # What that method does with these settings; others go on.
                    failed.setdefault(row.name, []).append(f"seed {seed}: {error}")
                    say(f"{row.name}: {error}")
                    continue
                model = Path(recipe.teacher) if trained is None else trained / "student"
                scored = scores.measure(model, folder / "scores", asked_of(row, config), run.check_stop)
                spent = {} if trained is None else json.loads((trained / "row.json").read_text())
                before = done.get(row.name)
                done[row.name] = Done(
                    row,
                    [*(before.cards if before else []), student.read_card(model)],
                    [*(before.scored if before else []), scored],
                    [*(before.seeds if before else []), seed],
                    [*(before.spent if before else []), spent],
                    blocks,
                    share,
                )
                say(f"{row.name}: score {scored.values['score'].mean():.3f}")
        finally:
            if done:
                write_report(folder, recipe, config, [done[row.name] for row in rows if row.name in done], failed)
    return folder / "report.md"


def _of_teacher(folder: Path) -> tuple[int, float]:
    """How many blocks the teacher has, and the share of self-attention in one."""
    card = student.read_card(folder)
    evaluate.check_world(card)
    backbone = backbones.load(card.backbone, card.task)
    transformer = student.load_pipeline(folder, "cpu").transformer
    return len(backbone.blocks(transformer)), backbone.self_attention_share(transformer)


def asked_of(row: Row, config: CompareConfig) -> Asked:
    """What is measured of a row: all of it of the methods, fewer clips and no diversity of the others."""
    if row.group == "methods":
        sizes = (config.clips, config.noise_seeds, config.diversity_pairs)
    else:
        sizes = (config.short_clips, 1, 0)
    return Asked("test", *sizes, config.diversity_samples, config.precision)


def _order(rows: list[Row], seeds: int) -> Iterator[tuple[Row, int]]:
    """Every row with one training seed before any with the next."""
    for seed in range(seeds):
        for row in rows:
            if seed == 0 or (row.trained and row.group == "methods"):
                yield row, seed


# --- rows -----------------------------------------------------------------------------------------------------------


def plan(recipe: DistillConfig, config: CompareConfig, blocks: int) -> list[Row]:
    """All rows of the groups, in the order of their value."""
    groups = {"methods": _methods, "grid": _grid, "ablations": _ablations}
    return [row for name in config.groups for row in groups[name](recipe, config, blocks)]


def _methods(recipe: DistillConfig, config: CompareConfig, blocks: int) -> list[Row]:
    guidance = float(student.read_card(Path(recipe.teacher)).call["guidance_scale"])
    passes = config.budget * method.unit_passes(recipe, blocks)
    # All that start from stage II's weights start from the same ones.
    shared = [choice for choice in config.choices.get("fastlightgen", ()) if choice.startswith(_OF_STAGE_TWO)]
    recipe = override(recipe, [choice.removeprefix("recipe.") for choice in shared])

    def row(name: str, of: MethodConfig) -> Row:
        of = override(of, list(config.choices.get(of.method, ())))
        return Row(name, "methods", method.within(of, passes, config.pruning_share, blocks))

    def euler(name: str, steps: int, scale: float, weights: str = "teacher") -> Row:
        few = recipe.model_copy(update={"student": few_steps(steps, recipe.shift)})
        of = method.METHODS["euler"].settings(few, weights)
        return row(name, of.model_copy(update={"own": EulerConfig(guidance_scale=scale)}))

    def named(name: str, weights: str) -> MethodConfig:
        return method.METHODS[name].settings(recipe, weights)

    def lighter(name: str) -> Row:
        of = method.METHODS[name]
        return row(f"{of.title}, {cell_name(*LIGHTER)}", of.settings(_shaped(recipe, *LIGHTER), "pruned"))

    def f3_of(mode: str) -> MethodConfig:
        of = named("f3", "teacher")
        assert of.own is not None
        return of.model_copy(update={"own": of.own.model_copy(update={"mode": mode})})

    return [
        Row(TEACHER, "methods", None),
        row(OURS, named("fastlightgen", "pruned")),
        euler("Euler 4, guided", 4, guidance),
        row("DMD2, pruned", named("dmd2", "pruned")),
        row("MagicDistillation", named("magic", "teacher")),
        row("DMD2", named("dmd2", "teacher")),
        lighter("fastlightgen"),
        lighter("dmd2"),
        row("LCM", named("lcm", "teacher")),
        row("LCM, pruned", named("lcm", "pruned")),
        row("MagicDistillation, pruned", named("magic", "pruned")),
        euler("Euler 4", 4, 1.0),
        euler("stage II, Euler 4", 4, 1.0, "pruned"),
        *(euler(f"Euler {steps}", steps, 1.0) for steps in (1, 2, 8)),
        *(euler(f"Euler {steps}, guided", steps, guidance) for steps in (1, 2, 8)),
        row("ICMD", named("icmd", "teacher")),
        row("F3-Pruning", f3_of("block")),
        row("F3-Pruning, self-attention", f3_of("sublayer")),
        row("F3-Pruning, edges", f3_of("edges")),
    ]


def short(
    recipe: DistillConfig, config: CompareConfig, blocks: int, unit: float, weights: str = "pruned"
) -> MethodConfig:
    """FastLightGen on the short schedule; ``unit`` in block passes."""
    of = method.METHODS["fastlightgen"].settings(method.with_short_importance(recipe), weights)
    return method.within(of, unit * config.budget * config.short_share, config.pruning_share, blocks)


def _grid(recipe: DistillConfig, config: CompareConfig, blocks: int) -> list[Row]:
    unit, rows = method.unit_passes(recipe, blocks), []
    for rho in RHOS:
        for steps in STEPS if config.tier != "quick" else STEPS[:1]:
            of = short(_shaped(recipe, rho, steps), config, blocks, unit, "pruned" if rho else "teacher")
            rows.append(Row(cell_name(rho, steps), "grid", of))
    # Outwards from what is deployed.
    return sorted(rows, key=lambda row: "30 %" not in row.name) if config.tier != "quick" else rows[:1]


def _shaped(recipe: DistillConfig, rho: float, steps: int) -> DistillConfig:
    """For a student with so much pruned and so many steps."""
    if rho:
        # At half of the blocks U would be all of them.
        unimportant = min(recipe.pruning.unimportant, 0.9 / rho)
        recipe = override(recipe, [f"importance.rho={rho}", f"pruning.unimportant={unimportant}"])
    return recipe.model_copy(update={"student": few_steps(steps, recipe.shift)})


def cell_name(rho: float, steps: int) -> str:
    """As a row says it."""
    return f"{steps} {'step' if steps == 1 else 'steps'}, {rho:.0%} pruned".replace("%", " %")


def _ablations(recipe: DistillConfig, config: CompareConfig, blocks: int) -> list[Row]:
    changes = {
        **{f"beta_2 = {beta:g}": [f"matching.scores.beta_2=[{beta}, {beta}]"] for beta in BETA_2S},
        **{f"beta_1 = {beta:g}": [f"matching.scores.beta_1=[{beta}, {beta}]"] for beta in BETA_1S},
        **{f"alpha = {alpha:g}": [f"pruning.alpha={alpha}"] for alpha in ALPHAS},
    }
    if config.tier == "quick":
        changes = dict(list(changes.items())[1:2])
    unit = method.unit_passes(recipe, blocks)
    return [
        Row(name, "ablations", short(override(recipe, values), config, blocks, unit))
        for name, values in changes.items()
    ]


# --- the report -----------------------------------------------------------------------------------------------------


def write_report(
    folder: Path, recipe: DistillConfig, config: CompareConfig, done: list[Done], failed: dict[str, list[str]]
) -> None:
    """`report.md`, `report.json`, `cost.png` and `sheet.png` of the rows that there are."""
    by_name = {d.row.name: d for d in done}
    methods = [d for d in done if d.row.group == "methods"]
    unit = method.unit_passes(recipe, done[0].blocks)
    if methods:
        points = {d.row.name: (d.block_evaluations, d.interval("score")) for d in methods}
        report.scatter(folder / "cost.png", points, "block evaluations of one clip", "score")
        videos = {"drawn": scores.drawn(asked_of(methods[0].row, config))}
        report.side_by_side(folder / "sheet.png", videos | {d.row.name: d.scored[0].shown_BCTHW for d in methods})
    write_json(folder / "report.json", _as_json(recipe, config, done, failed))
    sections = [
        _head(recipe, config, methods or done),
        _settings(config),
        _versions(done),
        [*(f"- {name} ended early, {'; '.join(why)}" for name, why in failed.items()), ""] if failed else [],
        _method_tables(methods, by_name.get(OURS), unit),
        _grid_table([d for d in done if d.row.group == "grid"], unit),
        _ablation_table([d for d in done if d.row.group == "ablations"]),
    ]
    report.write(folder / "report.md", "\n".join(line for section in sections for line in section) + "\n")


def _head(recipe: DistillConfig, config: CompareConfig, done: list[Done]) -> list[str]:
    unit = method.unit_passes(recipe, done[0].blocks)
    tiers = {
        "quick": "Quick tier: whether all of it runs. The figures mean nothing",
        "cpu": "CPU tier: a short training",
        "gpu": "GPU tier",
    }
    seeds = max(len(d.scored) for d in done)
    first = done[0].scored[0]
    return [
        "# Every method on the same work",
        "",
        f"{tiers[config.tier]}. Teacher {recipe.teacher.rstrip('/').rpartition('/')[2]}; budget of each trained method "
        f"{config.budget:g} generator-update equivalents, from the teacher on, stages I and II included. One of them, "
        f"a unit, is what one update of the unpruned DMD2 student with its critic's {recipe.matching.critic.updates} "
        f"costs: {unit:.0f} block passes "
        f"(forward 1, backward 2; batch {recipe.matching.fit.batch}). {seeds} training "
        f"{'seed' if seeds == 1 else 'seeds'}.",
        "",
        f"Test split, {first.values['score'].shape[1]} clips, half of them with closed captions, "
        f"{first.values['score'].shape[0]} seeds of noise, the same for every row; 95 % intervals by paired bootstrap "
        f"over seeds and clips. Nothing was stopped early and nothing chosen on the test split. torch "
        f"{torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), on {training_device().type}.",
        "",
    ]


def _settings(config: CompareConfig) -> list[str]:
    """Which methods were tuned, with how much."""
    if not config.choices:
        return ["Every method has its defaults; none was tuned.", ""]
    lines = []
    for name in tune.SPACES:
        how = "defaults, not tuned"
        if name in config.choices:
            trials, budget = config.searches[name]
            how = (
                f"tuned on dev ({trials} trials, the last rung of {budget:g} units): {', '.join(config.choices[name])}"
            )
        lines.append(f"- {method.METHODS[name].title}: {how}")
    if config.choices.keys() != tune.SPACES.keys() or len(set(config.searches.values())) > 1:
        lines.append("- **The methods were not tuned alike**: a difference may be the search's.")
    return [*lines, ""]


def _versions(done: list[Done]) -> list[str]:
    """What to know where rows were trained by other code than others."""
    made: dict[str, list[str]] = {}
    for d in done:
        for spent in d.spent:
            if "code" in spent:
                names = made.setdefault(" ".join(spent["code"].values()), [])
                names.extend([d.row.name] if d.row.name not in names else [])
    if len(made) < 2:
        return []
    lines = [f"- Trained by {code}: {', '.join(names)}" for code, names in made.items()]
    return ["Not all rows were trained by the same version of the code.", "", *lines, ""]


def _method_tables(methods: list[Done], ours: Done | None, unit: float) -> list[str]:
    if not methods:
        return []
    lines = [
        "## Methods",
        "",
        "Score minus FastLightGen's, over the training seeds that both have: level where the interval holds 0. Seeds: "
        "of the training. Seconds are of one clip by itself.",
        "",
        "| | steps | guided | blocks | parameters, M | block evaluations | updates | units | seeds "
        "| score | minus FastLightGen | diversity | encode, s | denoise, s | decode, s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---|---|---|---:|---:|---:|",
    ]
    for d in methods:
        card, spent = d.cards[0], d.spent[0]
        seconds = [np.mean([s.seconds[phase] for s in d.scored]) for phase in scores.PHASES]
        cells = [
            str(card.call["num_inference_steps"]),
            "yes" if card.call["guidance_scale"] > 1 else "no",
            f"{d.depth:.3g}",
            f"{card.parameters['transformer'] / 1e6:.2f}",
            f"{d.block_evaluations:.4g}",
            str(spent.get("updates", 0)),
            f"{d.passes / unit:.3g}",
            str(len(d.seeds)) if d.row.trained else "",
            _cell(d.interval("score")),
            "" if ours is None or d is ours else _difference(d.interval("score", minus=ours)),
            _cell(d.diversity),
            *(f"{second:.3f}" for second in seconds),
        ]
        lines.append(f"| {d.row.name} | " + " | ".join(cells) + " |")
    for part in evaluate.PARTS:
        names = [*metrics.SCORED, *SHOWN]
        lines += ["", f"### {part} captions", "", "| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for d in methods:
            lines.append(f"| {d.row.name} | " + " | ".join(_cell(d.interval(name, part)) for name in names) + " |")
    lines += ["", "![quality against cost](cost.png)", "", "![the same clips of every row](sheet.png)", ""]
    lines += [
        "## WanX-TI2V, as reported by secondary notes",
        "",
        "Other models, another data set and VBench-I2V's metrics: for the order of the methods, not for the values.",
        "",
        "| | steps | motion smoothness | dynamic degree | aesthetic | imaging | average | time, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {steps} | " + " | ".join(f"{v:.3f}" for v in values[:-1]) + f" | {values[-1]:g} |"
            for name, (steps, *values) in REPORTED_WANX.items()
        ),
        "",
    ]
    return lines


def _grid_table(cells: list[Done], unit: float) -> list[str]:
    if not cells:
        return []
    found = {d.row.name: d for d in cells}
    lines = [
        "## Steps and pruning",
        "",
        f"Score of FastLightGen on a short schedule ({cells[0].passes / unit:.3g} units, "
        f"{cells[0].scored[0].closed.size} clips, one seed).",
        "",
        "| | " + " | ".join(f"{rho:.0%} pruned" for rho in RHOS) + " |",
        "|---|" + "---|" * len(RHOS),
    ]
    for steps in STEPS:
        row = [found.get(cell_name(rho, steps)) for rho in RHOS]
        if any(row):
            cells_of = [_cell(d.interval("score")) if d else "" for d in row]
            lines.append(f"| {cell_name(0, steps).partition(',')[0]} | " + " | ".join(cells_of) + " |")
    return [*lines, ""]


def _ablation_table(rows: list[Done]) -> list[str]:
    if not rows:
        return []
    names = ("score", "prompt_following", "imaging_quality", "dynamic_degree", "flicker", "explained_psnr_db")
    return [
        "## Ablations",
        "",
        f"FastLightGen on the same short schedule; beta_1 in extra units (0 is none), both fixed where they are named. "
        f"{rows[0].scored[0].closed.size} clips, one seed.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(f"| {d.row.name} | " + " | ".join(_cell(d.interval(name)) for name in names) + " |" for d in rows),
        "",
    ]


def _as_json(
    recipe: DistillConfig, config: CompareConfig, done: list[Done], failed: dict[str, list[str]]
) -> dict[str, Any]:
    def finite(interval: Interval) -> list[float | None]:
        return [round(v, 5) if np.isfinite(v) else None for v in interval]

    return {
        "config": config.model_dump(mode="json"),
        "teacher": recipe.teacher,
        "failed": failed,
        "rows": [
            {
                "name": d.row.name,
                "group": d.row.group,
                "students": [card.sha256 for card in d.cards],
                "block_evaluations": d.block_evaluations,
                "parameters": d.cards[0].parameters["transformer"],
                "seeds": d.seeds if d.row.trained else [],
                "spent": d.spent,
                "seconds": d.scored[0].seconds,
                "diversity": finite(d.diversity),
                "summary": {
                    part: {name: finite(d.interval(name, part)) for name in evaluate.ROWS} for part in evaluate.PARTS
                },
            }
            for d in done
        ],
    }


def _cell(found: Interval) -> str:
    mean, low, high = found
    if not np.isfinite(mean):
        return ""
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _difference(found: Interval) -> str:
    mean, low, high = found
    if not np.isfinite(mean):
        return ""
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" + (", level" if low <= 0 <= high else "")
