"""A downloaded folder becomes a teacher, or one line says why not."""

from __future__ import annotations

import json
import shutil

import pytest

from distill import student
from distill.__main__ import main
from tests.tiny import wan as tiny

SIZES = ["--set", f"width={tiny.SIZE}", "--set", f"height={tiny.SIZE}", "--set", f"num_frames={tiny.FRAMES}"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {variant: tiny.folder(variant, root / variant) for variant in tiny.VARIANTS}


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals["i2v-14b"], tmp_path / "model")


@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_the_card_says_what_the_folder_is(originals, variant, tmp_path, capsys):
    folder = shutil.copytree(originals[variant], tmp_path / variant)
    assert main(["adopt", str(folder), *SIZES, "--set", "negative_prompt=blurred"]) == 0
    card = student.read_card(folder)
    assert f"{card.backbone}, task {card.task}" in capsys.readouterr().out
    assert card.backbone == tiny.VARIANTS[variant]
    assert card.task == ("t2v" if "t2v" in variant else "ti2v")
    # The stock pipeline's own, where nothing else was asked for.
    assert (card.call["num_inference_steps"], card.call["guidance_scale"]) == (50, 5.0)
    assert card.call["max_sequence_length"] == 512
    assert card.call["negative_prompt"] == "blurred"
    assert (card.video.width, card.video.num_frames, card.video.fps) == (tiny.SIZE, tiny.FRAMES, 16)
    assert len(card.sigmas) == 50
    pipe = tiny.pipeline(variant)
    assert card.parameters["transformer"] == sum(p.numel() for p in pipe.transformer.parameters())
    assert ("transformer_2" in card.parameters) == variant.endswith("a14b")


def refused(folder, capsys, *more):
    assert main(["adopt", str(folder), *SIZES, *more]) == 2
    assert not (folder / "teacher.json").exists()
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_unknown_class_is_refused(folder, capsys):
    changed(folder / "model_index.json", _class_name="MochiPipeline")
    assert "is of class MochiPipeline; known are WanImageToVideoPipeline, " in refused(folder, capsys)


def test_no_pipeline_folder_is_refused(tmp_path, capsys):
    assert "model_index.json cannot be read" in refused(tmp_path, capsys)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "transformer", "image_encoder"])
def test_a_missing_component_is_named(folder, part, capsys):
    shutil.rmtree(folder / part)
    assert f"{part} is missing, and model_index.json lists it" in refused(folder, capsys)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_a_component_that_is_not_listed_is_named(folder, part, capsys):
    index = json.loads((folder / "model_index.json").read_text())
    del index[part]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert f"has no {part}, which WanImageToVideoPipeline needs" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("part", "setting", "said"),
    [
        ("text_encoder", "d_model", "says text_dim 16, and the text_encoder beside it has d_model 24"),
        ("image_encoder", "hidden_size", "says image_dim 16, and the image_encoder beside it has hidden_size 24"),
        ("vae", "z_dim", "says out_channels 4, and the vae beside it has z_dim 24"),
    ],
)
def test_parts_of_different_models_are_refused(folder, part, setting, said, capsys):
    changed(folder / part / "config.json", **{setting: 24})
    assert said in refused(folder, capsys)


def test_a_transformer_with_other_blocks_than_it_says_is_refused(folder, capsys):
    changed(folder / "transformer" / "config.json", num_layers=5)
    assert "says num_layers 5, and the weights beside it hold blocks [0, 1, 2]" in refused(folder, capsys)


def test_what_the_pipeline_does_not_take_is_refused(folder, capsys):
    assert "has no true cfg scale; leave it out" in refused(folder, capsys, "--set", "true_cfg_scale=2")
    assert "colour: no such setting" in refused(folder, capsys, "--set", "colour=red")


def test_what_is_for_two_tasks_has_to_be_told_which(originals, tmp_path, capsys):
    folder = shutil.copytree(originals["ti2v-5b"], tmp_path / "5b")
    changed(folder / "model_index.json", _class_name="WanPipeline")  # as it is released
    assert "makes videos from text, and from an image: give --set task=ti2v or task=t2v" in refused(folder, capsys)
    other = shutil.copytree(folder, tmp_path / "5b-t2v")
    assert main(["adopt", str(folder), *SIZES, "--set", "task=ti2v"]) == 0
    assert (student.read_card(folder).backbone, student.read_card(folder).task) == ("wan", "ti2v")
    assert type(student.load_pipeline(folder, "cpu")).__name__ == "WanImageToVideoPipeline"
    assert main(["adopt", str(other), *SIZES, "--set", "task=t2v"]) == 0
    assert (student.read_card(other).backbone, student.read_card(other).task) == ("wan-t2v", "t2v")


def test_a_card_that_is_there_is_left_alone(folder, capsys):
    assert main(["adopt", str(folder), *SIZES]) == 0
    before = (folder / "teacher.json").read_bytes()
    assert main(["adopt", str(folder), *SIZES]) == 2
    assert "teacher.json is there: the folder is a model already" in capsys.readouterr().err
    assert (folder / "teacher.json").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("width=30", "width=30: model makes multiples of 16; give one"),
        ("num_frames=10", "num_frames=10: model makes 4 n + 1 frames; give so many"),
        ("guidance_scale_2=2", "guidance_scale_2=2.0: model has one expert; leave it out"),
        ("max_sequence_length=16", "max_sequence_length=16: with an image's tokens before them 512 are taken"),
        ("task=t2v", "whose task is ti2v; leave task=t2v out"),
    ],
)
def test_a_call_that_the_model_cannot_make_is_refused(folder, setting, said, capsys):
    assert said in refused(folder, capsys, "--set", setting)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("model_index.json", "[]", "model_index.json cannot be read"),
        ("model_index.json", "{}", "is of class None; known are"),
        ("scheduler/scheduler_config.json", "no JSON", "scheduler_config.json is no "),
        ("transformer/config.json", "{}", "is of class None; known are"),
    ],
)
def test_a_broken_file_is_one_line(folder, file, text, said, capsys):
    (folder / file).write_text(text)
    assert said in refused(folder, capsys)


def test_a_boundary_belongs_to_two_experts(folder, capsys):
    changed(folder / "model_index.json", boundary_ratio=0.9)
    assert "says boundary_ratio 0.9, and there is no transformer_2" in refused(folder, capsys)


def test_weights_that_were_not_downloaded_are_missed(folder, capsys):
    for path in (folder / "text_encoder").glob("*.safetensors"):
        path.unlink()
    assert "text_encoder holds no weights; download the whole folder" in refused(folder, capsys)


def test_a_downloader_s_cache_is_no_part_of_it(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.lock").touch()
    assert main(["adopt", str(folder), *SIZES]) == 0
    assert not [name for name in student.read_card(folder).files if name.startswith(".")]
