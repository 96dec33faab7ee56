"""Several processes that train one model do what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import distributed, empty, student
from distill.__main__ import main
from distill.backbones import base
from distill.checkpoint import Checkpoints
from distill.config import ConfigError, DistillConfig
from distill.distributed import ALONE, Share, Stored, World
from distill.lineage import EXPERTS
from distill.run import distil
from tests.distill import tiny

HERE = Path(__file__).parent
SETTINGS = {
    "checkpoint_activations": True,
    "looked_at": 36,  # of 96: the last turn is the first process's alone
    "pruning.fit.optimiser": "adamw",
    "pruning.fit.steps": 4,
    "pruning.fit.accumulate": 2,
    "matching.fit.steps": 3,
    "matching.fit.accumulate": 2,
    "matching.fit.checkpoint_every": 2,
    "matching.gan.student_weight": 0.1,
    "matching.gan.critic_weight": 0.1,
    "matching.gan.tokens": "middle",
}


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """Two processes by torchrun, as a user starts them."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def curve(run: Path) -> dict[tuple[str, int, str], float]:
    """Every loss, and what was logged beside it, but for means over the clips that were at some noise level."""
    beside = ("time", "stage", "step", "steps", "steps_per_s", "clips_per_s", "memory_mb")
    return {
        (event["stage"], event["step"], name): value
        for event in events(run)
        if "loss" in event
        for name, value in event.items()
        if name not in beside and not name.startswith("critic_gap")
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_teacher, real_models) -> Path:
    """What two processes made of some configurations (two_processes.py), and one process of the same."""
    root = tmp_path_factory.mktemp("two")
    whole = tiny.recipe(tiny_teacher, **SETTINGS)
    experts = real_models.recipe("i2v-a14b", **{"pruning.fit.accumulate": 2})
    split = experts.model_copy(update={"context_parallel": 2})
    for name, config in {"whole": whole, "experts": experts, "split": split}.items():
        (root / f"{name}.json").write_text(config.model_dump_json())
    done = launch(str(HERE / "two_processes.py"), str(root))
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    for name, config in {"whole": whole, "experts": experts}.items():
        distil(root / "one" / name, config)
    return root


@pytest.mark.parametrize(("run", "same"), [("whole", "whole"), ("experts", "experts"), ("split", "experts")])
def test_the_loss_curve_of_two_processes_is_that_of_one(runs, run, same):
    ours, theirs = curve(runs / run), curve(runs / "one" / same)
    assert {stage for stage, _, _ in ours} == {"pruning", "matching"}
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("run", ["whole", "experts", "split"])
def test_what_is_looked_at_on_the_way_is_shared_and_the_same(runs, run):
    def looks(of: Path) -> list[dict]:
        names = ("drift_full", "drift_pruned", "dev_loss_full", "motion", "contrast", "flicker", "error", "ratio")
        return [{name: event[name] for name in names if name in event} for event in events(of)]

    ours, theirs = looks(runs / run), looks(runs / "one" / ("whole" if run == "whole" else "experts"))
    ours, theirs = ([look for look in of if look] for of in (ours, theirs))
    if run == "experts":  # which was killed before its report, and looked at once more
        assert ours.pop() == pytest.approx(ours[-1], rel=1e-6)
    assert len(ours) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    assert (runs / run / "samples" / "student.png").stat().st_size > 1000


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: w for file in ("pruning", "matching") for name, w in load_file(run / f"{file}.safetensors").items()}


def near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Adam's first steps are as long as the learning rate, and of a gradient near 0 their sign is chance."""
    assert ours.keys() == theirs.keys()
    return all((ours[name] - theirs[name]).abs().median() < 1e-6 for name in ours)


def test_the_student_is_a_stock_folder_with_the_weights_of_one_process(runs):
    card = student.read_card(runs / "whole" / "student")  # checks every hash
    assert card.blocks == student.read_card(runs / "one" / "whole" / "student").blocks
    transformer = student.load_pipeline(runs / "whole" / "student", "cpu").transformer
    assert len(transformer.blocks) == len(card.blocks.kept)
    assert near(weights(runs / "whole"), weights(runs / "one" / "whole"))
    kept = load_file(runs / "whole" / "matching.safetensors")
    assert all(torch.equal(p, kept[name].half().float()) for name, p in transformer.named_parameters())


