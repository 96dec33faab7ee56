"""The chain from the teacher to the release: whole as it was made, and broken where somebody has changed a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill import gate, lineage, recipes, student
from distill.__main__ import main
from tests.distill import tiny
from tests.stack import ROOT
from worker import release
from worker.engine.cache import Cache, key_of
from worker.releases import GateSummary, Release
from worker.storage import Storage

BUNDLED = ROOT / "models" / "shapes-4step"


class World:
    """A teacher, a run, its student's verdict, engine, storage and releases, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.teacher, self.run, self.engines = folder / "teacher", folder / "run", folder / "engines"
        self.storage, self.releases = folder / "storage", folder / "release.json"
        self.student, self.gate = self.run / "student", self.run / "gate" / "gate.json"

    def command(self, folder: Path | None = None, **places: Path) -> list[str]:
        named = {"engines": self.engines, "storage": self.storage, "releases": self.releases, **places}
        options = [part for name, path in named.items() for part in (f"--{name}", str(path))]
        return ["lineage", str(folder or self.student), *options]

    def edit(self, path: Path, change: Callable[[Any], Any]) -> None:
        """Change a JSON file as somebody with an editor would."""
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values, indent=2) + "\n")

    def rewrite_card(self, **update: Any) -> None:
        """A card that fits the student's files, and says something else."""
        card = student.parse_card(self.student / "student.json")
        student.write_card(self.student, card.model_copy(update=update))


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Everything by the code that makes it."""
    world = World(tmp_path_factory.mktemp("world"))
    shutil.copytree(tiny_teacher, world.teacher)
    shutil.copytree(tiny_run, world.run, symlinks=True)
    for part in ("vae", "text_encoder", "tokenizer"):
        (world.student / part).unlink()
        (world.student / part).symlink_to(f"../../teacher/{part}")
    card = student.read_card(world.student)
    # What the bundled student's limits say of a student of three steps is not what is tested here.
    config = recipes.load_gate("shapes", ["gate.clips=2", "gate.reference_clips=2", "gate.far=1000"])
    verdict = gate.gate(world.student, world.teacher, world.teacher, world.gate.parent, config, lambda _: None)
    weights = key_of(**{name: sha256 for name, sha256 in card.files.items() if name.startswith("transformer/")})
    about = {"engine": "ort", "part": "transformer", "model": card.name, "model_sha256": card.sha256}
    builds = Cache(world.engines)
    builds.get("0" * 32, lambda folder: _graph(folder, b"a graph"), {**about, "weights_sha256": weights})
    builds.get("1" * 32, lambda folder: _graph(folder, b"another"), {**about, "model_sha256": "another"})
    shared = {**about, "model_sha256": "another", "weights_sha256": weights}  # of the same weights under another name
    builds.get("2" * 32, lambda folder: _graph(folder, b"another"), shared)
    release.publish(Storage(str(world.storage)), world.student)
    against = student.read_card(world.teacher).sha256
    summary = GateSummary(
        passed=verdict.passed, refusals=verdict.refusals, against=against, recipe="shapes", at=1_800_000_000.0
    )
    history = [
        Release(number=1, at=1_800_000_001.0, action="promote", sha256=card.sha256, name=card.name, previous=against,
                by="key-1", reason="", forced=not verdict.passed, gate=summary),
        Release(number=2, at=1_800_000_002.0, action="rollback", sha256=against, name="tiny-teacher",
                previous=card.sha256, by="key-2", reason="a test", forced=False, gate=None),
    ]  # fmt: skip
    world.releases.write_text(json.dumps({"number": 2, "history": [one.model_dump() for one in reversed(history)]}))
    return world


def _graph(folder: Path, text: bytes) -> None:
    (folder / "graph.onnx").write_bytes(text)


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """One that may be spoilt."""
    shutil.copytree(made.teacher.parent, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The exit code, and the links by name."""
    code = main([*arguments, "--json"])
    return code, {link["name"]: link for link in json.loads(capsys.readouterr().out)["links"]}


# --- whole ----------------------------------------------------------------------------------------------------------


