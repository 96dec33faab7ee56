"""How near the memory of `python -m distill plan` is to that of runs: the plan beside the measured peak.

    python -m benchmarks.plan [--only states activations again] [--processes 1 2]

makes random Wan teachers, one whose weights and what is kept of them are most of the memory and one whose activations
are, distils each for two steps by the real command, alone and under `torchrun`, and compares each stage's peak with its
plan. On a GPU the peak is the allocator's; on CPUs it is the resident memory of the larger process beyond that of the
same run of a teacher of no size, with an allocator that hands back at once what is freed (MALLOC_MMAP_THRESHOLD_).
Resident memory and no count of tensors, since it is what runs out. Writes Markdown beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from distill import calls, plan, recipes
from distill.teach import make_tokenizer

RECIPE = "wan2.1-t2v-1.3b"
MB = 1e6
TOLERANCE = 0.15
EVENTS = {"II pruning": "pruning", "III matching": "matching"}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Case:
    """A teacher's shape and a run's settings."""

    heads: int
    ffn_dim: int
    layers: int
    side: int
    frames: int
    settings: dict[str, object] = field(default_factory=dict)


NOTHING = Case(heads=1, ffn_dim=64, layers=4, side=32, frames=5)
CASES = {
    "states": Case(heads=8, ffn_dim=4096, layers=8, side=32, frames=5),
    "activations": Case(heads=2, ffn_dim=1024, layers=6, side=320, frames=9),
    "again": Case(heads=2, ffn_dim=1024, layers=6, side=320, frames=9, settings={"checkpoint_activations": True}),
}
SETTINGS: dict[str, object] = {
    "preset": "smoke", "precision": "bfloat16", "compile": False, "checkpoint_activations": False, "watched": 1,
    "num_clips": 4, "importance.clips": 1, "importance.sigmas": 1, "pruning.unimportant": 1.0,
    "pruning.drift_limit": 1e9,
    "pruning.fit.steps": 2, "pruning.fit.batch": 2, "pruning.fit.accumulate": 2, "pruning.fit.sample_every": 1,
    "pruning.fit.checkpoint_every": 1000, "pruning.fit.log_every": 1, "matching.fit.steps": 2, "matching.fit.batch": 2,
    "matching.fit.accumulate": 2, "matching.fit.sample_every": 1, "matching.fit.checkpoint_every": 1000,
    "matching.fit.log_every": 1, "matching.critic.updates": 1, "matching.critic.rank": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One stage of one run."""

    case: str
    processes: int
    stage: str
    parameters: int
    tokens: int
    phase: str
    planned_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        """1: as planned."""
        return self.planned_bytes / self.measured_bytes


def main() -> int:
    """Exit code 1: a plan is further off than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1] if torch.cuda.device_count() == 1 else [1, 2])
    parser.add_argument("--work", type=Path, help="keeps teachers and runs (a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = [
            row
            for processes in options.processes
            for before in (_run(work, "nothing", NOTHING, processes),)
            for name in options.only
            for row in _rows(work, name, processes, before)
        ]
    report = _report(rows)
    options.out.write_text(report)
    sys.stdout.write(report)
    return 0 if all(abs(row.ratio - 1) <= TOLERANCE for row in rows) else 1


def _rows(work: Path, name: str, processes: int, before: dict[str, int]) -> list[Row]:
    case = CASES[name]
    measured = _run(work, name, case, processes)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    machine = plan.Machine(processes, 2**40, 1.0, 1.0, device)
    teacher = calls.teacher_of(work / f"{shape_of(case)}-teacher", known=False)
    made = plan.make(recipes.load(RECIPE, settings_of(work, case)), machine, teacher)
    rows = []
    for stage in made.stages:
        if stage.name in EVENTS:
            peak = stage.peak
            size_bytes = measured[stage.name] - (0 if device == "cuda" else before[stage.name])
            rows.append(
                Row(name, processes, stage.name, made.parameters["teacher"], made.tokens, peak.name,
                    peak.total_bytes, size_bytes)
            )  # fmt: skip
            sys.stderr.write(f"{rows[-1]} {rows[-1].ratio:.3f} {peak.bytes_by_part}\n")
    return rows


def shape_of(case: Case) -> str:
    return f"{case.heads}-{case.ffn_dim}-{case.layers}-{case.side}-{case.frames}"


def settings_of(work: Path, case: Case) -> list[str]:
    teacher, data = work / f"{shape_of(case)}-teacher", work / f"{shape_of(case)}-data"
    values = {**SETTINGS, "teacher": str(teacher), "data": str(data), **case.settings}
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


def _run(work: Path, name: str, case: Case, processes: int) -> dict[str, int]:
    """The peak of each stage, each in processes of its own: peaks only grow."""
    teach(work, case)
    folder = work / f"{name}-{processes}"
    command = ["run", RECIPE, folder, *(part for text in settings_of(work, case) for part in ("--set", text))]
    if not (folder / "report.md").exists():
        distill(processes, *command)
    found = {"II pruning": _peak(folder, EVENTS["II pruning"])}
    again = work / f"{name}-{processes}-matching"
    if not (again / "report.md").exists():
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(
            folder, again, ignore=shutil.ignore_patterns("matching*", "report.md", "student", "events.jsonl")
        )
        command[2] = again
        distill(processes, *command)
    return {**found, "III matching": _peak(again, EVENTS["III matching"])}


def teach(work: Path, case: Case) -> Path:
    """The case's teacher, with the clips that it is distilled on beside it."""
    teacher, data = work / f"{shape_of(case)}-teacher", work / f"{shape_of(case)}-data"
    if not teacher.exists():
        _make_teacher(teacher, case)
    if not data.exists():
        captions = work / "captions.txt"
        captions.write_text("".join(f"a boat on lake number {i}\n" for i in range(8)))
        distill(1, "prepare", captions, data, "--model", teacher, "--from-teacher", "--set", "held_out=0.4")
    return teacher


