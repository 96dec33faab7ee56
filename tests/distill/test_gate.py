"""The gate lets a good student through and refuses every known failure, drawn or real, in both of its forms."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distill import evaluate, gate, recipes, reference, student
from distill.__main__ import main
from distill.backbones import wan
from distill.config import ConfigError
from tests.stack import ROOT

ACTIVE, TEACHER = ROOT / "models" / "shapes-4step", ROOT / "models" / "shapes-teacher"
SMOKE = ["preset=smoke"]


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Three clips can be drawn again in ten ways: two hundred resamples see them all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "RESAMPLES", 200)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trial() -> gate.Trial:
    """The bundled student against itself and its teacher."""
    return gate.Trial(ACTIVE, ACTIVE, TEACHER, recipes.load_gate("shapes", SMOKE), lambda _: None)


def other_noise(trial: gate.Trial, seed: int) -> gate.Made:
    """What the bundled student makes of the same images and prompts from other noise."""
    made = trial.made["new"]
    clips = gate.load_clips(trial.config.model_copy(update={"seed": seed}), made.card)
    video_BCTHW = clips.make(evaluate.load(ACTIVE), made.card, trial.config.clips)
    assert not torch.equal(video_BCTHW, made.video_BCTHW)
    return replace(made, video_BCTHW=video_BCTHW)


def broken(folder: Path, made: Path, teacher: Path, spoil) -> Path:
    """A real folder: a student's, with weights that ``spoil`` has changed."""
    transformer = wan.WanTransformer3DModel.from_pretrained(made / "transformer", local_files_only=True)
    with torch.no_grad():
        spoil(transformer)

    def save_parts(aside: Path) -> None:
        transformer.save_pretrained(aside / "transformer")
        shutil.copytree(made / "scheduler", aside / "scheduler")
        shutil.copy(made / "model_index.json", aside / "model_index.json")

    card = student.read_card(made).model_copy(update={"name": folder.name, "kind": "student"})
    student.write_student(folder, teacher, card, save_parts)
    return folder


def silenced(transformer) -> None:
    """No velocity: the noise stays what it is."""
    transformer.proj_out.weight.zero_()
    transformer.proj_out.bias.zero_()


def overdriven(transformer) -> None:
    """Every velocity is too long, as after too much guidance: colours burn."""
    transformer.proj_out.weight.mul_(1.6)
    transformer.proj_out.bias.mul_(1.6)


def deaf(transformer) -> None:
    """Every prompt is heard as the same one."""
    transformer.condition_embedder.text_embedder.linear_2.weight.zero_()


REAL = {"silenced": silenced, "overdriven": overdriven, "deaf": deaf}


@pytest.fixture(scope="module")
def verdicts(trial, tmp_path_factory) -> dict[str, gate.Verdict]:
    """On the bundled student, on its clips spoiled in each known way, and on folders that are really broken."""
    found = gate.failures(trial)
    for name, spoil in REAL.items():
        folder = broken(tmp_path_factory.mktemp("broken") / name, ACTIVE, TEACHER, spoil)
        card = student.read_card(folder)
        video_BCTHW = trial.clips.make(evaluate.load(folder), card, trial.config.clips)
        made = replace(trial.made["new"], card=card, video_BCTHW=video_BCTHW)
        found[f"folder: {name}"] = trial.judge(made)
    return found


# --- what is let through --------------------------------------------------------------------------------------------


def test_the_active_student_passes_against_itself(verdicts):
    assert verdicts["none"].passed
    assert {check.form for check in verdicts["none"].checks} == {"ground truth", "reference"}
    assert all(check.value == 0 for check in verdicts["none"].checks if check.form == "ground truth")


def test_the_same_student_passes_with_other_noise(trial):
    verdict = trial.judge(other_noise(trial, seed=1))
    assert verdict.passed, verdict.refusals


def test_the_teacher_passes(trial):
    verdict = trial.judge(trial.made["teacher"])
    assert verdict.passed, verdict.refusals


# --- what is refused ------------------------------------------------------------------------------------------------