def test_what_a_run_has_made_is_whole_from_the_teacher_to_the_release(world, capsys):
    code, links = told(capsys, world.command())
    assert code == 0, links
    assert {name: link["state"] for name, link in links.items()} == dict.fromkeys(
        ["teacher", "run", *lineage.LEAVES, "student", "gate", "engine", "storage", "release"], "ok"
    )
    assert not any(link["unchecked"] for link in links.values())
    card = student.read_card(world.student)
    pruning, matching = links["pruning"]["facts"], links["matching"]["facts"]
    assert pruning["config"]["fit"]["steps"] == pruning["iterations"] == 4
    assert pruning["parent_sha256"]["teacher"] == links["teacher"]["facts"]["sha256"] == card.teacher.sha256
    assert pruning["parent_sha256"]["importance.json"] == links["importance"]["facts"]["sha256"]["importance.json"]
    assert matching["parent_sha256"]["pruning.safetensors"] == pruning["sha256"]["pruning.safetensors"]
    assert card.parent_sha256["matching.safetensors"] == matching["sha256"]["matching.safetensors"]
    assert matching["sha256"]["matching.safetensors"] == student.file_sha256(world.run / "matching.safetensors")
    assert any("in half precision" in line for line in links["student"]["checked"])
    assert links["student"]["facts"]["code"] == card.code
    assert [build["key"] for build in links["engine"]["facts"]["builds"]] == ["0" * 32, "2" * 32]
    assert [(one["number"], one["by"]) for one in links["release"]["facts"]["history"]] == [(1, "key-1")]


