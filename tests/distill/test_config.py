"""Settings and the command line: what is wrong is said in one line, exit code 2."""

import pytest

from distill import recipes
from distill.__main__ import main
from distill.config import ConfigError, override


def test_settings_are_converted_by_their_own_type():
    config = override(recipes.teach_shapes(), ["vae.frames.steps=7", "vae.frames.learning_rate=1e-3", "name=mine"])
    assert (config.vae.frames.steps, config.vae.frames.learning_rate, config.name) == (7, 1e-3, "mine")
    assert config.vae.clips == recipes.teach_shapes().vae.clips


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("vae.frames.stepz=7", "vae.frames.stepz: no such setting; here there are: optimiser, learning_rate"),
        ("nothing.here=1", "no such setting"),
        ("vae.frames.steps=0", "greater than 0"),
        ("vae.frames.steps=many", "got 'many'"),
        ("vae.frames.steps", "wants name=value"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(assignment, says):
    with pytest.raises(ConfigError) as caught:
        override(recipes.teach_shapes(), [assignment])
    assert says in str(caught.value)


def test_the_command_line_ends_with_2_and_one_line(tmp_path, capsys):
    assert main(["teach", "shapes", str(tmp_path / "run"), "--set", "vae.frames.stepz=7"]) == 2
    assert main(["teach", "cats", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[1] == "error: no teacher recipe 'cats'; there are: shapes"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_whole_configuration(tmp_path, capsys):
    assert main(["teach", "shapes", str(tmp_path / "run"), "--set", "seed=5", "--dry-run"]) == 0
    assert '"seed": 5' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
