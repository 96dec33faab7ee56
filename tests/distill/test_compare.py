"""The comparison: equal budgets, rows found again by what they depend on, paired intervals, a report, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import compare, evaluate, loop, method, recipes, scores, tune
from distill.config import ConfigError, override
from distill.scores import Asked, Scored
from tests.distill import tiny
from tests.stack import ROOT

BLOCKS = 10


@pytest.fixture
def shapes_recipe():
    return recipes.load("shapes", [])


@pytest.fixture
def config():
    quick = ["tier=quick", "clips=4", "noise_seeds=1", "short_clips=2", "diversity_pairs=2", "diversity_samples=2"]
    return override(recipes.compare_shapes(), [*quick, "precision=float32", "short_share=1"])


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["teacher", "pruned"])
@pytest.mark.parametrize("made", ["lcm", "dmd2", "magic", "icmd", "fastlightgen"])
def test_every_method_spends_the_whole_budget_and_no_more(shapes_recipe, made, weights):
    budget = 300 * method.unit_passes(shapes_recipe, BLOCKS)
    config = method.within(method.METHODS[made].settings(shapes_recipe, weights), budget, 0.5, BLOCKS)
    spent = sum(method.spent_passes(config, BLOCKS).values())
    update = method.METHODS[made].passes(config, BLOCKS).update
    assert budget - update < spent <= budget
    fit = method.fit_of(config)
    assert fit.sample_every == fit.steps
    assert fit.warmup_steps <= fit.steps / 10
    if weights == "pruned":
        parts = method.spent_passes(config, BLOCKS)
        assert 0.49 * budget < parts["importance"] + parts["pruning"] <= 0.5 * budget


def test_the_unit_is_an_update_of_the_unpruned_dmd2_student(shapes_recipe):
    unit = method.unit_passes(shapes_recipe, BLOCKS)
    config = method.within(method.METHODS["dmd2"].settings(shapes_recipe), 300 * unit, 0.5, BLOCKS)
    assert method.fit_of(config).steps == 300
    # 2.5 calls of 10 blocks with the last one trained, two of the teacher, the critic's with its discriminator ...
    by_hand = (1.5 + 3) * 10 + 2 * 10 + 10 + 3 * 10
    assert unit == 16 * (by_hand + 3 * (2.5 * 10 + 2 * 3 * 10))


def test_a_budget_that_stage_one_uses_up_is_one_clear_error(shapes_recipe):
    unit = method.unit_passes(shapes_recipe, BLOCKS)
    config = method.METHODS["fastlightgen"].settings(shapes_recipe, "pruned")
    with pytest.raises(ConfigError, match=r"stage I takes 76800 block passes, of \d+ .* raise the budget"):
        method.within(config, 20 * unit, 0.5, BLOCKS)


def methods_of(recipe, config):
    """The methods' rows as the recipe shapes them, and those that prune less and take fewer steps."""
    rows = [row for row in compare._methods(recipe, config, BLOCKS) if row.config]
    lighter = [row for row in rows if "10 % pruned" in row.name]
    return [row for row in rows if row not in lighter], lighter


def test_all_methods_have_the_same_data_teacher_and_schedule(shapes_recipe):
    config = recipes.compare_shapes()
    rows, _ = methods_of(shapes_recipe, config)
    for part in ("teacher", "num_clips", "precision", "seed", "importance", "watched", "shift"):
        assert len({repr(getattr(row.config.recipe, part)) for row in rows}) == 1, part
    pruned = [row for row in rows if row.config.weights == "pruned"]
    assert len({repr(row.config.recipe.pruning) for row in pruned}) == 1
    few = {row.name: row.config.recipe.student.num_inference_steps for row in rows}
    assert {steps for name, steps in few.items() if not name.startswith("Euler")} == {4}
    names = [row.name for row in compare.plan(shapes_recipe, config, BLOCKS)]
    assert len(names) == len(set(names)) == 23 + 15 + 13