def test_both_forms_refuse_every_known_failure(verdicts):
    table = gate.catch_table(verdicts)
    print(table)
    assert gate.all_caught(verdicts), table
    wanted = {"static", "flashing", "flat colour", "black after frame 1", "exaggerated motion", "over-saturation"}
    assert set(gate.FAILURES) == wanted
    assert {f"folder: {name}" for name in REAL} <= set(verdicts)
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[1:] for row in rows if row[0] == "| none"] == [["passed", "passed |"]]
    assert sum("passed" in cell for row in rows for cell in row) == 2


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("static", "reference, motion: the videos stand still"),
        ("flashing", "reference, flicker: the videos flash"),
        ("flat colour", "reference, dead_frames: frames are black, of one colour, or no numbers"),
        ("black after frame 1", "reference, dead_frames: frames are black, of one colour, or no numbers"),
        ("exaggerated motion", "ground truth, trajectory_error_px: the subject does not go where it should"),
        ("over-saturation", "reference, saturation: the colours are over-saturated"),
        ("folder: overdriven", "reference, saturation: the colours are over-saturated"),
        ("folder: deaf", "ground truth, prompt_following: the prompt is not followed"),
    ],
)
def test_a_failure_is_called_by_its_name(verdicts, failure, says):
    assert says in verdicts[failure].refusals


def test_the_reference_form_sees_blur_by_itself(trial):
    """For most models there is no other form."""
    made = trial.made["new"]
    blurred_BCTHW = F.avg_pool3d(made.video_BCTHW, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)
    verdict = trial.judge(replace(made, video_BCTHW=blurred_BCTHW))
    assert "reference, detail: edges are washed out" in verdict.refusals


def test_the_reference_form_sees_blocks_out_of_order_by_itself(trial, tmp_path):
    def swapped(transformer) -> None:
        transformer.blocks.insert(0, transformer.blocks.pop(1))

    folder = broken(tmp_path / "swapped", ACTIVE, TEACHER, swapped)
    card = student.read_card(folder)
    video_BCTHW = trial.clips.make(evaluate.load(folder), card, trial.config.clips)
    verdict = trial.judge(replace(trial.made["new"], card=card, video_BCTHW=video_BCTHW))
    assert "reference, warp_error: things change that do not move" in verdict.refusals


@pytest.mark.parametrize("changed", [{"shift": 5.0}, {"shift_terminal": 0.3}])
def test_another_schedule_than_it_was_made_for_is_refused(tiny_run, tiny_teacher, tmp_path, changed):
    """Its clips look as good to both forms: they are compared with nothing but the card."""
    folder = broken(tmp_path / "student", tiny_run / "student", tiny_teacher, lambda _: None)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    student.write_card(folder, student.parse_card(folder / "student.json"))
    config = recipes.load_gate("shapes", ["gate.clips=2", "gate.reference_clips=2"])
    with pytest.raises(student.FolderError, match=r"scheduler visits the noise levels .*, and student\.json says"):
        gate.gate(folder, tiny_teacher, tiny_teacher, tmp_path / "out", config, lambda _: None)


def test_a_video_that_is_no_number_is_the_worst_that_there_is(trial):
    made = trial.made["new"]
    video_BCTHW = made.video_BCTHW[:1].clone()
    video_BCTHW[:, 0, 5, 0, 0] = torch.nan
    world = gate.shapes.clips(0, gate.fixed_indices(1))
    values = gate.measure(video_BCTHW, world, made.reconstruct)
    assert {name: value.item() for name, value in values.items()} == {
        **dict.fromkeys(values, 0.0),
        "trajectory_error_px": 64.0,
    }
    looks = reference.looks(video_BCTHW, trial.clips.given_BCHW[:1])
    assert looks.figures["dead_frames"].item() == 1 and looks.figures["motion"].isnan().all()
    teachers = reference.looks(made.video_BCTHW[:1], trial.clips.given_BCHW[:1])
    checks = gate.reference_checks(looks, teachers, trial.config.reference, far=2.0)
    assert {"dead_frames", "motion"} <= {check.name for check in checks if not check.ok}