def test_a_checkpoint_of_two_processes_resumes_on_two_and_on_one(runs, tiny_teacher):
    assert near(weights(runs / "broken"), weights(runs / "whole"))
    assert curve(runs / "broken") == pytest.approx(curve(runs / "whole"), rel=1e-5, abs=1e-7)
    left = runs / "broken-for-one"
    assert not (left / "pruning.safetensors").exists()
    assert Checkpoints(left / "pruning.checkpoint", ALONE).latest is not None
    before = len(curve(left))
    distil(left, tiny.recipe(tiny_teacher, **SETTINGS))
    resumed = curve(left)
    assert 0 < before < len(resumed)
    assert resumed == pytest.approx(curve(runs / "whole"), rel=1e-5, abs=1e-7)
    assert not list(left.glob("*.checkpoint"))


def test_only_the_first_process_writes_and_speaks(runs):
    times = [event["time"] for event in events(runs / "whole")]
    assert times == sorted(times)
    steps = [event["step"] for event in events(runs / "whole") if "loss" in event and event["stage"] == "pruning"]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_bad_setting_is_said_once_and_the_exit_code_is_its_own(tmp_path, tiny_teacher):
    settings = tiny.settings({**tiny.RECIPE, **SETTINGS, "teacher": str(tiny_teacher), "pruning.fit.batch": 3})
    done = subprocess.run(
        [
            sys.executable, "-m", "distill", "run", "shapes", str(tmp_path / "run"), "--processes", "2",
            *(f"--set={value}" for value in settings),
        ],
        cwd=HERE.parents[1], capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: pruning.fit.batch=3 cannot be shared by 2 processes: set pruning.fit.batch=2 and "
        "pruning.fit.accumulate=3, as many clips an update"
    ]
    assert not (tmp_path / "run").exists()


# --- one process ----------------------------------------------------------------------------------------------------


