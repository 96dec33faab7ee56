"""`python -m distill tune RECIPE FOLDER`: choose guidance automatically, by successive halving on the dev split.

FastLightGen's (alpha, beta_1, beta_2); every other method of the comparison can be given as many trials of settings of
its own. A trial's rungs are short trainings, each with more updates than the one before; one in so many settings goes
on (Optuna). What is tried is kept: rows by their hash, trials in a journal, so the same command goes on.

The rule. Of the settings that were trained to the last rung take the one that goes least beyond the limits; of those
that keep them, the one with the best mean score on dev. The limits: dynamic degree, flicker and diversity, each over
the teacher's on the same clips and noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from distill import evaluate, method, report, scores, student
from distill.backbones import base as backbones
from distill.config import ConfigError, DistillConfig, MethodConfig, TuneConfig, override
from distill.loop import Diverged, Run, remember, write_json
from distill.scores import Asked, Scored

CHOICE = "choice.json"
FAILED = "failed"
_WIDTHS = {"beta_1": 0.5, "beta_2": 0.25}
"""Half of the interval that a beta is drawn from, around what is searched."""


@dataclass(frozen=True)
class Dimension:
    """One number that is searched."""

    name: str
    path: str
    """Of the setting in a `MethodConfig`."""
    low: float
    high: float
    choices: tuple[float, ...] = ()
    """Only these, where there are any."""
    log: bool = False
    interval: bool = False
    """The setting is an interval around the number, not below 0."""
    fixed: bool = False
    """The setting is an interval of this one number."""
    same: tuple[str, ...] = ()
    """Other settings that get the same value."""

    def suggest(self, trial: Trial) -> float:
        """The trial's."""
        if self.choices:
            return float(trial.suggest_categorical(self.name, self.choices))
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def setting(self, value: float) -> str:
        """As ``override`` takes it."""
        if self.interval:
            width = _WIDTHS[self.name]
            return f"{self.path}=[{max(value - width, 0):.6g}, {value + width:.6g}]"
        return f"{self.path}=[{value:.6g}, {value:.6g}]" if self.fixed else f"{self.path}={value:.6g}"

    def settings(self, value: float) -> list[str]:
        """With the others that get the same value."""
        return [self.setting(value), *(f"{path}={value:.6g}" for path in self.same)]


_SCORES = "recipe.matching.scores"
_RATE = Dimension("learning_rate", "recipe.matching.fit.learning_rate", 3e-5, 3e-4, log=True)
# A full critic has the student's.
_BOTH_RATES = replace(_RATE, same=("recipe.matching.critic.learning_rate",))
_BETA_1 = Dimension("beta_1", f"{_SCORES}.beta_1", 0.0, 4.0, fixed=True)
_OWN_RATE = Dimension("learning_rate", "own.fit.learning_rate", 3e-5, 1e-3, log=True)
SPACES: dict[str, tuple[Dimension, ...]] = {
    "fastlightgen": (
        # The four of the paper's table: each is a stage II of its own, which all trials with it share.
        Dimension("alpha", "recipe.pruning.alpha", 0.0, 1.0, choices=(0.0, 0.5, 0.7, 1.0)),
        Dimension("beta_1", f"{_SCORES}.beta_1", 0.0, 4.0, interval=True),
        Dimension("beta_2", f"{_SCORES}.beta_2", 0.0, 1.5, interval=True),
    ),
    "dmd2": (
        _BETA_1,
        _BOTH_RATES,
        Dimension("gan", "recipe.matching.gan.student_weight", 0, 0, choices=(0.0, 5e-3, 2e-2)),
    ),
    "magic": (_BETA_1, _RATE, Dimension("alpha_weak", f"{_SCORES}.alpha_weak", 0.0, 0.75)),
    "lcm": (
        Dimension("guidance", "own.guidance_scale", 1.0, 5.0),
        _OWN_RATE,
        Dimension("huber", "own.huber", 1e-3, 1.0, log=True),
    ),
    "icmd": (
        _OWN_RATE,
        Dimension("features", "own.feature_weight", 0.01, 1.0, log=True),
        Dimension("adversarial", "own.adversarial_weight", 0, 0, choices=(0.0, 0.1, 1.0)),
    ),
}  # fmt: skip
"""By method, three numbers each. Euler and F3-Pruning have none: the teacher's guidance is theirs."""
FIRST: dict[str, dict[str, dict[str, float]]] = {
    "fastlightgen": {
        "the middle of the recipe's": {"alpha": 1.0, "beta_1": 1.0, "beta_2": 0.75},
        "the paper's, by secondary notes": {"alpha": 1.0, "beta_1": 3.5, "beta_2": 0.25},
    },
    "dmd2": {"the defaults": {"beta_1": 1.0, "learning_rate": 1e-4, "gan": 5e-3}},
    "magic": {"the defaults": {"beta_1": 1.0, "learning_rate": 1e-4, "alpha_weak": 0.25}},
    "lcm": {"the defaults": {"guidance": 2.0, "learning_rate": 1e-4, "huber": 1e-3}},
    "icmd": {"the defaults": {"learning_rate": 8e-4, "features": 0.1, "adversarial": 1.0}},
}
"""Settings that are tried first and to the last rung, whatever comes of them."""


