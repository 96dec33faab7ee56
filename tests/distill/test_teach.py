"""`distill teach` end to end with tiny networks of the real classes: signal, resume, folder, stock pipeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from distill import evaluate, losses, sampler, student, teach
from distill.backbones import wan
from distill.config import TeachConfig
from distill.data import shapes
from distill.stages.given import Batch
from tests.stack import ROOT, wait_for

TINY = {
    "vae.base_dim": 8,
    "vae.dim_mult": [1, 2, 2],
    "vae.z_dim": 16,
    "vae.compile": False,
    "transformer.compile": False,
    "vae.frames.steps": 3,
    "vae.frames.batch": 2,
    "vae.clips.steps": 2,
    "vae.clips.batch": 1,
    "vae.polish.steps": 2,
    "vae.polish.batch": 1,
    "transformer.num_layers": 2,
    "transformer.num_attention_heads": 2,
    "transformer.attention_head_dim": 12,
    "transformer.ffn_dim": 32,
    "transformer.text_dim": 32,
    "transformer.text_layers": 1,
    "transformer.num_clips": 8,
    "transformer.fit.steps": 3,
    "transformer.fit.batch": 4,
    "call.num_inference_steps": 3,
    "call.guidance_scale": 2.0,
}


def command(folder: Path, **more) -> list[str]:
    settings = [f"--set={name}={json.dumps(value)}" for name, value in {**TINY, **more}.items()]
    return [sys.executable, "-m", "distill", "teach", "shapes", str(folder), *settings]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teach") / "run"
    done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def pipeline(run_folder):
    return DiffusionPipeline.from_pretrained(run_folder / "teacher", dtype=torch.float32, local_files_only=True)


def test_the_run_leaves_its_traces(run_folder):
    config = TeachConfig.model_validate_json((run_folder / "config.json").read_text())
    assert config.vae.frames.steps == 3
    stages = {json.loads(line)["stage"] for line in (run_folder / "events.jsonl").read_text().splitlines()}
    assert stages == {"vae-frames", "vae-clips", "vae-polish", "latents", "transformer", "teach"}
    assert sorted(p.name for p in (run_folder / "samples").iterdir()) == [
        "transformer-000003.png",
        "vae-clips-000002.png",
        "vae-frames-000003.png",
        "vae-polish-000002.png",
    ]
    assert list((run_folder / "tensorboard").glob("events.out.tfevents.*"))


def test_latents_are_normalised_from_data(run_folder, pipeline):
    stored = load_file(run_folder / "latents.safetensors")
    assert stored["latents"].shape == (8, 16, 5, 8, 8)
    assert stored["latents"].float().mean(dim=(0, 2, 3, 4)).abs().max() < 1e-2
    assert stored["latents"].float().std(dim=(0, 2, 3, 4)).sub(1).abs().max() < 1e-2
    assert pipeline.vae.config.latents_mean == pytest.approx(stored["mean"].tolist())
    video = shapes.clips(0, [shapes.SPLITS["train"][2]]).video_BCTHW
    error = wan.encode_video(pipeline.vae, video)[0] - stored["latents"][2].float()
    assert error.square().mean() < 1e-3  # of a variance of 1: matrix products in bfloat16


def test_the_tokenizer_is_saved_as_it_was_made(run_folder, tmp_path):
    teach.make_tokenizer().save_pretrained(tmp_path)
    saved = run_folder / "teacher" / "tokenizer" / "tokenizer.json"
    assert json.loads(saved.read_text()) == json.loads((tmp_path / "tokenizer.json").read_text())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_our_sampler_equals_the_stock_pipeline(run_folder, pipeline, guidance_scale):
    """Eight clips at once by our sampler, one after another by diffusers' loop: the same seeds give the same videos."""
    clips = shapes.clips(0, shapes.SPLITS["dev"][3:11])
    prompts = [str(caption) for caption in clips.captions]
    call = {**student.read_card(run_folder / "teacher").call, "guidance_scale": guidance_scale}
    noise = sampler.draw_noise(wan, pipeline, range(8), call)
    ours = sampler.sample(wan, evaluate.load(run_folder / "teacher"), clips.video_BCTHW[:, :, 0], prompts, call, noise)
    for i, prompt in enumerate(prompts):
        image = clips.video_BCTHW[i : i + 1, :, 0] / 2 + 0.5
        generator = torch.Generator().manual_seed(i)
        stock = pipeline(image=image, prompt=prompt, generator=generator, output_type="pt", **call).frames
        assert torch.allclose(ours[i].transpose(0, 1), stock[0] * 2 - 1, atol=2e-3)
    roughly = sampler.sample(wan, pipeline, clips.video_BCTHW[:, :, 0], prompts, call, noise, torch.bfloat16)
    assert 0 < (roughly - ours).square().mean().sqrt() < 0.02