def of_two(rank: int = 0, context: int = 1) -> World:
    return World(rank, 2, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruning.fit.batch": 3, "pruning.fit.accumulate": 1}, "so that 2 divides pruning.fit.batch"),
        (
            {"matching.fit.batch": 1, "matching.fit.accumulate": 16},
            "matching.fit.batch=2 and matching.fit.accumulate=8",
        ),
        ({"pruning.fit.optimiser": "muon"}, "set pruning.fit.optimiser=adamw"),
        ({"matching.critic.optimiser": "muon"}, "set matching.critic.optimiser=adamw"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(tiny_teacher, settings, message):
    config = tiny.recipe(tiny_teacher, **{**SETTINGS, **settings})
    with pytest.raises(ConfigError, match=message):
        distributed.check(config, of_two())
    distributed.check(config, ALONE)


def test_the_discriminator_and_a_split_clip_do_not_go_together(tiny_teacher):
    config = tiny.recipe(tiny_teacher, **SETTINGS)
    with pytest.raises(ConfigError, match="context_parallel=2: the discriminator"):
        distributed.check(config, of_two(context=2))


def test_a_split_needs_as_many_processes(tmp_path, tiny_teacher, capsys):
    values = tiny.settings({**tiny.RECIPE, "teacher": str(tiny_teacher), "context_parallel": 2})
    assert main(["run", "shapes", str(tmp_path / "run"), *(f"--set={value}" for value in values)]) == 2
    assert "context_parallel=2 does not divide the 1 processes" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["hunyuan-t2v", "t2v-1.3b"])
def test_what_cannot_be_split_is_refused(real_models, variant):
    folder = real_models.teacher(variant)
    card = student.read_card(folder)
    backbone = base.load(card.backbone, card.task)
    network = backbone.network(student.load_pipeline(folder, "cpu"))

    class Mesh:
        def size(self) -> int:
            return 3

    with pytest.raises(ConfigError, match="context_parallel=3"):
        backbone.split_sequence(network, Mesh(), (4, 3, 4, 4))


def test_shares_are_the_whole_and_turns_are_all_pieces():
    rows = torch.arange(6)
    assert torch.cat([Share(number, 3).rows(rows) for number in range(3)]).tolist() == rows.tolist()
    dealt = [list(of_two(rank).dealt("abc")) for rank in range(2)]
    assert [len(of) for of in dealt] == [2, 2]
    assert sorted(piece for of in dealt for _, piece, counts in of if counts) == ["a", "b", "c"]
    neighbours = [list(of_two(rank, context=2).dealt("ab")) for rank in range(2)]
    assert [piece for _, piece, _ in neighbours[0]] == [piece for _, piece, _ in neighbours[1]] == ["a", "b"]
    assert [counts for of in neighbours for _, _, counts in of] == [True, True, False, False]


def denoisers(folder: Path) -> dict[str, torch.nn.Module]:
    """Without weights."""
    return empty.networks(empty.parts(folder), lambda name, _: name in EXPERTS)


@pytest.mark.parametrize("variant", ["ti2v-5b", "i2v-a14b", "hunyuan-i2v", "hunyuan15-t2v"])
def test_networks_without_weights_get_just_those_of_the_files(real_models, variant):
    """Pruned ones too: the names of a smaller network's weights are found in the whole one's file."""
    folder = real_models.teacher(variant)
    card = student.read_card(folder)
    backbone = base.load(card.backbone, card.task)
    teacher = backbone.network(student.load_pipeline(folder, "cpu"))
    whole = backbone.network(student.load_pipeline(folder, "cpu", denoisers(folder)))
    assert {p.device.type for p in whole.parameters()} == {"meta"}
    pruned = {0, len(backbone.blocks(teacher)) - 1}
    smaller = distributed.without_blocks(backbone, whole, pruned)
    kept = [block for number, block in enumerate(backbone.blocks(whole)) if number not in pruned]
    pairs = list(zip(backbone.blocks(smaller), kept, strict=True))
    names = distributed.names_in(smaller, whole, pairs, whole)
    distributed.materialise(smaller, Stored.of_model(folder).renamed(names))
    expected = backbone.without_blocks(teacher, pruned)
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(smaller, of)()), dict(getattr(expected, of)())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_expert_is_found_in_the_file_of_both(real_models):
    folder = real_models.teacher("i2v-a14b")
    card = student.read_card(folder)
    backbone = base.load(card.backbone, card.task)
    whole = backbone.network(student.load_pipeline(folder, "cpu", denoisers(folder)))
    low = backbone.one_expert(distributed.without_blocks(backbone, whole, {4}), "low")
    of = backbone.one_expert(whole, "low")
    blocks = [block for number, block in enumerate(backbone.blocks(of)) if number != 1]  # 3 of the first, then 4 is 1
    names = distributed.names_in(low, of, list(zip(backbone.blocks(low), blocks, strict=True)), whole)
    assert all(name.startswith("low.") for name in names.values())
    assert names["blocks.1.attn1.to_q.weight"] == "low.blocks.2.attn1.to_q.weight"


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path / "stage.checkpoint", ALONE)
    weight = torch.arange(6.0)
    assert checkpoints.load({}) is None
    assert checkpoints.save(3, {"/w|weight": weight}, {"step": 3}) == 3
    weight += 1
    checkpoints.save(5, {"/w|weight": weight}, {"step": 5})
    assert [path.name for path in (tmp_path / "stage.checkpoint").iterdir()] == ["000005"]
    (tmp_path / "stage.checkpoint" / "000009").mkdir()  # killed while it was written
    found, progress = checkpoints.load({"/w": weight})
    assert progress == {"step": 5}
    assert torch.equal(found["/w|weight"], torch.arange(6.0) + 1)


def test_the_recipes_of_real_models_can_be_shared_by_eight_processes():
    from distill import recipes

    for name in recipes.RECIPES:
        if name != "shapes":
            config: DistillConfig = recipes.load(name, [])
            distributed.check(config, World(0, 8))
            assert config.checkpoint_activations
