"""The search for guidance: the rule, successive halving, resuming, and what it leaves for the comparison."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from distill import compare, loop, method, recipes, student, tune
from distill.baselines import lcm
from distill.config import ConfigError, override
from distill.tune import Tried
from tests.distill import tiny

WITHIN = {"dynamic_degree": 1.0, "flicker": 1.0, "diversity": 1.0}


@pytest.fixture
def config():
    return override(recipes.tune_shapes(), ["trials=12", "rungs=3", "reduction=2", "budget=40"])


def tried(name, score, rung=2, excess=0.0):
    return Tried(name, {}, rung, score, WITHIN, excess)


# --- the rule -------------------------------------------------------------------------------------------------------


def test_the_best_score_within_the_limits_is_chosen():
    jittery, fine, better = tried("jittery", 0.9, excess=0.2), tried("fine", 0.7), tried("better", 0.8)
    half_trained = tried("half trained", 0.95, rung=1)
    assert tune.choose([jittery, fine, better, half_trained], rungs=3) == better
    # Where none keeps them, what breaks them least.
    worse = tried("worse", 0.95, excess=0.5)
    assert tune.choose([worse, jittery], rungs=3) == jittery


def test_the_excess_is_the_distance_beyond_each_limit(config):
    assert tune.excess_over(WITHIN, config) == 0
    over = {"dynamic_degree": 1.3, "flicker": 0.5, "diversity": 0.75}
    assert tune.excess_over(over, config) == pytest.approx(0.2 + 0.2 + 0.1)
    assert tune.excess_over({**WITHIN, "diversity": math.nan}, config) == 0
    assert tune.excess_over({**WITHIN, "diversity": 3.0}, config) == 0


def test_what_is_searched_are_settings_of_each_method(tiny_config):
    for name, space in tune.SPACES.items():
        assert len(space) == 3  # as many as ours has
        for first in tune.FIRST[name].values():
            assert first.keys() == {dimension.name for dimension in space}
            settings = [dimension.setting(first[dimension.name]) for dimension in space]
            of = method.METHODS[name].settings(tiny_config)
            assert override(of, settings).method == name
    paper = tune.FIRST["fastlightgen"]["the paper's, by secondary notes"]
    settings = [dimension.setting(paper[dimension.name]) for dimension in tune.SPACES["fastlightgen"]]
    scores = override(method.METHODS["fastlightgen"].settings(tiny_config), settings).recipe.matching.scores
    assert (scores.beta_1, scores.beta_2) == ((3.0, 4.0), (0.0, 0.5))


@pytest.mark.parametrize("name", tune.SPACES)
def test_every_rung_of_the_default_search_pays_for_all_stages(name):
    recipe, config = recipes.distill_shapes(), recipes.tune_shapes()
    params = next(iter(tune.FIRST[name].values()))
    for rung in range(config.rungs):
        row = tune.trial_config(name, recipe, config, params, rung, blocks=10)
        assert method.fit_of(row).steps >= 5
        if row.weights == "pruned":
            assert row.recipe.pruning.fit.steps >= 40


def test_a_tuned_learning_rate_reaches_the_full_critic_too(tiny_config):
    chosen = tune.settings_of("dmd2", {"beta_1": 1.0, "learning_rate": 2e-4, "gan": 0.0})
    matching = override(method.METHODS["dmd2"].settings(tiny_config), chosen).recipe.matching
    assert matching.fit.learning_rate == matching.critic.learning_rate == 2e-4


# --- the search -----------------------------------------------------------------------------------------------------


class Landscape:
    """Stands for training and measuring: the best is at (1, 1, .75); less training blurs what is measured."""

    asked: list[tuple[dict[str, float], int]]

    def __init__(self, *_):
        pass

    def judged(self, name, params, rung):
        type(self).asked.append((params, rung))
        far = abs(params["beta_1"] - 1) / 4 + abs(params["beta_2"] - 0.75) / 2 + (1 - params["alpha"]) / 5
        return Tried(name, params, rung, 0.8 - far - 0.02 * (2 - rung), WITHIN, 0.0)


@pytest.fixture
def landscape(monkeypatch):
    Landscape.asked = []
    monkeypatch.setattr(tune, "Judge", Landscape)
    return Landscape


def test_the_search_halves_and_finds_at_least_the_paper_s(landscape, tiny_config, config, tmp_path):
    choice = json.loads(tune.tune(tmp_path, "fastlightgen", tiny_config, config, lambda _line: None).read_text())
    found = json.loads((tmp_path / "tune-fastlightgen" / "trials.json").read_text())
    assert len(found) == 12
    by_name = {one["name"]: one for one in found}
    paper = by_name["the paper's, by secondary notes"]
    assert paper["rung"] == 2  # to the end, whatever came of it
    assert choice["dev_score"] >= paper["score"]
    assert choice["dev_score"] == max(one["score"] for one in found if one["rung"] == 2)
    by_rung = [sum(rung == wanted for _, rung in landscape.asked) for wanted in range(3)]
    assert by_rung[0] == 12
    assert by_rung[0] > by_rung[1] > by_rung[2] >= 2
    assert tune.choices(tmp_path, tiny_config) == {"fastlightgen": tuple(choice["settings"])}
    with pytest.raises(ConfigError, match=r"--tuned: .* was chosen for fastlightgen with another recipe"):
        tune.choices(tmp_path, override(tiny_config, ["seed=1"]))
    assert tune.searches(tmp_path) == {"fastlightgen": (12, 40.0)}
    table = (tmp_path / "tune-fastlightgen" / "trials.md").read_text()
    assert table.count("(chosen)") == 1


def test_a_stopped_search_goes_on_where_it_was(landscape, tiny_config, config, tmp_path):
    judged = Landscape.judged

    class Stopping(landscape):
        asked = landscape.asked

        def judged(self, name, params, rung):
            if len(self.asked) == 7:
                raise loop.Interrupted
            return judged(self, name, params, rung)

    tune.Judge = Stopping  # put back with the fixture's own
    with pytest.raises(loop.Interrupted):
        tune.tune(tmp_path, "fastlightgen", tiny_config, config, lambda _line: None)
    before = len(landscape.asked)
    tune.Judge = landscape
    tune.tune(tmp_path, "fastlightgen", tiny_config, config, lambda _line: None)
    found = json.loads((tmp_path / "tune-fastlightgen" / "trials.json").read_text())
    assert len(found) == 12
    rung_0 = [params for params, rung in landscape.asked if rung == 0]
    # The one it was stopped at is asked for again, and no other: 12 and at most that one.
    assert len(rung_0) <= 13
    assert len(landscape.asked) > before
    again = len(landscape.asked)
    tune.tune(tmp_path, "fastlightgen", tiny_config, config, lambda _line: None)
    assert len(landscape.asked) == again


def test_another_search_in_the_same_folder_is_refused_but_more_trials_are_not(landscape, tiny_config, config, tmp_path):
    def again(recipe=tiny_config, **changes):
        return tune.tune(tmp_path, "fastlightgen", recipe, config.model_copy(update=changes), lambda _line: None)

    again(trials=3)
    again(trials=4)
    asked = len(landscape.asked)
    with pytest.raises(ConfigError, match=r"begun with other settings \(they differ in: budget\)"):
        again(budget=80.0)
    with pytest.raises(ConfigError, match=r"begun with other settings \(they differ in: num_clips\)"):
        again(tiny_config.model_copy(update={"num_clips": 9}))
    assert len(landscape.asked) == asked


@pytest.mark.parametrize("error", [FloatingPointError, loop.Diverged])
def test_a_setting_that_diverges_counts_is_listed_and_is_not_tried_again(
    landscape, tiny_config, config, tmp_path, monkeypatch, error
):
    class Diverging(landscape):
        def judged(self, name, params, rung):
            made = super().judged(name, params, rung)
            if name.startswith("the paper's") and rung == 1:
                raise error("the gradient is not finite")
            return made

    monkeypatch.setattr(tune, "Judge", Diverging)
    for _ in range(2):
        choice = tune.tune(tmp_path, "fastlightgen", tiny_config, config, lambda _line: None)
    assert json.loads(choice.read_text())["trials"] == 12
    found = json.loads((choice.parent / "trials.json").read_text())
    assert len(found) == 11
    assert not any(one["name"].startswith("the paper's") for one in found)
    assert sum(rung == 0 for _, rung in Diverging.asked) == 12
    table = (choice.parent / "trials.md").read_text()
    assert "- the paper's, by secondary notes: alpha 1, beta_1 3.5, beta_2 0.25; rung 1: the gradient is not" in table


def test_where_nothing_could_be_trained_nothing_is_chosen(landscape, tiny_config, config, tmp_path, monkeypatch):
    def fails(*_):
        raise FloatingPointError("the gradient is not finite")

    monkeypatch.setattr(landscape, "judged", fails)
    with pytest.raises(ConfigError, match="no setting of fastlightgen was trained to the last rung"):
        tune.tune(tmp_path, "fastlightgen", tiny_config, config, lambda _line: None)


def test_real_trainings_are_judged_beside_the_teacher(tiny_teacher, tmp_path):
    recipe = tiny.recipe(
        tiny_teacher, **{"matching.fit.batch": 2, "importance.clips": 2, "importance.sigmas": 1, "pruning.fit.batch": 1}
    )
    config = override(
        recipes.tune_shapes(),
        [
            "trials=1",
            "rungs=1",
            "budget=1.5",
            "clips=2",
            "diversity_pairs=2",
            "diversity_samples=2",
            "precision=float32",
        ],
    )
    said: list[str] = []
    choice = json.loads(tune.tune(tmp_path, "fastlightgen", recipe, config, said.append).read_text())
    assert len(said) == 1
    assert choice["settings"][0] == "recipe.pruning.alpha=1"
    assert len(list((tmp_path / "rows").iterdir())) == 1
    # And the comparison in the same folder takes what was chosen.
    compared = recipes.compare_shapes().model_copy(update={"choices": tune.choices(tmp_path, recipe), "budget": 4.0})
    [ours] = [row for row in compare.plan(recipe, compared, tiny.NUM_LAYERS) if row.name == compare.OURS]
    wanted = next(setting for setting in choice["settings"] if "beta_1" in setting).partition("=")[2]
    assert list(ours.config.recipe.matching.scores.beta_1) == json.loads(wanted)


@pytest.mark.usefixtures("landscape")
def test_a_teacher_made_anew_is_another_search(tiny_config, tiny_teacher, config, tmp_path):
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    recipe = override(tiny_config, [f"teacher={teacher}"])
    tune.tune(tmp_path, "fastlightgen", recipe, config, lambda _line: None)
    student.write_card(teacher, student.read_card(teacher).model_copy(update={"name": "another"}))
    with pytest.raises(ConfigError, match="begun with another version of the teacher"):
        tune.tune(tmp_path, "fastlightgen", recipe, config, lambda _line: None)
    with pytest.raises(ConfigError, match=r"--tuned: .* with another teacher"):
        tune.choices(tmp_path, recipe)


def test_the_search_is_in_extra_units(tiny_config, config, tmp_path):
    standard = override(tiny_config, ["matching.scores.cfg_unit=standard", "matching.scores.beta_1=[0, 0.5]"])
    with pytest.raises(ConfigError, match="beta_1 is searched in extra units"):
        tune.tune(tmp_path, "fastlightgen", standard, config, lambda _line: None)
    assert not any(tmp_path.iterdir())
    # Other methods know what less than no guidance is.
    assert lcm.settings(standard).own.guidance_scale == 1.0
