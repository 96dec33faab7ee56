"""`distill run` from a teacher's folder to a student's: resuming, the folder, what is refused."""

from __future__ import annotations

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
from safetensors.torch import load_file

from distill import loop, sampler, schedule, student
from distill.backbones import wan
from distill.config import ConfigError
from distill.data import shapes
from distill.run import distil
from tests.distill import tiny
from tests.stack import ROOT, wait_for


def test_the_run_leaves_its_traces(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names >= {"config.json", "stages.json", "events.jsonl", "tensorboard", "samples", "report.md", "student",
                     "importance.json", "importance.png", "pruning.safetensors", "matching.safetensors"}  # fmt: skip
    assert not [name for name in names if "tmp" in name or "checkpoint" in name]
    stages = [json.loads(line)["stage"] for line in (tiny_run / "events.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["latents", "importance", "pruning", "matching", "student"]
    assert "| blocks gone |" in (tiny_run / "report.md").read_text()


@pytest.mark.parametrize(("stage", "step"), [("pruning", 2), ("matching", 1), ("matching", 2)])
@pytest.mark.usefixtures("single_thread")
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny_run, tiny_config, tmp_path, monkeypatch, stage, step
):
    event = loop.Run.event

    def interrupting(self, stage_now, step_now, **values):
        event(self, stage_now, step_now, **values)
        if (stage_now, step_now) == (stage, step) and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "b"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "event", interrupting)
        with pytest.raises(loop.Interrupted):
            distil(folder, tiny_config)
    assert (folder / f"{stage}.checkpoint").exists()
    assert not (folder / "student").exists()
    distil(folder, tiny_config)
    for name in ("pruning", "matching"):
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (folder, tiny_run))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_does_nothing_again(tiny_run, tiny_config):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.safetensors")}
    assert distil(tiny_run, tiny_config) == tiny_run / "student"
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.safetensors")} == before


def test_another_run_takes_over_the_stages_that_are_the_same(tiny_run, tiny_teacher, tmp_path):
    other = tiny.recipe(tiny_teacher, **{"matching.rollout": "renoise"})
    distil(tmp_path / "b", other, begun=tiny_run)
    ours, theirs = tmp_path / "b", tiny_run
    assert os.path.samefile(ours / "pruning.safetensors", theirs / "pruning.safetensors")
    assert not os.path.samefile(ours / "matching.safetensors", theirs / "matching.safetensors")
    # What they logged comes with them, so the student's card says how long they were.
    cards = [student.read_card(run / "student") for run in (ours, theirs)]
    assert cards[0].stages[-3:-1] == cards[1].stages[-3:-1]
    assert [stage["iterations"] for stage in cards[0].stages[-3:]] == [1, 4, 3]


def test_killed_before_its_report_the_run_writes_it_the_next_time(tiny_run, tiny_config, tmp_path):
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run", symlinks=True))
    (folder / "report.md").unlink()
    (folder / "samples" / "student.png").unlink()
    distil(folder, tiny_config)
    assert (folder / "report.md").exists()
    assert (folder / "samples" / "student.png").exists()