def test_one_block_less_in_three_steps_costs_as_much_and_differs_in_nothing_else(shapes_recipe):
    config = recipes.compare_shapes()
    rows, lighter = methods_of(shapes_recipe, config)
    assert [row.name for row in lighter] == ["FastLightGen, 3 steps, 10 % pruned", "DMD2, 3 steps, 10 % pruned"]
    usual = {row.name: row.config for row in rows}
    budget = config.budget * method.unit_passes(shapes_recipe, BLOCKS)
    for row, beside in zip(lighter, ("FastLightGen", "DMD2, pruned"), strict=True):
        spent = sum(method.spent_passes(row.config, BLOCKS).values())
        assert 0.99 * budget < spent <= budget
        recipe, other = row.config.recipe, usual[beside].recipe
        assert recipe.student == recipes.few_steps(3, recipe.shift)
        same = {
            "student": other.student,
            "importance": recipe.importance.model_copy(update={"rho": other.importance.rho}),
            "pruning": recipe.pruning.model_copy(update={"fit": other.pruning.fit}),
            "matching": recipe.matching.model_copy(update={"fit": other.matching.fit}),
        }
        assert recipe.importance.rho == 0.1
        assert recipe.model_copy(update=same) == other


def test_what_was_tuned_is_taken_for_that_method_alone(shapes_recipe):
    config = recipes.compare_shapes().model_copy(update={"choices": {"lcm": ("own.huber=0.5",)}})
    plain = {r.name: r.config for r in compare.plan(shapes_recipe, recipes.compare_shapes(), BLOCKS)}
    tuned = {r.name: r.config for r in compare.plan(shapes_recipe, config, BLOCKS)}
    assert {name for name in plain if plain[name] != tuned[name]} == {"LCM", "LCM, pruned"}
    assert tuned["LCM"].own.huber == 0.5


def test_a_tuned_stage_two_is_that_of_every_pruned_row(shapes_recipe):
    chosen = ("recipe.pruning.alpha=0.5", "recipe.matching.scores.beta_2=[0.5, 1.0]")
    config = recipes.compare_shapes().model_copy(update={"choices": {"fastlightgen": chosen}})
    rows, lighter = methods_of(shapes_recipe, config)
    pruned = [row for row in rows if row.config.weights == "pruned"]
    assert {row.config.recipe.pruning.alpha for row in (*pruned, *lighter)} == {0.5}
    assert len({repr(row.config.recipe.pruning) for row in pruned}) == 1
    assert [row.name for row in rows if row.config.recipe.matching.scores.beta_2 == (0.5, 1.0)] == [
        row.name for row in rows if row.config.method == "fastlightgen"
    ]


def test_the_report_says_which_methods_were_tuned_and_how_much():
    config = recipes.compare_shapes()
    assert compare._settings(config) == ["Every method has its defaults; none was tuned.", ""]

    def said(searches):
        choices = {name: ("recipe.seed=0",) for name in searches}
        return "\n".join(compare._settings(config.model_copy(update={"choices": choices, "searches": searches})))

    one = said({"lcm": (12, 60.0)})
    assert "- LCM: tuned on dev (12 trials, the last rung of 60 units): recipe.seed=0" in one
    assert "- DMD2: defaults, not tuned" in one
    assert "not tuned alike" in one
    alike = dict.fromkeys(tune.SPACES, (12, 60.0))
    assert "not tuned alike" not in said(alike)
    assert "not tuned alike" in said({**alike, "lcm": (24, 60.0)})


def test_rows_of_different_code_are_named():
    def trained_by(name, commit):
        one = done(name, np.zeros((1, 1, 2)))
        return replace(one, spent=[{"code": {"version": "1", "git": commit}}])

    assert compare._versions([trained_by("a", "x"), trained_by("b", "x")]) == []
    assert "- Trained by 1 y: b" in compare._versions([trained_by("a", "x"), trained_by("b", "y")])