@dataclass(frozen=True)
class Tried:
    """A setting with what was measured of it at its last rung."""

    name: str
    params: dict[str, float]
    rung: int
    score: float
    ratios: dict[str, float]
    """Over the teacher's: dynamic_degree, flicker, diversity."""
    excess: float
    """How far beyond the limits, all three together; 0 keeps them."""


def tune(folder: Path, name: str, recipe: DistillConfig, config: TuneConfig, say: Callable[[str], None]) -> Path:
    """Try what is left to try and choose; returns `choice.json`.

    Raises:
        ConfigError: a setting that cannot work, another search was begun in the folder, or no training went to its end.
        FolderError: the teacher's folder is broken.
        Interrupted: a signal came; the same call goes on.
    """
    if recipe.matching.scores.cfg_unit != "extra":
        raise ConfigError(
            f"matching.scores.cfg_unit={recipe.matching.scores.cfg_unit}: beta_1 is searched in extra units, where 0 "
            "is no guidance; leave it out"
        )
    out = folder / f"tune-{name}"
    run = Run(out, config.seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with run.handling_signals():
        # How many trials is no part of it: more can be added.
        remember(out, config.model_copy(update={"trials": 1}))
        remember(out / "recipe", recipe)
        of = {"recipe_sha256": recipe.sha256, "teacher_sha256": student.read_card(Path(recipe.teacher)).sha256}
        _same_inputs(out / "inputs.json", of)
        judge = Judge(folder, name, recipe, config, run)
        study = _study(out, config)
        _go_on(study, FIRST[name])
        while len(_finished(study)) < config.trials:
            run.check_stop()
            trial = study.ask()
            state = TrialState.PRUNED
            for rung in range(config.rungs):
                params = {dimension.name: dimension.suggest(trial) for dimension in SPACES[name]}
                try:
                    tried = judge.judged(_named(trial), params, rung)
                except (FloatingPointError, Diverged) as error:  # what the method does with these settings
                    trial.set_user_attr(FAILED, f"rung {rung}: {error}")
                    say(f"{_named(trial)}, rung {rung}: {error}")
                    state = TrialState.FAIL
                    break
                _note(trial, tried)
                say(f"{tried.name}, rung {rung}: score {tried.score:.3f}, {_limits_of(tried)}")
                trial.report(tried.score - tried.excess, config.reduction**rung)
                if rung == config.rungs - 1:
                    state = TrialState.COMPLETE
                elif trial.should_prune() and "why" not in trial.user_attrs:
                    break
            study.tell(trial, tried.score - tried.excess if state == TrialState.COMPLETE else None, state=state)
            write_report(out, name, config, _tried(study), _failures(study))
        if not any(one.rung == config.rungs - 1 for one in _tried(study)):
            raise ConfigError(
                f"no setting of {name} was trained to the last rung; see {out / 'trials.md'}, raise --trials"
            )
        best = choose(_tried(study), config.rungs)
        search = {"trials": len(_finished(study)), "budget": config.budget}
        chosen = {"settings": settings_of(name, best.params), "dev_score": best.score, **best.ratios}
        write_json(out / CHOICE, {"method": name, **of, **search, **chosen})
        write_report(out, name, config, _tried(study), _failures(study), best)
    return out / CHOICE


def settings_of(name: str, params: dict[str, float]) -> list[str]:
    """What was searched as settings of a `MethodConfig`."""
    return [setting for dimension in SPACES[name] for setting in dimension.settings(params[dimension.name])]


def trial_config(
    name: str, recipe: DistillConfig, config: TuneConfig, params: dict[str, float], rung: int, blocks: int
) -> MethodConfig:
    """The row that a setting is trained as on a rung. Raises ``ConfigError`` where the budget is too small for it."""
    short = method.with_short_importance(recipe)
    of = override(method.METHODS[name].settings(short), settings_of(name, params))
    budget = config.budget / config.reduction ** (config.rungs - 1 - rung)
    return method.within(of, budget * method.unit_passes(recipe, blocks), config.pruning_share, blocks)


def choose(tried: Sequence[Tried], rungs: int) -> Tried:
    """The rule: see the module's first lines."""
    whole = [one for one in tried if one.rung == rungs - 1]
    return min(whole, key=lambda one: (one.excess, -one.score))


def excess_over(ratios: dict[str, float], config: TuneConfig) -> float:
    """Sum of how far each ratio lies beyond its limit; what was not measured (NaN) breaks none."""
    beyond = 0.0
    ends = {"dynamic_degree": config.dynamic_degree, "flicker": config.flicker, "diversity": (config.diversity, 1e9)}
    for name, (low, high) in ends.items():
        if np.isfinite(ratios[name]):
            beyond += max(low - ratios[name], ratios[name] - high, 0.0)
    return beyond


class Judge:
    """Trains and measures settings of one method."""

    def __init__(self, folder: Path, name: str, recipe: DistillConfig, config: TuneConfig, run: Run) -> None:
        self._folder = folder
        self._name = name
        self._recipe = recipe
        self._config = config
        self._run = run
        self._asked = Asked(
            "dev", config.clips, 1, config.diversity_pairs, config.diversity_samples, config.precision
        )  # fmt: skip
        card = student.read_card(Path(recipe.teacher))
        evaluate.check_world(card)
        transformer = student.load_pipeline(Path(recipe.teacher), "cpu").transformer
        self._blocks = len(backbones.load(card.backbone, card.task).blocks(transformer))
        self._teacher = self._measure(Path(recipe.teacher))

    def judged(self, name: str, params: dict[str, float], rung: int) -> Tried:
        """Train a setting as far as the rung and measure it beside the teacher."""
        row = trial_config(self._name, self._recipe, self._config, params, rung, self._blocks)
        scored = self._measure(method.train(self._folder, row) / "student")
        of = self._teacher
        ratios = {name: _ratio(scored.values[name], of.values[name]) for name in ("dynamic_degree", "flicker")}
        ratios["diversity"] = _ratio(scored.diversity, of.diversity)
        score = float(np.nanmean(scored.values["score"]))
        return Tried(name, params, rung, score, ratios, excess_over(ratios, self._config))

    def _measure(self, folder: Path) -> Scored:
        return scores.measure(folder, self._folder / "scores", self._asked, self._run.check_stop)


def _ratio(values: np.ndarray, of: np.ndarray) -> float:
    """Of the means; NaN where the second is 0."""
    mean = float(np.nanmean(of))
    return float(np.nanmean(values)) / mean if mean else float("nan")


# --- Optuna ---------------------------------------------------------------------------------------------------------


def _study(out: Path, config: TuneConfig) -> optuna.Study:
    path = str(out / "trials.journal")
    storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    try:
        num_trials = len(optuna.load_study(study_name="tune", storage=storage).trials)
    except KeyError:
        num_trials = 0
    return optuna.create_study(
        study_name="tune",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        # Its random numbers begin anew in every process; they are not to be the same ones again.
        sampler=optuna.samplers.TPESampler(seed=config.seed + num_trials, n_startup_trials=max(config.trials // 3, 3)),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=config.reduction),
    )


def _go_on(study: optuna.Study, first: dict[str, dict[str, float]]) -> None:
    """Queue what is tried first, and what a stopped process was at: its rows are there already."""
    if not study.trials:
        for why, params in first.items():
            study.enqueue_trial(params, user_attrs={"why": why})
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if FAILED in trial.user_attrs:  # stopped just after that
            continue
        attributes = {"why": trial.user_attrs["why"]} if "why" in trial.user_attrs else {}
        # What it had not drawn yet was queued with it, if it was.
        known = trial.params or trial.system_attrs.get("fixed_params", {})
        study.enqueue_trial(known, user_attrs=attributes)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """With those whose training failed; those that were stopped are not."""
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [trial for trial in ended if trial.state != TrialState.FAIL or FAILED in trial.user_attrs]


def _failures(study: optuna.Study) -> dict[str, str]:
    """By name, settings and error of what could not be trained to the end."""
    return {
        _named(trial): f"{', '.join(f'{n} {v:.3g}' for n, v in trial.params.items())}; {trial.user_attrs[FAILED]}"
        for trial in _finished(study)
        if FAILED in trial.user_attrs
    }


def _named(trial: Trial | FrozenTrial) -> str:
    return str(trial.user_attrs.get("why", f"trial {trial.number}"))


def _note(trial: Trial, tried: Tried) -> None:
    trial.set_user_attr("tried", [tried.rung, tried.score, tried.ratios, tried.excess])


def _tried(study: optuna.Study) -> list[Tried]:
    found = []
    for trial in _finished(study):
        if FAILED not in trial.user_attrs:
            rung, score, ratios, excess = trial.user_attrs["tried"]
            found.append(Tried(_named(trial), dict(trial.params), rung, score, ratios, excess))
    return found


# --- the report -----------------------------------------------------------------------------------------------------


def write_report(
    out: Path, name: str, config: TuneConfig, tried: list[Tried], failed: dict[str, str], best: Tried | None = None
) -> None:
    """`trials.md`, best first, and `trials.json`."""
    names = [dimension.name for dimension in SPACES[name]]
    ordered = sorted(tried, key=lambda one: (-one.rung, one.excess, -one.score))
    lines = [
        f"# {method.METHODS[name].title}: {len(tried) + len(failed)} settings on dev",
        "",
        f"{config.clips} clips, half of them with closed captions; {config.rungs} rungs, the last of {config.budget:g} "
        f"units, each {config.reduction} times the one before. Limits over the teacher's: dynamic degree "
        f"{config.dynamic_degree[0]:g} to {config.dynamic_degree[1]:g}, flicker {config.flicker[0]:g} to "
        f"{config.flicker[1]:g}, diversity at least {config.diversity:g}. Chosen: of those at the last rung the one "
        "that goes least beyond the limits; of those that keep them, the one with the best score.",
        "",
        "| | " + " | ".join(names) + " | rung | score | dynamic degree | flicker | diversity | beyond the limits |",
        "|---|" + "---:|" * (len(names) + 6),
    ]
    for one in ordered:
        cells = [*(f"{one.params[n]:.3g}" for n in names), str(one.rung), f"{one.score:.3f}"]
        cells += [f"{one.ratios[n]:.3f}" for n in ("dynamic_degree", "flicker", "diversity")]
        cells.append(f"{one.excess:.3f}" if one.excess else "")
        lines.append(f"| {one.name}{' (chosen)' if one == best else ''} | " + " | ".join(cells) + " |")
    if failed:
        lines += ["", "Not trained to the end, and never chosen:", ""]
        lines += [f"- {of}: {why}" for of, why in failed.items()]
    report.write(out / "trials.md", "\n".join(lines) + "\n")
    write_json(out / "trials.json", [asdict(one) for one in ordered])


def _limits_of(tried: Tried) -> str:
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in tried.ratios.items()) + " of the teacher's"


def _same_inputs(path: Path, of: dict[str, str]) -> None:
    """The teacher's folder may have been made anew under the same name."""
    if path.exists() and json.loads(path.read_text()) != of:
        raise ConfigError(f"{path.parent} was begun with another version of the teacher; take a new folder")
    write_json(path, of)


def choices(folder: Path, recipe: DistillConfig) -> dict[str, tuple[str, ...]]:
    """By method, what `distill tune` chose in this folder.

    Raises:
        ConfigError: it chose for another recipe or teacher than this one.
    """
    teacher = student.read_card(Path(recipe.teacher)).sha256
    for choice in _choices(folder):
        for what, got in (("recipe", recipe.sha256), ("teacher", teacher)):
            if choice.get(f"{what}_sha256") != got:
                raise ConfigError(
                    f"--tuned: {folder} holds what was chosen for {choice['method']} with another {what}; "
                    "run `distill tune` with this one in a new folder, or leave --tuned out"
                )
    return {choice["method"]: tuple(choice["settings"]) for choice in _choices(folder)}


def searches(folder: Path) -> dict[str, tuple[int, float]]:
    """By method, how many settings it chose from, and the budget of the last rung."""
    return {choice["method"]: (choice["trials"], choice["budget"]) for choice in _choices(folder)}


def _choices(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"tune-*/{CHOICE}"))]
