"""What a run will take, from shapes alone, against the networks and calls that it is of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from distill import calls, plan, recipes
from distill.__main__ import main
from distill.backbones import base
from distill.config import ConfigError
from distill.data import prepared
from distill.loop import computed_again, plain_attention
from distill.student import load_pipeline, read_card
from tests.real_models import RECIPES as VARIANTS

BASE = ["checkpoint_activations=false"]
BASE += [f"{stage}.fit.{name}" for stage in ("pruning", "matching") for name in ("batch=8", "accumulate=2")]
CLIP, TOKENS = "416x240x33", 9 * 15 * 26
COMMAND = ["plan", "wan2.1-t2v-1.3b", "--gpus", "8", "--clip", CLIP, *(f"--set={s}" for s in BASE)]


@pytest.fixture(scope="module")
def small():
    """The smallest released model that recipes are for."""
    return plan.with_clips_of(calls.teacher_of(Path("models/wan2.1-t2v-1.3b"), known=True), CLIP)


@pytest.fixture(scope="module")
def counted(small):
    return calls.Calls(small, "bfloat16", on_cpu=False, rank=128)


def machine(processes=8, memory_bytes=80 * 10**9, device="cuda"):
    return plan.Machine(processes, memory_bytes, peak_tflops=989.4, efficiency=0.4, device=device)


def config(*settings):
    return recipes.load("wan2.1-t2v-1.3b", [*BASE, *settings])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_shapes_of_a_folder_are_those_of_its_networks_and_data(real_models, variant):
    folder = real_models.teacher(variant)
    known = calls.teacher_of(folder, known=False)
    card = read_card(folder)
    backbone = base.load(card.backbone, card.task)
    whole = backbone.network(load_pipeline(folder, "cpu"))
    network = calls.network_of(known)
    assert network.parameters == sum(p.numel() for p in whole.parameters())
    assert len(network.blocks) == len(backbone.blocks(whole))
    gone = [block for group in backbone.groups(whole) for block in group[: math.ceil(len(group) / 3)]]
    left = calls.without(network, 1 / 3)
    if len(network.depths()) == 1:
        assert left.parameters == sum(p.numel() for p in backbone.without_blocks(whole, gone).parameters())
    index = prepared.read_index(real_models.data(variant))
    image, text = known.backbone.condition_shapes(known.pipe, known.call)
    kept = {f"text.{name}": shape for name, shape in text.items()}
    kept |= {f"image.{name}": image[name] for name in image if f"image.{name}" in index.tensors}
    assert {name: of.shape for name, of in index.tensors.items() if not name.startswith(("x0", "negative"))} == kept
    if card.backbone.startswith("hunyuan"):
        return
    passed = calls.Calls(known, "float32", True, 2).take(network.depths(), "lora", 1, whole=True, head=True)
    assert passed.backward_bytes > passed.kept_bytes > 0


def test_released_models_have_the_size_that_their_names_say():
    billions = {}
    for name in ("wan2.1-i2v-14b", "wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "wan2.2-i2v-a14b", "hunyuanvideo-i2v"):
        teacher = calls.teacher_of(Path("models") / name, known=True)
        billions[name] = round(calls.network_of(teacher).parameters / 1e9, 1)
    assert billions == {
        "wan2.1-i2v-14b": 16.4, "wan2.1-t2v-1.3b": 1.4, "wan2.2-ti2v-5b": 5.0, "wan2.2-i2v-a14b": 28.6,
        "hunyuanvideo-i2v": 12.8,
    }  # fmt: skip
    assert set(calls.RELEASED) == set(recipes.RECIPES) - {"shapes"}


def test_operations_of_a_block_are_those_of_its_matrices(counted):
    width, ffn, text, tokens = 1536, 8960, 512, TOKENS
    own = 4 * 2 * tokens * width**2 + 4 * tokens**2 * width
    cross = 2 * 2 * tokens * width**2 + 2 * 2 * text * width**2 + 4 * tokens * text * width
    block = own + cross + 2 * 2 * tokens * width * ffn
    forward = [counted.take({"num_layers": depth}, "nothing", 1, whole=False) for depth in (4, 5)]
    assert forward[1].forward_flops - forward[0].forward_flops == block
    trained = [counted.take({"num_layers": depth}, "all", 1, whole=False) for depth in (4, 5)]
    # On the way back each product is two; attention's kernel makes its scores anew.
    attention = 4 * tokens**2 * width + 4 * tokens * text * width
    back = 2 * block + attention / 2
    assert trained[1].flops - trained[0].flops == pytest.approx(block + back, rel=1e-6)
    again = [counted.take({"num_layers": depth}, "all", 1, whole=False, again=True) for depth in (4, 5)]
    more = (again[1].flops - again[0].flops) - (trained[1].flops - trained[0].flops)
    assert 0.8 * block < more <= block


def test_a_plan_is_linear_in_blocks_and_shared_tokens(counted):
    def kept(depth, **how):
        return counted.take({"num_layers": depth}, "all", 1, whole=False, **how).kept_bytes

    assert kept(12) - kept(11) == pytest.approx(kept(5) - kept(4))
    assert kept(12, processes=4) - kept(11, processes=4) == pytest.approx((kept(5) - kept(4)) / 4)
    assert kept(12, again=True) - kept(11, again=True) == TOKENS * 1536 * 2  # what goes into a block, in bf16


def test_parts_add_up_and_are_shared_evenly(small, counted):
    eight = plan.make(config(), machine(), small, counted)
    student = eight.parameters["student"]
    for stage in eight.stages:
        for phase in stage.phases:
            assert phase.total_bytes == sum(phase.bytes_by_part.values()) <= stage.peak.total_bytes
    parts = eight.stages[2].peak.bytes_by_part
    assert parts["student: optimiser"] == pytest.approx(8 * student / 8, rel=1e-2)
    assert parts["student: optimiser"] >= 8 * student / 8
    assert parts["base"] == pytest.approx(2 * eight.parameters["teacher"] / 8, rel=1e-2)
    on_cpus = plan.make(config(), machine(device="cpu"), small, counted)
    assert "student: last good weights" in on_cpus.stages[2].peak.bytes_by_part
    math_attention = calls.Calls(small, "bfloat16", on_cpu=True, rank=128)
    pairs_bytes, fused_bytes = (
        of.take({"num_layers": 4}, "nothing", 1, whole=False).forward_bytes for of in (math_attention, counted)
    )
    assert pairs_bytes > 12 * TOKENS**2 * 2 > fused_bytes


@pytest.mark.slow
def test_one_process_holds_everything_whole(small, counted):
    alone, eight = (plan.make(config(), machine(count), small, counted) for count in (1, 8))
    whole = alone.stages[2].peak.bytes_by_part
    assert whole["student: optimiser"] == 8 * alone.parameters["student"]
    assert whole["base"] == whole["teacher"] == 4 * alone.parameters["teacher"]
    assert "gathered blocks" not in whole
    assert eight.gpu_hours(eight.stages[2]) == pytest.approx(alone.gpu_hours(alone.stages[2]), rel=1e-6)


@pytest.mark.parametrize(
    ("memory_bytes", "named"),
    [
        (8_000_000_000, ["checkpoint_activations=true"]),
        (6_200_000_000, ["checkpoint_activations=true", "context_parallel=2"]),
        (5_000_000_000, ["--gpus 16", "checkpoint_activations=true"]),
    ],
)
def test_a_remedy_is_what_makes_it_fit(small, counted, memory_bytes, named):
    wanted = config()
    found = plan.remedy(wanted, machine(memory_bytes=memory_bytes), small, counted)
    assert isinstance(found, plan.Remedy)
    assert all(name in str(found) for name in named), str(found)
    assert found.plan.clips == (16, 16)  # an update sees as many
    processes = found.plan.machine.processes
    there = machine(processes, memory_bytes)
    assert plan.make(config(*found.settings), there, small, counted).fits
    for left_out in found.settings[:-4] or found.settings:
        others = [setting for setting in found.settings if setting != left_out]
        try:
            assert not plan.make(config(*others), there, small, counted).fits
        except ConfigError:
            pass  # the batch was meant for fewer
    assert not plan.make(wanted, machine(memory_bytes=memory_bytes), small, counted).fits


def test_what_takes_least_is_said_where_nothing_fits(small, counted):
    least = plan.remedy(config(), machine(memory_bytes=10**9), small, counted)
    assert isinstance(least, plan.Plan)
    assert least.needed_bytes > 10**9
    assert "no setting makes it fit" in plan.text(least, least).splitlines()[-1]
    just = plan.remedy(config(), machine(memory_bytes=least.needed_bytes), small, counted)
    assert isinstance(just, plan.Remedy)
    assert just.plan.fits


def test_a_refusal_on_the_command_line(capsys):
    arguments = [*COMMAND, "--memory", "10GB"]
    assert main(arguments) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("it fits with --set checkpoint_activations=true: ")
    assert main([*arguments, "--set", "checkpoint_activations=true"]) == 0
    assert "\nfits: " in capsys.readouterr().out


def test_json(small, counted):
    found = json.loads(json.dumps(plan.as_json(plan.make(config(), machine(), small, counted), None)))
    assert found["fits"] is True
    assert found["advice"] is None
    assert found["tokens"] == TOKENS
    for stage in found["stages"].values():
        assert stage["peak_bytes"] == sum(stage["phases"][stage["peak"]].values())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--memory", "80"], "--memory 80: give a size with its unit"),
        (["--memory", "0GB"], "--memory 0GB"),
        (["--memory", "80GB", "--gpus", "0"], "--gpus 0"),
        (["--memory", "80GB", "--gpus", "3"], "pruning.fit.batch=8 cannot be shared by 3 processes"),
        (["--memory", "80GB", "--set", "context_parallel=3"], "context_parallel=3 does not divide --gpus 8"),
        (["--memory", "80GB", "--gpu", "abacus"], "--gpu abacus: known are a100"),
        (["--memory", "80GB", "--efficiency", "40"], "--efficiency 40"),
        (["--memory", "80GB", "--teacher", "models/none"], "there is no folder models/none"),
        (["--memory", "80GB", "--clip", "large"], "--clip large: give width, height and frames"),
        (["--memory", "80GB", "--set", "matching.no=1"], "matching.no: no such setting"),
    ],
)
def test_bad_input_is_one_line(capsys, changed, words):
    assert main([*COMMAND, *changed]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_unknown_recipe(capsys):
    assert main(["plan", "none", "--gpus", "8", "--memory", "80GB"]) == 2
    assert "no recipe 'none'; there are:" in capsys.readouterr().err


@pytest.mark.parametrize("again", [False, True])
def test_a_real_call_keeps_what_was_planned(given, batch, again):
    """By torch's own tracker, on real tensors, at a depth that was not run for the plan."""
    known = calls.teacher_of(given.folder, known=False)
    network = calls.network_of(known)
    planned = calls.Calls(known, "float32", True, 2).take(network.depths(), "all", len(batch), whole=True, again=again)
    model = given.teachers_copy()
    if again:
        model.enable_gradient_checkpointing(computed_again)
    weights = 4 * sum(p.numel() for p in model.parameters())
    sigma_B = torch.full((len(batch),), 0.5)
    with MemTracker() as tracker, plain_attention():
        velocity = given.velocity(model, batch.noise(torch.Generator()), sigma_B, batch)
        velocity.square().mean().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert math.isclose(peak["Total"] - weights, max(planned.forward_bytes, planned.backward_bytes), rel_tol=0.15), peak