def _peak(folder: Path, stage: str) -> int:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return int(max(e["memory_mb"] for e in events if e["stage"] == stage and "memory_mb" in e) * 2**20)


def distill(processes: int, *arguments: object) -> None:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["distill", *map(str, arguments)]
    environment = {**os.environ, **({} if torch.cuda.is_available() else ALLOCATOR)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603


def _make_teacher(folder: Path, case: Case) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=64, d_kv=8, d_ff=32, num_heads=2, num_layers=1)
        ),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[True, True],
            in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=case.heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64,
            freq_dim=64, ffn_dim=case.ffn_dim, num_layers=case.layers, cross_attn_norm=True,
        ),
    )  # fmt: skip
    aside = folder.with_suffix(".tmp")
    pipe.save_pretrained(aside)
    call = {"num_inference_steps": 2, "height": case.side, "width": case.side, "num_frames": case.frames,
            "max_sequence_length": 32}  # fmt: skip
    distill(1, "adopt", aside, *(part for name, of in call.items() for part in ("--set", f"{name}={of}")))
    aside.rename(folder)


def _report(rows: list[Row]) -> str:
    lines = "\n".join(
        f"| {row.case} | {row.processes} | {row.stage} | {row.parameters / 1e6:.1f} | {row.tokens:,} | {row.phase} | "
        f"{row.planned_bytes / MB:,.0f} | {row.measured_bytes / MB:,.0f} | {row.ratio:.3f} |"
        for row in rows
    )
    worst = max(abs(row.ratio - 1) for row in rows)
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}: peak of the allocator"
    else:
        where = (
            "CPU processes: resident memory of the larger one beyond that of the same run of a teacher of no size. "
            "GPU: not measured"
        )
    return f"""# The plan beside measured peaks

`python -m benchmarks.plan`: random Wan text-to-video teachers, two steps of each stage by `python -m distill run` or \
`torchrun`, {SETTINGS["precision"]}, batch 2, accumulate 2, LoRA of rank {SETTINGS["matching.critic.rank"]}. {where}. \
{os.cpu_count()} cores ({platform.machine()}), torch {version("torch")}, diffusers {version("diffusers")}, \
Python {platform.python_version()}.

| case | processes | stage | parameters, M | tokens | planned peak | planned, MB | measured, MB | ratio |
|---|---:|---|---:|---:|---|---:|---:|---:|
{lines}

The worst is off by {worst:.1%}; {TOLERANCE:.0%} are allowed. `again` is `activations` with
checkpoint_activations=true. The allocator gives back at once what is freed (MALLOC_MMAP_THRESHOLD_); each stage is
measured in processes of its own, up to its last step, the samples that it draws on the way included. On CPUs attention
is made of matrix products and keeps a number for each pair of tokens, and what is drawn for people takes memory too;
the plan for GPUs counts what the fused kernels keep.
"""


if __name__ == "__main__":
    raise SystemExit(main())