def test_every_seed_s_failure_is_reported_and_the_others_go_on(tiny_recipe, config, tmp_path, monkeypatch):
    changes = {"budget": 2.0, "rows": ("teacher", "LCM"), "clips": 2, "diversity_pairs": 0, "seeds": 2}

    def fails(_root, config):
        raise (FloatingPointError, loop.Diverged)[config.recipe.seed - tiny_recipe.seed]("lower the learning rate")

    monkeypatch.setattr(method, "train", fails)
    report = compare.compare(tmp_path, tiny_recipe, config.model_copy(update=changes), lambda _line: None)
    why = ["seed 0: lower the learning rate", "seed 1: lower the learning rate"]
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == {"LCM": why}
    assert f"- LCM ended early, {'; '.join(why)}" in report.read_text()


# --- rows by their hash ---------------------------------------------------------------------------------------------


def test_a_row_is_named_by_what_its_student_depends_on_and_nothing_else(shapes_recipe, monkeypatch):
    def sha256(made="lcm", weights="teacher", settings=(), of="0" * 64):
        recipe = override(shapes_recipe, list(settings))
        return method.row_sha256(method.METHODS[made].settings(recipe, weights), of)

    plain = sha256()
    for settings in (["seed=1"], ["student.num_inference_steps=3"], ["num_clips=5"], ["matching.fit.batch=4"]):
        assert sha256(settings=settings) != plain, settings
    assert sha256(of="1" * 64) != plain
    assert sha256(weights="pruned") != plain
    # What it does not read: the critic's settings, stage II's, the name.
    for settings in (["matching.critic.rank=2"], ["pruning.alpha=0"], ["name=x"], ["gate.far=4"]):
        assert sha256(settings=settings) == plain, settings
    assert sha256(weights="pruned", settings=["pruning.alpha=0"]) != sha256(weights="pruned")
    assert sha256("dmd2", settings=["matching.score_min=0.1"]) != sha256("dmd2")
    assert sha256("dmd2", settings=["pruning.alpha=0"]) == sha256("dmd2")
    monkeypatch.setattr(method, "METHOD_VERSION", method.METHOD_VERSION + 1)
    assert sha256() != plain


# --- intervals ------------------------------------------------------------------------------------------------------


def done(name, values_TSC, closed=None, seeds=None, config=None):
    clips = np.asarray(values_TSC).shape[-1]
    made = [
        Scored(
            closed=np.arange(clips) < clips // 2 if closed is None else closed,
            values={"score": np.asarray(values_SC, dtype=float)},
            diversity=np.empty(0),
            seconds={},
            shown_BCTHW=torch.empty(0),
        )
        for values_SC in values_TSC
    ]
    seeds = list(range(len(made))) if seeds is None else seeds
    return compare.Done(compare.Row(name, "methods", config), [], made, seeds, [{}] * len(made), 10, 1 / 3)


def test_a_difference_is_paired_over_clips_and_seeds():
    chance = np.random.default_rng(0)
    hard = chance.normal(size=(1, 1, 64))  # what makes a clip hard is common to both
    one = done("a", np.broadcast_to(hard, (2, 3, 64)) + 0.01 * chance.normal(size=(2, 3, 64)) + 0.02)
    other = done("b", np.broadcast_to(hard, (1, 3, 64)) + 0.01 * chance.normal(size=(1, 3, 64)))
    mean, low, high = one.interval("score", minus=other)
    assert 0.01 < low < mean < high < 0.03
    assert "level" not in compare._difference((mean, low, high))
    alone = one.interval("score")
    assert alone[2] - alone[1] > 10 * (high - low)
    same = one.interval("score", minus=done("c", np.broadcast_to(hard, (1, 3, 64)) + 0.02))
    assert compare._difference(same).endswith(", level")
    closed_mean, *_ = one.interval("score", "closed")
    assert closed_mean == pytest.approx(one.values["score"][..., :32].mean())


