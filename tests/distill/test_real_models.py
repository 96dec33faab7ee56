"""Every model that can be had, at tiny size, from a downloaded folder to a student that the stock pipeline calls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from distill import lineage, recipes, student
from distill.__main__ import main
from distill.config import ConfigError
from distill.run import distil
from tests.distill import tiny
from tests.footage import film
from tests.tiny import wan

RECIPES = {
    "ti2v-5b": "wan2.2-ti2v-5b",
    "i2v-14b": "wan2.1-i2v-14b",
    "i2v-a14b": "wan2.2-i2v-a14b",
    "t2v-1.3b": "wan2.1-t2v-1.3b",
    "t2v-a14b": "wan2.1-t2v-1.3b",
}
SMALL = {
    "preset": "smoke",
    "precision": "float32",
    "watched": 2,
    "importance.rho": 0.3,
    "importance.clips": 2,
    "pruning.unimportant": 1.0,
    "pruning.drift_limit": 1e9,
    "pruning.fit.accumulate": 1,
    "pruning.fit.batch": 2,
    "matching.fit.accumulate": 1,
    "matching.critic.rank": 2,
}


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Six short videos of a square that goes somewhere, with captions."""
    folder = tmp_path_factory.mktemp("footage")
    for number in range(6):

        def draw(second, width, height, number=number):
            frame = np.full((height, width, 3), 40 + 30 * number, np.uint8)
            left = number * 4 + round(20 * second)
            frame[10:26, left : left + 12] = (200, 30 * number, 90)
            return frame

        (folder / f"{number}.mp4").write_bytes(film(seconds=1, fps=16, width=48, height=48, draw=draw))
        (folder / f"{number}.txt").write_text(f"a square number {number} moves right")
    return folder


@pytest.fixture(scope="module", params=sorted(RECIPES))
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(variant, tmp_path_factory):
    folder = wan.folder(variant, tmp_path_factory.mktemp("teacher") / variant)
    sizes = {"width": wan.SIZE, "height": wan.SIZE, "num_frames": wan.FRAMES, "num_inference_steps": 2}
    sizes["max_sequence_length"] = wan.call(variant)["max_sequence_length"]
    assert main(["adopt", str(folder), *(f"--set={name}={value}" for name, value in sizes.items())]) == 0
    return folder


@pytest.fixture(scope="module")
def data(teacher, footage, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "prepared"
    assert main(["prepare", str(footage), str(out), "--model", str(teacher), "--set", "held_out=0.4"]) == 0
    return out


def recipe(variant, teacher, data, **more):
    values = {**SMALL, "teacher": str(teacher), "data": str(data), **more}
    return recipes.load(RECIPES[variant], tiny.settings(values))


@pytest.fixture(scope="module")
def run_folder(variant, teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    distil(folder, recipe(variant, teacher, data))
    return folder


def test_a_student_comes_out_that_the_stock_pipeline_calls(variant, run_folder, teacher):
    folder = run_folder / "student"
    card = student.read_card(folder)
    experts = 1 + variant.endswith("a14b")
    assert len(card.blocks.pruned) == experts
    assert card.call["num_inference_steps"] == 4
    assert card.call["guidance_scale"] == 1.0
    assert card.sigmas == pytest.approx((1.0, 0.9375, 0.8333, 0.625), abs=1e-3)
    for part in student.components(teacher).keys() - set(student.OWN):
        assert (folder / part).is_symlink()
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = {} if card.task == "t2v" else {"image": torch.zeros(1, 3, wan.SIZE, wan.SIZE)}
    if variant == "i2v-14b":
        image = {"image": Image.new("RGB", (wan.SIZE, wan.SIZE))}
    made = pipe(prompt="a boat", generator=torch.Generator().manual_seed(0), output_type="pt", **image, **card.call)
    assert made.frames.shape == (1, wan.FRAMES, 3, wan.SIZE, wan.SIZE)
    assert torch.isfinite(made.frames).all()


def test_its_lineage_holds_and_names_the_data(run_folder, data):
    recorded = json.loads((run_folder / lineage.DATA).read_text())
    assert recorded["data"] == data.name
    entries = {entry["name"]: entry for entry in student.read_card(run_folder / "student").stages}
    assert lineage.DATA in entries["latents"]["sha256"]
    assert main(["lineage", str(run_folder / "student")]) == 0


def test_the_same_command_has_nothing_left_to_do(variant, run_folder, teacher, data):
    before = student.read_card(run_folder / "student").sha256
    distil(run_folder, recipe(variant, teacher, data))
    assert student.read_card(run_folder / "student").sha256 == before


def test_a_student_can_be_of_one_of_two_experts(variant, teacher, data, run_folder, tmp_path):
    if not variant.endswith("a14b"):
        with pytest.raises(ConfigError, match="experts=low: the teacher is of one network"):
            distil(tmp_path / "run", recipe(variant, teacher, data, experts="low"))
        return
    distil(tmp_path / "run", recipe(variant, teacher, data, experts="low"), begun=run_folder)
    folder = tmp_path / "run" / "student"
    card = student.read_card(folder)
    assert set(range(wan.BLOCKS)) < set(card.blocks.pruned)  # all of the first expert's, and one of the second's
    assert len(card.blocks.kept) == wan.BLOCKS - 1
    assert set(student.components(folder)) == set(student.components(teacher)) - {"transformer_2"}
    assert "transformer_2" not in card.parameters
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.transformer_2 is None
    assert pipe.config.boundary_ratio is None
    assert pipe.transformer.config.num_layers == wan.BLOCKS - 1
    assert main(["lineage", str(folder)]) == 0


def test_the_drawn_world_is_not_for_it(variant, teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"data=shapes: .* is no model of that world; prepare clips"):
        distil(tmp_path / "run", recipe(variant, teacher, "shapes"))


def test_data_of_another_model_is_refused(variant, data, tmp_path):
    other = "t2v-1.3b" if variant != "t2v-1.3b" else "ti2v-5b"
    folder = wan.folder(other, tmp_path / other)
    sizes = {"width": wan.SIZE, "height": wan.SIZE, "num_frames": wan.FRAMES}
    main(["adopt", str(folder), *(f"--set={name}={value}" for name, value in sizes.items())])
    with pytest.raises(ConfigError, match="prepare the videos again"):
        distil(tmp_path / "run", recipe(other, folder, data))
    assert not (tmp_path / "run" / "student").exists()


def test_the_gate_holds_it_against_its_teacher(variant, run_folder, teacher, tmp_path, capsys):
    """In the reference form: no world is fitted to these. What a student of random weights is worth is no matter."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("one", "two"):
        (clips / f"{name}.txt").write_text(f"a boat, number {name}\n")
        if "t2v" not in variant:
            Image.new("RGB", (40, 40), (90, 20, 160)).save(clips / f"{name}.png")
    folder, out = str(run_folder / "student"), str(tmp_path / "gate")
    settings = [f"--set=gate.{name}" for name in (f"clips_from={clips}", "reference_clips=2", "clips=2")]
    code = main(["gate", folder, "--against", folder, "--teacher", str(teacher), "--out", out, *settings])
    assert code in (0, 3), capsys.readouterr().err
    verdict = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert {check["form"] for check in verdict["checks"]} == {"reference"}
    assert (tmp_path / "gate" / "sheet.png").exists()