def test_people_read_a_line_for_each_link(world, capsys):
    assert main(world.command()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tiny-student, sha256 {student.read_card(world.student).sha256}"
    assert lines[-1] == "nothing is other than recorded"
    assert [line.split()[0] for line in lines[1:4]] == ["teacher", "run", "latents"]
    assert any(line.startswith("release ") and "release 1: promote by key-1" in line for line in lines)


def test_the_older_card_of_the_bundled_student_is_recorded_without_hashes_of_its_stages(tmp_path, capsys):
    code, links = told(capsys, ["lineage", str(BUNDLED), "--engines", str(tmp_path)])
    assert code == 0
    states = {name: link["state"] for name, link in links.items()}
    assert states["teacher"] == states["student"] == "ok"
    unknown = {"run", "importance", "pruning", "matching", "gate", "engine", "storage", "release"}
    assert unknown == {name for name, state in states.items() if state == "recorded, not checked"}
    assert links["pruning"]["facts"]["iterations"] == 2400
    assert "the card is older than hashes" in links["pruning"]["unchecked"][0]


def test_published_under_another_name_it_is_still_the_student_of_its_run(world, capsys):
    few = world.teacher.parent / "few"
    card = student.publish(world.student, few, world.teacher)
    code, links = told(capsys, world.command(few, run=world.run))
    assert (code, card.name) == (0, "few"), links
    assert links["gate"]["state"] == links["run"]["state"] == "ok"
    assert links["storage"]["unchecked"]  # under that name it was never added


def test_fetched_from_the_storage_it_is_followed_as_far_as_it_can_be(world, tmp_path, capsys):
    identity = student.read_card(world.student).sha256
    folder = release.fetch(Storage(str(world.storage)), identity, tmp_path / "cache")
    code, links = told(capsys, world.command(folder))
    assert code == 0, links
    states = {name: link["state"] for name, link in links.items()}
    assert states["teacher"] == states["run"] == "recorded, not checked"  # neither is at hand
    assert states["pruning"] == states["student"] == states["storage"] == "ok"  # by what the card says of itself
    world.edit(folder / "student.json", lambda card: card["metrics"].update(score=0.99))
    code, links = told(capsys, world.command(folder))
    assert code == 3
    assert f"and the folder's name recorded {identity}" in links["student"]["broken"][0]


# --- broken ---------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def flip_a_weight_and_rewrite_the_card(world: World) -> None:
    path = world.student / "transformer" / student.WEIGHTS
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float16(0.25)
    save_file(tensors, path, {"format": "pt"})
    world.rewrite_card()


def replace_a_link(world: World) -> None:
    """Another pruning stage, with its own hash in its own entry of the card."""
    flip_a_byte(world.run / "pruning.safetensors")
    stages = [dict(stage) for stage in student.read_card(world.student).stages]
    other = next(stage for stage in stages if stage["name"] == "pruning")
    other["sha256"] = {"pruning.safetensors": student.file_sha256(world.run / "pruning.safetensors")}
    world.rewrite_card(stages=tuple(stages))


def drop_a_stage(world: World) -> None:
    stages = student.read_card(world.student).stages
    world.rewrite_card(stages=tuple(stage for stage in stages if stage["name"] != "pruning"))


def forget_the_hashes(world: World) -> None:
    """One of the stages as an older card has it."""
    stages = [dict(stage) for stage in student.read_card(world.student).stages]
    for name in ("sha256", "parent_sha256"):
        del stages[-1][name]
    world.rewrite_card(stages=tuple(stages))


def judge_another(world: World) -> None:
    """The verdict of a student of the same run with one weight changed."""
    other = world.run / "other"
    shutil.copytree(world.student, other, symlinks=True)
    card = student.read_card(other).model_copy(update={"created_at": "2020-01-01T00:00:00Z"})
    card = student.write_card(other, card)
    world.edit(world.gate, lambda report: report["new"].update(sha256=card.sha256))


def pass_the_gate(world: World) -> None:
    def change(report: dict[str, Any]) -> None:
        report["checks"][0]["ok"] = not report["checks"][0]["ok"]

    world.edit(world.gate, change)


TAMPERED: dict[str, tuple[Callable[[World], Any], str, str]] = {
    # what is done -> (how, the link that is broken first, what is said)
    "a weight's byte": (
        lambda w: flip_a_byte(w.student / "transformer" / student.WEIGHTS), "student",
        r"transformer/diffusion_.* is \w{64}, .* \w{64}",
    ),
    "a weight, and the card fits it": (
        flip_a_weight_and_rewrite_the_card, "student", r"1 of \d+ tensors are not those of .*/matching.safetensors",
    ),
    "the card": (
        lambda w: w.edit(w.student / "student.json", lambda card: card["metrics"].update(score=1.0)),
        "run", r"identity of the student that .*events.jsonl tells of is \w{64}, and this student's card recorded",
    ),
    "a file beside the student's": (
        lambda w: (w.student / "scheduler" / "more.json").write_text("{}"), "student", "more.json is not listed",
    ),
    "a value that a stage read": (
        lambda w: w.edit(w.run / "config.json", lambda config: config["pruning"].update(alpha=0.123)),
        "run", r"sha256 of .*/run/config.json is \w{64}, and student.json recorded \w{64}",
    ),
    "a value that a stage read, seen by the stage": (
        lambda w: w.edit(w.run / "config.json", lambda config: config["pruning"].update(alpha=0.123)),
        "pruning", r"sha256 of pruning's settings in .*config.json is \w{64}, and student.json recorded \w{64}",
    ),
    "a value that no stage read": (
        lambda w: w.edit(w.run / "config.json", lambda config: config["gate"].update(far=9.0)), "run", "config.json is",
    ),
    "a value that has no place": (
        lambda w: w.edit(w.run / "config.json", lambda config: config.update(num_clips="many")),
        "run", r"config.json: num_clips: Input should be a valid integer",
    ),
    "what stages read": (
        lambda w: w.edit(w.run / "stages.json", lambda read: read.update(pruning="0" * 64)),
        "run", r"hash of what pruning read, .* is \w{64}, and .*stages.json recorded 0{64}",
    ),
    "importance.json": (
        lambda w: w.edit(w.run / "importance.json", lambda found: found.update(pruned=[0, 1])),
        "importance", r"blocks gone by .*importance.json is \(0, 1\), and student.json recorded",
    ),
    "the noise levels": (
        lambda w: w.edit(w.student / "scheduler/scheduler_config.json", lambda config: config.update(shift=9.0)),
        "student", r"shift in .*scheduler_config.json is 9.0, and .*config.json recorded 2.5",
    ),
    "a link in the middle is gone": (
        lambda w: (w.run / "pruning.safetensors").unlink(),
        "pruning", r"sha256 of .*/pruning.safetensors is missing, and student.json recorded \w{64}",
    ),
    "a link in the middle is another": (
        replace_a_link, "matching", r"pruning.safetensors as given to matching is \w{64}, and what left it recorded",
    ),
    "a stage is gone": (drop_a_stage, "pruning", "student.json lists no stage pruning"),
    "a stage without hashes": (forget_the_hashes, "matching", "no sha256 of matching.safetensors, which matching left"),
    "a verdict on another student": (
        judge_another, "gate", r"is the verdict on tiny-student, sha256 \w{64}, and this student's sha256 is \w{64}",
    ),
    "a verdict turned": (pass_the_gate, "gate", r"refusals in .*gate.json is .* and its checks recorded"),
    "a limit of the gate": (
        lambda w: w.edit(w.gate, lambda report: report["config"].update(far=3.0)),
        "gate", r"sha256 of the limits in .*gate.json is \w{64}, and the gate recorded \w{64}",
    ),
    "no verdict": (lambda w: w.gate.write_text("[]"), "gate", "gate.json: Input should be"),
    "an engine": (
        lambda w: (w.engines / ("0" * 32) / "graph.onnx").write_bytes(b"c"),
        "engine", r"graph.onnx is \w{64}, and .*registry.json recorded \w{64}",
    ),
    "a file beside an engine": (
        lambda w: (w.engines / ("0" * 32) / "plugin.so").write_bytes(b"c"), "engine", "plugin.so is not listed",
    ),
    "a file in the storage": (
        lambda w: flip_a_byte(next((w.storage / "blobs").iterdir())), "storage", r"blobs/\w{64} is \w{64}, and student",
    ),
    "a card in the storage": (
        lambda w: w.edit(next((w.storage / "students").iterdir()), lambda card: card.update(name="x")),
        "storage", r"identity by .*/students/\w{64}.json is",
    ),
    "a promotion that nobody allowed": (
        lambda w: w.edit(w.releases, lambda told: told["history"][-1].update(forced=False, gate=None)),
        "release", "release 1 in .* has no verdict that passed against what it replaced, and was not forced",
    ),
    "a verdict in the history": (
        lambda w: w.edit(w.releases, lambda told: told["history"][-1]["gate"].update(refusals=["none"])),
        "release", "verdict of release 1 in",
    ),
    "a release is gone": (
        lambda w: w.edit(w.releases, lambda told: told["history"][0].update(number=3)),
        "release", "number after release 1 in .* is 3, and the history recorded 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_is_found_and_named(world, capsys, what):
    spoil, name, says = TAMPERED[what]
    spoil(world)
    code, links = told(capsys, world.command())
    assert code == 3
    assert links[name]["state"] == "broken"
    assert any(re.search(says, line) for line in links[name]["broken"]), links[name]["broken"]


def test_one_bit_of_any_file_is_found(world, capsys):
    """But for what is told to people, and records that nobody keeps a hash of."""
    left = [world.run / name for names in lineage.LEAVES.values() for name in names]
    records = [world.run / "config.json", world.run / "stages.json"]
    folders = [world.student, world.teacher, world.engines / ("0" * 32), world.storage]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in [*left, *records, *files]:
        before = path.read_bytes()
        flip_a_byte(path)
        code = main(world.command(teacher=world.teacher))
        said = capsys.readouterr()
        assert code == (2 if path.name == "student.json" else 3), path
        assert path.name in said.out + said.err
        path.write_bytes(before)
    assert main(world.command(teacher=world.teacher)) == 0


def test_another_teacher_in_its_place_is_found(world, capsys):
    before = student.read_card(world.teacher).sha256
    shutil.rmtree(world.teacher)
    tiny.make_teacher(world.teacher)
    flip_a_byte(world.teacher / "transformer" / student.WEIGHTS)
    card = student.parse_card(world.teacher / "teacher.json")
    after = student.write_card(world.teacher, card).sha256
    code, links = told(capsys, world.command(teacher=world.teacher))
    assert code == 3
    assert any(f"is {after}, and student.json recorded {before}" in line for line in links["teacher"]["broken"])


def test_a_changed_teacher_of_a_published_student_is_found_by_its_link(world, capsys):
    few = world.teacher.parent / "few"
    student.publish(world.student, few, world.teacher)
    flip_a_byte(world.teacher / "vae" / "diffusion_pytorch_model.safetensors")
    code, links = told(capsys, world.command(few))
    assert code == 3
    for name, card in (("teacher", "teacher.json"), ("student", "student.json")):
        [line] = links[name]["broken"]
        assert "vae/diffusion_pytorch_model.safetensors is " in line and f"and {card} recorded" in line


# --- what cannot be checked, and what cannot be asked ----------------------------------------------------------------


def test_latents_and_engines_may_be_cleared_away(world, capsys):
    (world.run / "latents-train.safetensors").unlink()
    shutil.rmtree(world.engines / ("2" * 32))
    code, links = told(capsys, world.command())
    assert code == 0
    assert "latents-train.safetensors is not there any more" in links["latents"]["unchecked"][0]
    assert "a worker builds it anew" in links["engine"]["unchecked"][0]


def test_a_user_s_error_is_one_line_and_2(world, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "student.json").write_text('{"format": 2}')
    wrong = {
        "is no model folder": ["lineage", str(tmp_path)],
        "is a teacher; give the folder of a student": ["lineage", str(world.teacher)],
        "field format": ["lineage", str(tmp_path / "bad")],
        "nowhere is not there": world.command(run=tmp_path / "nowhere"),
        "is no model folder: it has": world.command(teacher=tmp_path),
    }
    for says, arguments in wrong.items():
        assert main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line


def test_it_needs_no_torch(world):
    code = "import sys; from distill.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *world.command()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
