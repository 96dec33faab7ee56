"""Every model that can be had, at tiny size, from a downloaded folder to a student that the stock pipeline calls."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from distill import empty, lineage, student
from distill.__main__ import main
from distill.backbones import base
from distill.config import ConfigError
from distill.loop import Run
from distill.run import distil
from distill.stages.given import Given
from tests import tiny
from tests.real_models import RECIPES
from tests.tiny.wan import BLOCKS


@pytest.fixture(scope="module", params=sorted(RECIPES))
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(real_models, variant):
    return real_models.teacher(variant)


@pytest.fixture(scope="module")
def data(real_models, variant):
    return real_models.data(variant)


@pytest.fixture(scope="module")
def run_folder(real_models, variant):
    return real_models.run(variant)


def test_a_student_comes_out_that_the_stock_pipeline_calls(variant, run_folder, teacher):
    folder = run_folder / "student"
    card = student.read_card(folder)
    assert len(card.blocks.pruned) >= tiny.networks(variant)
    backbone = base.load(card.backbone, card.task)
    network = backbone.network(student.load_pipeline(folder, "cpu"))
    assert card.call["num_inference_steps"] == 4
    assert backbone.guidance_at(network, card.call, 0.5) == 1.0
    wanted = (1.0, 0.9545, 0.875, 0.7) if "hunyuan" in variant else (1.0, 0.9375, 0.8333, 0.625)
    assert card.sigmas == pytest.approx(wanted, abs=1e-3)
    for part in student.components(teacher).keys() - set(student.OWN):
        assert (folder / part).is_symlink()
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = card.video
    image = {} if card.task == "t2v" else {"image": Image.new("RGB", (size.width, size.height))}
    call = backbone.arguments(card.call)
    made = pipe(prompt="a boat", generator=torch.Generator().manual_seed(0), output_type="pt", **image, **call)
    assert made.frames.shape == (1, size.num_frames, 3, size.height, size.width)
    assert torch.isfinite(made.frames).all()


def test_its_lineage_holds_and_names_the_data(run_folder, data):
    recorded = json.loads((run_folder / lineage.DATA).read_text())
    assert recorded["data"] == data.name
    entries = {entry["name"]: entry for entry in student.read_card(run_folder / "student").stages}
    assert lineage.DATA in entries["latents"]["sha256"]
    assert main(["lineage", str(run_folder / "student")]) == 0


def test_the_same_command_has_nothing_left_to_do(real_models, variant, run_folder):
    before = student.read_card(run_folder / "student").sha256
    distil(run_folder, real_models.recipe(variant))
    assert student.read_card(run_folder / "student").sha256 == before


def test_what_encoded_the_clips_is_not_loaded_again(real_models, variant, tmp_path):
    run = Run(tmp_path, seed=0)
    with run.handling_signals():
        given = Given(run, real_models.recipe(variant))
    places = {
        name: {tensor.device.type for tensor in part.state_dict().values()}
        for name, part in given.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    encoders = {name for name, part in empty.parts(given.folder).items() if part.is_encoder}
    assert "text_encoder" in encoders & places.keys()
    assert places == {name: {"meta" if name in encoders else "cpu"} for name in places}


def test_a_student_can_be_of_one_of_two_experts(real_models, variant, teacher, run_folder, tmp_path):
    if tiny.networks(variant) == 1:
        with pytest.raises(ConfigError, match="experts=low: the teacher is of one network"):
            distil(tmp_path / "run", real_models.recipe(variant, experts="low"))
        assert not (tmp_path / "run").exists()
        return
    distil(tmp_path / "run", real_models.recipe(variant, experts="low"), begun=run_folder)
    folder = tmp_path / "run" / "student"
    card = student.read_card(folder)
    assert set(range(BLOCKS)) < set(card.blocks.pruned)  # all of the first expert's, and one of the second's
    assert len(card.blocks.kept) == BLOCKS - 1
    assert set(student.components(folder)) == set(student.components(teacher)) - {"transformer_2"}
    assert "transformer_2" not in card.parameters
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.transformer_2 is None
    assert pipe.config.boundary_ratio is None
    assert pipe.transformer.config.num_layers == BLOCKS - 1
    assert main(["lineage", str(folder)]) == 0


def test_the_drawn_world_is_not_for_it(real_models, variant, tmp_path):
    with pytest.raises(ConfigError, match=r"data=shapes: .* is no model of that world; prepare clips"):
        distil(tmp_path / "run", real_models.recipe(variant, data="shapes"))


def test_data_of_another_model_is_refused(real_models, variant, data, tmp_path):
    other = "t2v-1.3b" if variant != "t2v-1.3b" else "ti2v-5b"
    with pytest.raises(ConfigError, match="prepare the videos again"):
        distil(tmp_path / "run", real_models.recipe(other, data=str(data)))
    assert not (tmp_path / "run").exists()


def test_the_gate_holds_it_against_its_teacher(variant, run_folder, teacher, tmp_path, capsys):
    """In the reference form: no world is fitted to these. What a student of random weights is worth is no matter."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("one", "two"):
        (clips / f"{name}.txt").write_text(f"a boat, number {name}\n")
        if tiny.takes_an_image(variant):
            Image.new("RGB", (40, 40), (90, 20, 160)).save(clips / f"{name}.png")
    folder, out = str(run_folder / "student"), str(tmp_path / "gate")
    settings = [f"--set=gate.{name}" for name in (f"clips_from={clips}", "reference_clips=2", "clips=2")]
    code = main(["gate", folder, "--against", folder, "--teacher", str(teacher), "--out", out, *settings])
    assert code in (0, 3), capsys.readouterr().err
    verdict = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert {check["form"] for check in verdict["checks"]} == {"reference"}
    assert (tmp_path / "gate" / "sheet.png").exists()