def test_trained_rows_are_paired_on_the_training_seeds_that_both_have(shapes_recipe):
    trained = method.METHODS["dmd2"].settings(shapes_recipe)
    by_seed = np.arange(3.0)[:, None, None] * np.ones((1, 2, 8))
    ours = done("FastLightGen", by_seed + 0.5, config=trained)
    # Its seed 0 failed: seeds 1 and 2 are compared with ours of the same numbers.
    late = done("DMD2", by_seed[1:], seeds=[1, 2], config=trained)
    assert late.interval("score", minus=ours) == pytest.approx((-0.5, -0.5, -0.5))
    assert ours.interval("score", "closed", minus=late) == pytest.approx((0.5, 0.5, 0.5))
    other = done("LCM", by_seed[:1], seeds=[3], config=trained)
    assert compare._difference(other.interval("score", minus=ours)) == ""
    # What is not trained is the same for every seed.
    assert done("teacher", by_seed[1:2]).interval("score", minus=ours)[0] == pytest.approx(-0.5)


def test_training_seeds_that_disagree_widen_the_interval():
    values = np.zeros((3, 2, 50)) + np.array([0.0, 0.5, 1.0])[:, None, None]
    mean, low, high = evaluate.interval(values)
    assert mean == pytest.approx(0.5)
    assert low < 0.2
    assert high > 0.8
    flat = evaluate.interval(np.broadcast_to(values.mean(0, keepdims=True), values.shape))
    assert flat[1] == flat[2] == pytest.approx(0.5)


def test_block_evaluations_count_steps_guidance_and_depth(shapes_recipe):
    config = recipes.compare_shapes()
    rows = {row.name: row for row in compare.plan(shapes_recipe, config, BLOCKS)}
    from distill import student

    teacher = student.read_card(ROOT / "models" / "shapes-teacher")
    ours = student.read_card(ROOT / "models" / "shapes-4step")

    def counted(name, card):
        return compare.Done(rows[name], [card], [], [0], [{}], BLOCKS, 1 / 3).block_evaluations

    assert counted("teacher", teacher) == 50 * 2 * 10
    assert counted("FastLightGen", ours) == 4 * 7
    assert counted("F3-Pruning, self-attention", teacher) == pytest.approx(50 * 2 * (10 - 3 / 3))


# --- what is measured -----------------------------------------------------------------------------------------------


def test_parts_are_measured_once_and_more_clips_are_added_to_them(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "PART", 2)
    few = Asked("dev", clips=2, noise_seeds=1, diversity_pairs=0, diversity_samples=2, precision="float32")
    stops = []
    first = scores.measure(tiny_teacher, tmp_path, few, lambda: stops.append("part"))
    assert len(stops) == 2  # the part, and the time of one clip
    assert first.closed.tolist() == [True, False]
    assert first.values["score"].shape == (1, 2)
    more = Asked("dev", clips=4, noise_seeds=1, diversity_pairs=0, diversity_samples=2, precision="float32")
    second = scores.measure(tiny_teacher, tmp_path, more, lambda: stops.append("part"))
    assert len(stops) == 3
    assert np.array_equal(second.values["score"][:, :2], first.values["score"], equal_nan=True)
    assert second.values["score"].shape == (1, 4)

    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(evaluate, "make", never)
    again = scores.measure(tiny_teacher, tmp_path, more, never)
    assert np.array_equal(again.values["flicker"], second.values["flicker"])
    assert torch.equal(again.shown_BCTHW, first.shown_BCTHW)
    with pytest.raises(ConfigError, match="an even number is wanted; got 3"):
        scores.measure(tiny_teacher, tmp_path, Asked("dev", 3, 1, 0, 2, "float32"), never)