# --- the limits -----------------------------------------------------------------------------------------------------


def checked(values, allowed=(-0.1, float("inf")), far=2.0, ratio=False) -> gate.Check:
    return gate.hold("reference", "first_frame_ssim", torch.tensor(values), allowed, far, ratio)


def test_a_limit_refuses_what_is_surely_beyond_it_or_far_beyond_it():
    assert checked([0.0, 0.01, -0.02, 0.0]).ok
    assert checked([-0.12, 0.0, -0.2, -0.15]).ok  # beyond on the mean, not surely
    assert not checked([-0.12, -0.13, -0.12, -0.13]).ok
    assert not checked([0.0, 0.0, 0.0, -0.9]).ok  # who knows, but too far off to let it through
    assert checked([0.0, 0.0, 0.0, -0.9], far=4).ok
    assert not checked([torch.nan] * 4).ok


def test_ratios_are_told_as_ratios_and_have_two_ends():
    found = checked([0.0, 0.1, -0.1], (0.5, 2.0), ratio=True)
    assert found.ok and found.value == pytest.approx(1.0) and found.allowed == (0.5, 2.0)
    assert checked([0.8, 0.9, 1.0], (0.5, 2.0), ratio=True).in_margins[0] == pytest.approx(0.9 / 0.693, abs=0.01)
    assert not checked([0.8, 0.9, 1.0], (0.5, 2.0), ratio=True).ok
    assert not checked([-0.8, -0.9, -1.0], (0.5, 2.0), ratio=True).ok


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("gate.ground_truth.score=0", "greater than 0"),
        ("gate.reference.motion=[1.2, 1.4]", "a ratio of 1 has to lie between the two"),
        ("gate.clips=3", "reference_clips=16 are the first of clips=3"),
        ("gate.nothing=1", "no such setting"),
        ("pruning.alpha=0.5", "the gate has settings gate.* and preset= only"),
    ],
)
def test_a_wrong_limit_says_what_is_wrong(setting, says):
    with pytest.raises(ConfigError, match=says.replace("*", r"\*")):
        recipes.load_gate("shapes", [setting])


def test_a_run_that_was_begun_before_there_was_a_gate_goes_on():
    config = recipes.load("shapes", [])
    assert type(config).model_validate(config.model_dump(exclude={"gate"})) == config


# --- the fixed clips ------------------------------------------------------------------------------------------------


def test_the_fixed_clips_are_the_same_clips_for_ever(trial):
    """Another choice is another set: it gets another `GATE_SET`, and the reports before it cannot be compared."""
    assert trial.clips.version == "shapes-1"
    assert trial.clips.world.source == (0, tuple(gate.fixed_indices(3)))
    assert gate.fixed_indices(6) == [15001, 15000, 15003, 15002, 15004, 15005]
    assert gate.fixed_indices(24)[:6] == gate.fixed_indices(6)
    assert [caption.closed for caption in trial.clips.world.captions] == [True, False, True]
    assert trial.clips.prompts[:2] == ["a orange square moves up quickly, camera pans right", "a blue ring drifts"]


# --- the figures of the reference form ------------------------------------------------------------------------------


def textured(shift_px: float) -> torch.Tensor:
    """``[1, 64, 64]``: a smooth random picture, moved to the right."""
    noise = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([[[0.5, 0, -shift_px / 64], [0, 0.5, 0]]])
    large = F.interpolate(noise, (256, 256), mode="bicubic")
    return F.grid_sample(large, F.affine_grid(theta, [1, 1, 64, 64], align_corners=False), align_corners=False)[:, 0]


@pytest.mark.parametrize("shift_px", [0.5, 1.0, 3.0, 8.0])
def test_optical_flow_finds_a_known_shift(shift_px):
    flow_N2HW = reference.optical_flow(textured(0), textured(shift_px))
    assert flow_N2HW[:, 0].median() == pytest.approx(shift_px, rel=0.1)
    assert flow_N2HW[:, 1].median().abs() < 0.3