def test_without_git_the_card_has_the_version_alone(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert list(student.code_version()) == ["version"]


# --- the student's folder -------------------------------------------------------------------------------------------


def test_the_student_is_a_stock_pipeline_with_fewer_blocks_and_four_steps(tiny_run, tiny_config):
    card = student.read_card(tiny_run / "student")
    assert card.kind == "student"
    assert card.call["num_inference_steps"] == 4
    assert card.call["guidance_scale"] == 1.0
    assert card.blocks is not None
    assert set(card.blocks.kept) | set(card.blocks.pruned) == set(range(tiny.NUM_LAYERS))
    assert card.blocks.block_ratio == pytest.approx(len(card.blocks.kept) / tiny.NUM_LAYERS)
    assert card.teacher == student.Origin(
        name="tiny-teacher", sha256=student.read_card(Path(tiny_config.teacher)).sha256
    )
    pipe, info = wan.WanTransformer3DModel.from_pretrained(
        tiny_run / "student" / "transformer", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values())
    assert len(pipe.blocks) == len(card.blocks.kept)


def test_trainer_scheduler_and_sampler_have_one_list_of_noise_levels(tiny_run, given):
    few = given.config.student
    scheduler = schedule.few_step_scheduler(wan, few)
    trained = tuple(scheduler.sigmas.tolist())
    card = student.read_card(tiny_run / "student")
    stock = DiffusionPipeline.from_pretrained(tiny_run / "student", dtype=torch.float32, local_files_only=True)
    visited: list[float] = []
    transformer = stock.transformer
    forward = transformer.forward

    def spying(*, timestep, **rest):
        visited.append(timestep.max().item() / 1000)
        return forward(timestep=timestep, **rest)

    transformer.forward = spying
    image = shapes.clips(0, [shapes.SPLITS["dev"][0]]).video_BCTHW[:, :, 0] / 2 + 0.5
    stock(image=image, prompt="a red circle grows", output_type="pt", **card.call)
    assert tuple(stock.scheduler.sigmas.tolist()) == trained  # to the bit
    assert visited == pytest.approx(trained[:-1], abs=1e-6)
    assert card.sigmas == tuple(round(sigma, 6) for sigma in trained[:-1])
    assert trained == pytest.approx((1.0, 0.9375, 0.8333, 0.625, 0.0), abs=4e-4)


def test_stock_diffusers_makes_what_the_trainer_s_sampler_makes(tiny_run):
    folder = tiny_run / "student"
    card = student.read_card(folder)
    stock = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    clips = shapes.clips(0, shapes.SPLITS["dev"][:2])
    prompts = [str(caption) for caption in clips.captions]
    noise = sampler.draw_noise(wan, stock, range(2), card.call)
    given_BCHW = clips.video_BCTHW[:, :, 0]
    ours = sampler.sample(wan, student.load_pipeline(folder, "cpu"), given_BCHW, prompts, card.call, noise)
    for i, prompt in enumerate(prompts):
        image = clips.video_BCTHW[i : i + 1, :, 0] / 2 + 0.5
        generator = torch.Generator().manual_seed(i)
        theirs = stock(image=image, prompt=prompt, generator=generator, output_type="pt", **card.call).frames
        assert torch.allclose(ours[i].transpose(0, 1), theirs[0] * 2 - 1, atol=1e-4)


def test_what_the_teacher_s_folder_holds_is_linked_and_hashed(tiny_run, tiny_teacher):
    folder = tiny_run / "student"
    for part in ("vae", "text_encoder", "tokenizer"):
        assert (folder / part).is_symlink()
        assert not os.path.isabs(os.readlink(folder / part))
        assert (folder / part).resolve() == (tiny_teacher / part).resolve()
    assert "vae/diffusion_pytorch_model.safetensors" in student.read_card(folder).files


def test_a_tampered_or_incomplete_student_is_refused(tiny_run, tmp_path):
    folder = Path(shutil.copytree(tiny_run / "student", tmp_path / "student"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.625", "0.5"))
    with pytest.raises(student.FolderError, match=r"scheduler_config.json has sha256 .* was changed"):
        student.read_card(folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(tiny_run / "student" / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    with pytest.raises(student.FolderError, match=r"vae/config.json is missing"):
        student.read_card(folder)


def test_published_it_is_linked_to_the_teacher_beside_it(tiny_run, tiny_teacher, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(tiny_teacher, models / "teacher")
    card = student.publish(tiny_run / "student", models / "few", models / "teacher")
    assert os.readlink(models / "few" / "vae") == "../teacher/vae"
    assert card.name == "few"
    moved = models.rename(tmp_path / "elsewhere")
    assert student.read_card(moved / "few").sha256 == card.sha256
    assert not list(moved.glob("*.tmp"))


def test_published_to_another_teacher_it_is_refused(tiny_run, tmp_path):
    other = tiny.make_teacher(tmp_path / "teacher")
    card = student.read_card(other)
    student.write_card(other, card.model_copy(update={"name": "another"}))
    with pytest.raises(student.FolderError, match=r"was made from tiny-teacher .* is another .*: name its own teacher"):
        student.publish(tiny_run / "student", tmp_path / "few", other)
    assert not (tmp_path / "few").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def distill_run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill", "run", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["circles"], "no recipe 'circles'; there are: shapes"),
        (["shapes", "--set", "preset=slow"], "no preset 'slow'; there are: full, quick, smoke"),
        (
            ["shapes", "--set", "matching.beta=1"],
            "--set matching.beta: no such setting; here there are: scores, critic",
        ),
        (["shapes", "--set", "pruning.alpha=2"], "--set pruning.alpha: got 2; Input should be less than or equal to 1"),
        (["shapes", "--set", "watched=200"], "--set watched: got 200; Input should be less than or equal to 96"),
        (["shapes", "--set", "student.num_inference_steps=0"], "Input should be greater than or equal to 1"),
        (["shapes", "--set", "matching.scores.beta_2=[1, 0]"], "beta_2: the first of (1.0, 0.0) is the larger one"),
        (
            ["shapes", "--set", "matching.scores.alpha_weak=.5", "--set", "matching.critic.kind=full"],
            "--set matching: Value error, scores.alpha_weak is a share of the critic's LoRA",
        ),
        (["shapes", "--set", "matching.rollout=back"], "Input should be 'renoise', 'euler' or 'data'"),
        (
            ["shapes", "--set", "teacher=models"],
            "models is no model folder: it has neither student.json nor teacher.json",
        ),
        (["shapes", "--from", "nowhere"], "--from nowhere: there is no run; give the folder of an earlier"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line_and_exit_2(tmp_path, arguments, message):
    recipe, *settings = arguments
    done = distill_run(recipe, str(tmp_path / "run"), *settings)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert "Traceback" not in done.stderr


def test_terminated_it_ends_with_75_and_resumes(tiny_teacher, tmp_path):
    folder = tmp_path / "run"
    settings = tiny.settings({**tiny.RECIPE, "teacher": str(tiny_teacher), "pruning.fit.steps": 300})
    command = [sys.executable, "-m", "distill", "run", "shapes", str(folder), *(f"--set={value}" for value in settings)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    events = folder / "events.jsonl"
    wait_for(lambda: events.exists() and '"pruning"' in events.read_text(), 120, "a step of stage II")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert (folder / "pruning.checkpoint").exists()


def test_a_student_that_never_looks_right_is_one_clear_line_and_exit_2(tiny_teacher, tmp_path):
    values = {**tiny.RECIPE, "teacher": str(tiny_teacher), "pruning.drift_limit": 1e-12}
    done = distill_run("shapes", str(tmp_path / "run"), *(f"--set={value}" for value in tiny.settings(values)))
    assert done.returncode == 2, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the full-depth path has drifted by" in said
    assert not (tmp_path / "run" / "student").exists()


def test_a_student_is_no_teacher(tiny_run, tmp_path):
    config = tiny.recipe(tiny_run / "student")
    with pytest.raises(ConfigError, match=r"student is a student; give the folder of a teacher"):
        distil(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_is_not_here_is_one_clear_error(tiny_teacher, tmp_path):
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    student.write_card(other, student.read_card(other).model_copy(update={"backbone": "mochi"}))
    with pytest.raises(ConfigError, match=r"the model is of backbone mochi, task ti2v; what is known is wan \(ti2v\)"):
        distil(tmp_path / "run", tiny.recipe(other))
    assert not (tmp_path / "run").exists()


def test_another_configuration_or_teacher_in_the_same_folder_is_refused(tiny_run, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"was begun with other settings \(they differ in: seed\)"):
        distil(tiny_run, tiny_config.model_copy(update={"seed": 7}))
    copied = Path(shutil.copytree(tiny_run, tmp_path / "run", symlinks=True))
    stages = json.loads((copied / "stages.json").read_text())
    (copied / "stages.json").write_text(json.dumps({**stages, "latents": "0" * 64}))
    with pytest.raises(ConfigError, match=r"was begun with another version of .*teacher; take a new folder"):
        distil(copied, tiny_config)


def test_a_dry_run_prints_the_resolved_configuration(tmp_path):
    done = distill_run("shapes", str(tmp_path / "run"), "--dry-run", "--set", "preset=quick", "--set", "seed=5")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert (config["preset"], config["seed"], config["num_clips"]) == ("quick", 5, 1024)
    assert not (tmp_path / "run").exists()
