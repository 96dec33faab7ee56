"""What a request may change of a recipe, read off the configuration's own schema."""

import json

import pytest

from distill import recipes
from distill.config import ConfigError, DistillConfig

FIELDS = {field.path: field for field in recipes.tunable("shapes", "smoke")}


def test_a_field_says_what_a_form_needs():
    steps, rho, beta = (FIELDS[p] for p in ("pruning.fit.steps", "importance.rho", "matching.scores.beta_1"))
    assert (steps.type, steps.default, steps.minimum, steps.maximum) == ("integer", 4, 1, 1_000_000)
    assert (rho.type, rho.above, rho.below, rho.minimum) == ("number", 0, 1, None)
    assert (beta.type, beta.default) == ("pair", [0.5, 1.5])
    assert FIELDS["matching.rollout"].choices == ["renoise", "euler", "data"]
    assert (FIELDS["importance.greedy"].type, FIELDS["importance.greedy"].default) == ("boolean", False)
    assert all(field.description for field in FIELDS.values())


def test_nothing_that_names_a_place_or_runs_code_can_be_changed():
    assert {"seed", "num_clips", "gate.far", "gate.reference.motion", "matching.critic.rank"} < FIELDS.keys()
    assert not FIELDS.keys() & {"name", "preset", "teacher", "compile", "precision", "gate.clips_from"}


@pytest.mark.parametrize("path", FIELDS)
def test_each_field_takes_its_own_default_and_nothing_of_another_type(path):
    field = FIELDS[path]
    config = recipes.check("shapes", "smoke", {path: field.default})
    assert config == recipes.load("shapes", ["preset=smoke"])
    for wrong in ("1", None, {"a": 1}, [1], "nan", float("nan"), float("inf")):
        with pytest.raises(ConfigError) as caught:
            recipes.check("shapes", "smoke", {path: wrong})
        assert caught.value.field == path
    for limit, beyond in ((field.minimum, -1), (field.maximum, 1), (field.above, 0), (field.below, 0)):
        if limit is not None:
            with pytest.raises(ConfigError):
                recipes.check("shapes", "smoke", {path: limit + beyond})


def test_what_is_asked_for_is_what_the_command_line_makes_of_it():
    asked = {"pruning.fit.steps": 7, "matching.scores.beta_1": [0, 1], "matching.critic.kind": "full", "gate.far": 3}
    settings = [f"{path}={json.dumps(value)}" for path, value in asked.items()]
    assert recipes.check("shapes", "quick", asked) == recipes.load("shapes", ["preset=quick", *settings])


@pytest.mark.parametrize(
    ("overrides", "field", "says"),
    [
        ({"pruning.fit.step": 4}, "pruning.fit.step", "no such field; did you mean pruning.fit.steps?"),
        ({"pruning.fit": {}}, "pruning.fit", "no such field"),
        ({"teacher": "/etc"}, "teacher", "not one that a request may change"),
        ({"seed": 1, "gate.clips_from": "/etc"}, "gate.clips_from", "not one that a request may change"),
        ({"pruning.fit.steps": "40"}, "pruning.fit.steps", 'got "40"; Input should be a valid integer'),
        ({"pruning.fit.steps": True}, "pruning.fit.steps", "got true; "),
        ({"matching.scores.beta_1": [2, 1]}, "matching.scores.beta_1", "give them in order"),
        (
            {"matching.scores.beta_1": [2, "x"]},
            "matching.scores.beta_1",
            'got [2, "x"]; Input should be a valid number',
        ),
        (
            {"seed": 1, "matching.critic.kind": "full", "matching.scores.alpha_weak": 0.5},
            "matching.critic.kind",
            "scores.alpha_weak is a share of the critic's LoRA: set critic.kind=lora or alpha_weak=0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(overrides, field, says):
    with pytest.raises(ConfigError) as caught:
        recipes.check("shapes", "smoke", overrides)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_the_schema_marks_only_fields_that_have_bounds_where_they_eat_the_machine():
    schema = DistillConfig.model_json_schema()["$defs"]
    for name in ("steps", "batch"):
        assert schema["FitConfig"]["properties"][name]["maximum"] <= 1_000_000