def test_what_was_measured_by_other_metrics_or_on_another_device_is_measured_anew(tiny_teacher, tmp_path, monkeypatch):
    asked = Asked("dev", clips=2, noise_seeds=1, diversity_pairs=0, diversity_samples=2, precision="float32")

    def folder_of_parts():
        scores._Measured(tiny_teacher, tmp_path, asked)
        return {path.name for path in tmp_path.iterdir()}

    assert len(folder_of_parts()) == len(folder_of_parts()) == 1
    monkeypatch.setattr(scores, "MEASURED_VERSION", scores.MEASURED_VERSION + 1)
    assert len(folder_of_parts()) == 2
    monkeypatch.setattr(scores, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    [name] = [name for name in folder_of_parts() if "cuda" in name]
    assert "-cuda-NVIDIA-H200-" in name


ROWS = ["teacher", "FastLightGen", "1 step, 0 % pruned", "beta_2 = 0.25"]


@pytest.fixture(scope="module")
def tiny_recipe(tiny_teacher):
    return tiny.recipe(
        tiny_teacher, **{"matching.fit.batch": 2, "importance.clips": 2, "importance.sigmas": 1, "pruning.fit.batch": 1}
    )


def test_the_comparison_is_stopped_goes_on_and_is_reported(tiny_recipe, config, tmp_path, monkeypatch):
    config = config.model_copy(update={"budget": 2.0, "rows": tuple(ROWS), "clips": 2, "diversity_pairs": 0})
    said: list[str] = []

    def stop_once(line: str) -> None:
        said.append(line)
        if line.startswith("1 step, 0 % pruned, training seed") and said.count(line) == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(loop.Interrupted):
        compare.compare(tmp_path, tiny_recipe, config, stop_once)
    half = (tmp_path / "report.md").read_text()
    assert "| FastLightGen |" in half
    assert "## Steps and pruning" not in half
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("rows/*/row.json")}
    report = compare.compare(tmp_path, tiny_recipe, config, stop_once).read_text()
    assert all(path.stat().st_mtime_ns == at for path, at in trained.items())
    for expected in (
        "Quick tier", "| teacher | 2 | yes | 5 |", "| FastLightGen | 4 | no | 3 |", "as reported by secondary notes",
        "## Steps and pruning", "| beta_2 = 0.25 |", "### open captions",
    ):  # fmt: skip
        assert expected in report
    found = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in found["rows"]] == ROWS
    ours = found["rows"][1]
    assert ours["block_evaluations"] == 4 * 3
    assert set(ours["spent"][0]["passes"]) == {"importance", "pruning", "fastlightgen"}
    unit = method.unit_passes(tiny_recipe, tiny.NUM_LAYERS)
    for row in found["rows"]:
        assert sum(row["spent"][0].get("passes", {}).values()) <= 2 * unit
    for name in ("cost.png", "sheet.png"):
        assert (tmp_path / name).stat().st_size > 5000
    # All of it is there: nothing is trained or made a third time.
    monkeypatch.setattr(evaluate, "make", None)
    monkeypatch.setattr(method, "opened", None)
    assert compare.compare(tmp_path, tiny_recipe, config, said.append).read_text() == report
    with pytest.raises(ConfigError, match=r"--rows: there is no LMC; there are: teacher, FastLightGen"):
        compare.compare(tmp_path, tiny_recipe, config.model_copy(update={"rows": ("LMC",)}), said.append)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "circles"], "no recipe 'circles'"),
        (["compare", "shapes", "--groups", "all"], "Input should be 'methods', 'grid' or 'ablations'"),
        (["compare", "shapes", "--budget", "0"], "budget: got 0.0; Input should be greater than 0"),
        (["tune", "shapes", "--method", "f3"], "--method f3: nothing of it is searched; there are: fastlightgen, dmd2"),
        (["compare", "shapes", "--set", "teacher=nowhere"], "nowhere is no model folder"),
        (["compare", "shapes", "--tuned"], "--tuned: nothing was chosen in "),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line_and_exit_2(tmp_path, capsys, arguments, message):
    from distill.__main__ import main

    command, recipe, *options = arguments
    assert main([command, recipe, str(tmp_path / "out"), *options]) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quick_tier_runs_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "distill", "compare", "shapes", str(tmp_path / "out"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    report = Path(done.stdout.strip())
    text = report.read_text()
    found = json.loads(report.with_suffix(".json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert {row["group"] for row in found["rows"]} == {"methods", "grid", "ablations"}
    for name in ("teacher", "FastLightGen", "DMD2", "LCM", "MagicDistillation", "ICMD", "F3-Pruning", "Euler 1"):
        assert name in names
        assert f"| {name} |" in text
    for row in found["rows"]:
        assert 0 <= row["summary"]["all"]["score"][0] <= 1
        assert row["seconds"]["denoise"] > 0