def test_figures_do_not_depend_on_the_size_of_the_video(trial):
    video_BCTHW = trial.made["teacher"].video_BCTHW[:, :, :5]
    larger_BCTHW = F.interpolate(video_BCTHW, (5, 192, 192), mode="nearest")
    small, large = (reference.looks(video, video[:, :, 0]) for video in (video_BCTHW, larger_BCTHW))
    for name in ("motion", "flicker", "warp_error", "colour_drift", "saturation", "dead_frames"):
        assert torch.allclose(small.figures[name], large.figures[name], rtol=0.02, atol=1e-4), name


def test_a_clip_that_is_nothing_like_the_teachers_is_counted_alone(trial):
    teachers = reference.looks(trial.made["teacher"].video_BCTHW, trial.clips.given_BCHW)
    video_BCTHW = trial.made["teacher"].video_BCTHW.clone()
    video_BCTHW[2] = gate.corrupt_static(video_BCTHW[2:3])
    beside = reference.beside(reference.looks(video_BCTHW, trial.clips.given_BCHW), teachers)
    assert beside["broken_clips"].tolist() == [0, 0, 1]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_teacher, tmp_path):
    def of(new: Path, *more: str) -> list[str]:
        settings = [part for text in ("gate.clips=2", "gate.reference_clips=2", *more) for part in ("--set", text)]
        models = [str(new), "--against", str(tiny_teacher), "--teacher", str(tiny_teacher)]
        return ["gate", *models, "--out", str(tmp_path / "out"), *settings]

    return of


def test_the_command_writes_the_report_and_ends_with_0_or_3(tiny_teacher, tmp_path, arguments, capsys):
    assert main(arguments(tiny_teacher)) == 0
    assert capsys.readouterr().out.startswith("# tiny-teacher: passed\n")
    written = {"gate.json", "gate.md", "gate.png", "sheet.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    bad = broken(tmp_path / "bad", tiny_teacher, tiny_teacher, lambda network: network.proj_out.bias.fill_(torch.nan))
    assert main(arguments(bad, "gate.clips_from=" + str(two_images(tmp_path)))) == 3
    report = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    assert report["passed"] is False
    assert report["new"] == {"name": "bad", "sha256": student.read_card(bad).sha256}
    assert report["clips"]["version"].startswith("images ")
    assert {check["form"] for check in report["checks"]} == {"reference"}  # of other images there is no ground truth
    assert set(report["checks"][0]) >= {"name", "value", "interval", "allowed", "ok", "means"}
    assert report["refusals"] and "refused" in (tmp_path / "out" / "gate.md").read_text()


def two_images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir(parents=True)
    for name in ("red-circle", "blue-star"):
        shutil.copy(ROOT / "models" / "examples" / f"{name}.png", folder)
        (folder / f"{name}.txt").write_text(f"a {name.replace('-', ' ')} grows\n")
    return folder


def test_a_users_error_is_one_line_and_2(tiny_teacher, tmp_path, arguments, capsys):
    (tmp_path / "images").mkdir()
    shutil.copy(ROOT / "models" / "examples" / "red-circle.png", tmp_path / "images")
    shutil.copy(ROOT / "models" / "examples" / "blue-star.png", tmp_path / "images")
    spoilt = two_images(tmp_path / "more")
    (spoilt / "red-circle.png").write_bytes(b"no image")
    wrong = {
        "no image that can be read": arguments(tiny_teacher, f"gate.clips_from={spoilt}"),
        "no model folder": arguments(tmp_path),
        "no such setting": arguments(tiny_teacher, "gate.ground_truth.scores=1"),
        "wanted two images or more, or shapes-1; got 0": arguments(tiny_teacher, f"gate.clips_from={tmp_path}"),
        "write it to blue-star.txt beside it": arguments(tiny_teacher, f"gate.clips_from={tmp_path / 'images'}"),
        "was made from shapes-teacher": arguments(ACTIVE),
    }
    for says, given in wrong.items():
        assert main(given) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert says in line
    assert not (tmp_path / "out").exists()