def test_the_first_frame_is_given_and_its_loss_left_out(pipeline):
    x0 = torch.randn(1, 16, 5, 8, 8)
    noise = torch.randn_like(x0)
    velocity = noise - x0
    velocity[:, :, 0] += 100
    text = wan.encode_text(pipeline, ["a red circle grows"], {"max_sequence_length": 32})
    batch = Batch(
        x0, x0.shape[1:], wan.image_of(x0, {}), text, text, wan.GIVEN_FRAMES, ["a red circle grows"], x0.device
    )
    assert losses.flow_matching(*batch.made(velocity, x0, noise)) == 0
    sigma = torch.tensor([0.7])
    one = wan.predict_velocity(pipeline.transformer, x0, sigma, batch.image, text)
    replaced = torch.cat([torch.full_like(x0[:, :, :1], 9.0), x0[:, :, 1:]], 2)
    two = wan.predict_velocity(pipeline.transformer, replaced, sigma, batch.image, text)
    assert torch.equal(one, two)  # what stood at the first frame was replaced by the given one


def test_the_tokenizer_reads_every_word_as_one_piece(pipeline):
    text = "a purple triangle spins counterclockwise slowly, camera zooms out, and a star enters"
    tokens = pipeline.tokenizer(text).input_ids
    assert pipeline.tokenizer.unk_token_id not in tokens
    assert len(tokens) == len(text.replace(",", " ,").split()) + 1
    assert pipeline.tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_terminated_it_ends_with_75_and_keeps_its_steps(tmp_path):
    folder = tmp_path / "run"
    more = {"vae.frames.steps": 400, "vae.frames.log_every": 1}
    process = subprocess.Popen(command(folder, **more), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    events = folder / "events.jsonl"
    wait_for(lambda: events.exists() and events.read_text().count("\n") >= 2, 120, "two steps")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert (folder / "vae-frames.checkpoint").exists()
    # Other settings are refused: they would make another run of it.
    other = command(folder, **{**more, "seed": 9})
    refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "(they differ in: seed); give the same ones to go on, or another folder to begin anew" in refused.stderr


# --- the folder's card ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(run_folder, tmp_path) -> Path:
    return Path(shutil.copytree(run_folder / "teacher", tmp_path / "teacher"))


def test_a_good_folder_reads(copy):
    card = student.read_card(copy)
    assert card.call["guidance_scale"] == 2.0
    assert card.sigmas[0] == 1.0
    assert len(card.sigmas) == 3
    assert card.parameters["transformer"] > 0
    assert "transformer/diffusion_pytorch_model.safetensors" in card.files


def test_a_changed_file_is_refused(copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(student.FolderError, match=r"vae/diffusion_pytorch_model.safetensors has sha256 .* was changed"):
        student.read_card(copy)


def test_a_missing_file_is_refused(copy):
    os.remove(copy / "tokenizer" / "tokenizer.json")
    with pytest.raises(student.FolderError, match=r"tokenizer\.json is missing"):
        student.read_card(copy)


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(student.FolderError, match=r"neither student.json nor teacher.json"):
        student.read_card(tmp_path)


def test_a_num_layers_that_does_not_fit_is_refused(copy):
    """diffusers would fill the missing blocks with random weights and only warn."""
    card = student.read_card(copy)
    config = copy / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    student.write_card(copy, card)  # the hashes are right again
    with pytest.raises(student.FolderError, match=r"says num_layers 3, and .* hold blocks \[0, 1\]"):
        student.read_card(copy)


def test_missing_weights_of_a_block_are_refused(copy):
    card = student.read_card(copy)
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("blocks.1.")}, path)
    student.write_card(copy, card)
    with pytest.raises(student.FolderError, match=r"hold blocks \[0\]"):
        student.read_card(copy)


# --- distill evaluate -----------------------------------------------------------------------------------------------


def run_evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distill", "evaluate", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_evaluate_writes_a_report_and_stores_the_better_setting(copy, tmp_path):
    out = tmp_path / "report"
    few = ("--clips=6", "--seeds=2", "--pairs=0", "--steps", "1", "2", "--split=dev", f"--out={out}", "--store-best")
    done = run_evaluate(copy, *few)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "report.json").read_text())
    assert [s["num_inference_steps"] for s in found["settings"]] == [1, 2]
    assert found["closed"] == [True] * 3 + [False] * 3
    for setting in found["settings"]:
        values = setting["values"]["score"]
        assert len(values) == 2  # seeds
        assert len(values[0]) == 6
        mean, low, high = setting["summary"]["all"]["score"]
        assert mean == pytest.approx(sum(sum(row) for row in values) / 12, abs=1e-4)
        assert low <= mean <= high
        # Only closed captions have one true clip.
        assert [value is None for value in setting["values"]["psnr_db"][0]] == [False] * 3 + [True] * 3
    assert "| metric | all | closed | open |" in done.stdout
    assert "## Against 1 steps, guidance 2" in done.stdout
    assert {"metrics.png", "sheet.png", "sheet-2-2.png", "report.md"} <= {p.name for p in out.iterdir()}
    best = max(found["settings"], key=lambda s: s["summary"]["all"]["score"][0])["num_inference_steps"]
    card = student.read_card(copy)  # its hashes are right
    assert card.call["num_inference_steps"] == best
    assert len(card.sigmas) == best


def test_evaluate_refuses_what_it_cannot_do(copy, tmp_path):
    chosen_on_test = run_evaluate(copy, "--store-best")
    assert chosen_on_test.returncode == 2
    assert "choices are made on the dev split: add --split dev" in chosen_on_test.stderr
    no_model = run_evaluate(tmp_path)
    assert no_model.returncode == 2
    assert "is no model folder" in no_model.stderr
