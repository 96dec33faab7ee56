"""How fast a training goes, how much of the processor it uses, what it holds, and where its time goes.

    python -m benchmarks.training [--shape small 1.3b 14b-lora] [--gpu h200 | --peak-tflops 989]

makes random Wan text-to-video teachers of these shapes, distils each for some steps by the real command and reads steps
a second and peak memory from what that writes; FLOP utilisation is what `distill plan` counts for a step, times that
rate, over the peak. `14b-lora` is one forward and backward pass of a 14 B network in bf16 with the critic's LoRA, its
blocks computed again. Then one such pass of the largest shape under torch's profiler. Writes Markdown beside this file;
what was not run here it says. Without an accelerator only `small` is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.plan import RECIPE, Case, distill, settings_of, shape_of, teach
from distill import calls, plan, recipes
from distill.loop import computed_again, plain_attention, training_device

STEPS, WARM = 8, 3
"""Of each stage, and the first of them that do not count."""
SHAPES = {
    "small": Case(heads=2, ffn_dim=1024, layers=6, side=128, frames=9),
    # As many tokens as 832 x 480 x 81 has, within 3 %.
    "1.3b": Case(heads=12, ffn_dim=8960, layers=30, side=640, frames=81, settings={"checkpoint_activations": True}),
    "14b-lora": Case(heads=40, ffn_dim=13824, layers=40, side=640, frames=81),
}
SETTINGS: dict[str, object] = {
    "compile": True, "pruning.fit.steps": STEPS, "pruning.fit.batch": 1, "pruning.fit.accumulate": 1,
    "pruning.fit.sample_every": STEPS, "matching.fit.steps": STEPS, "matching.fit.batch": 1,
    "matching.fit.accumulate": 1, "matching.fit.sample_every": STEPS, "matching.critic.rank": 128,
}  # fmt: skip
STAGES = {"II pruning": "pruning", "III matching": "matching"}


@dataclass(frozen=True)
class Row:
    """One stage of one shape."""

    shape: str
    stage: str
    parameters: int
    tokens: int
    steps_per_s: float
    flops_per_step: float
    memory_bytes: int


def main() -> int:
    """Measure what can be measured here, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = list(SHAPES) if torch.cuda.is_available() else ["small"]
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=here)
    parser.add_argument("--gpu", choices=tuple(plan.PEAK_TFLOPS), help="whose dense bf16 peak is taken")
    parser.add_argument("--peak-tflops", type=float, help="another peak; without either there is no utilisation")
    parser.add_argument("--work", type=Path, help="keeps teachers and runs (a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    peak = options.peak_tflops or (plan.PEAK_TFLOPS[options.gpu] if options.gpu else None)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = [row for name in options.shape if name != "14b-lora" for row in _run(work, name, SHAPES[name])]
    largest = options.shape[-1]
    held_bytes, seconds, table = _passes(SHAPES[largest])
    report = _report(rows, peak, largest, held_bytes, seconds, table)
    options.out.write_text(report)
    sys.stdout.write(report)
    return 0


def _run(work: Path, name: str, case: Case) -> list[Row]:
    teacher, folder = teach(work, case), work / f"{shape_of(case)}-run"
    chosen = [*settings_of(work, case), *(f"{key}={json.dumps(value)}" for key, value in SETTINGS.items())]
    if not (folder / "report.md").exists():
        distill(1, "run", RECIPE, folder, *(part for text in chosen for part in ("--set", text)))
    device: Any = training_device().type
    made = plan.make(
        recipes.load(RECIPE, chosen), plan.Machine(1, 2**40, 1.0, 1.0, device), calls.teacher_of(teacher, known=False)
    )
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    rows = []
    for stage in made.stages:
        told = [e for e in events if e["stage"] == STAGES.get(stage.name) and e.get("steps_per_s") and e["step"] > WARM]
        if told:
            rate_hz = statistics.median(e["steps_per_s"] for e in told)
            held = int(max(e["memory_mb"] for e in told) * 2**20)
            rows.append(
                Row(name, stage.name, made.parameters["teacher"], made.tokens, rate_hz, stage.flops_per_step, held)
            )
    return rows


def _passes(case: Case) -> tuple[int, float, str]:
    """Forward and backward of one clip through a network with the critic's LoRA: peak memory, seconds, profile."""
    device = training_device()
    with torch.device(device):
        dtype, torch_default = torch.bfloat16, torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        network = WanTransformer3DModel(
            num_attention_heads=case.heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=case.ffn_dim, num_layers=case.layers, cross_attn_norm=True,
        ).requires_grad_(False)  # fmt: skip
        torch.set_default_dtype(torch_default)
    targets = [
        name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear) and "blocks" in name
    ]
    network.add_adapter(LoraConfig(r=128, lora_alpha=128, target_modules=targets))
    network.train().enable_gradient_checkpointing(computed_again)
    x_BCTHW = torch.randn(1, 16, (case.frames - 1) // 4 + 1, case.side // 8, case.side // 8, device=device)
    text_BLD = torch.randn(1, 512, 4096, device=device)

    def there_and_back() -> None:
        with torch.autocast(device.type, torch.bfloat16), plain_attention():
            velocity = network(x_BCTHW, torch.tensor([500.0], device=device), text_BLD, return_dict=False)[0]
            velocity.float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    there_and_back()  # what is set up once
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as told:
        there_and_back()
    averages = told.key_averages()
    total_us = sum(of.self_device_time_total if device.type == "cuda" else of.self_cpu_time_total for of in averages)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    first = sorted(averages, key=lambda of: -getattr(of, key))[:12]
    table = "\n".join(f"| `{of.key[:80]}` | {of.count} | {getattr(of, key) / total_us:.1%} |" for of in first)
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return held, total_us / 1e6, table


def _report(rows: list[Row], peak: float | None, largest: str, held: int, seconds: float, table: str) -> str:
    lines = [
        f"| {row.shape} | {row.stage} | {row.parameters / 1e6:,.1f} | {row.tokens:,} | {row.steps_per_s:.3g} | "
        f"{row.flops_per_step / 1e12:,.3g} | "
        f"{'' if peak is None else f'{row.flops_per_step * row.steps_per_s / peak / 1e12:.1%}'} | "
        f"{row.memory_bytes / 1e9:.2f} |"
        for row in rows
    ]
    done = {row.shape for row in rows}
    lines += [f"| {name} | II, III | | | not measured | | | |" for name in SHAPES if name not in done | {"14b-lora"}]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    memory = f"{held / 1e9:.1f} GB" if held and largest == "14b-lora" else "not measured"
    return f"""# How fast a training goes

`python -m benchmarks.training`: {STEPS} steps of each stage of random Wan teachers, a clip at a time, the first {WARM}
left out, medians; stage III with one update of the critic for each of the student. {where}, torch {version("torch")},
diffusers {version("diffusers")}. FLOPs are those of `distill plan`, of networks that are not compiled.

| shape | stage | parameters, M | tokens | steps a second | TFLOP a step | of the peak | peak memory, GB |
|---|---|---:|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

Peak memory of one forward and backward pass of 14 B parameters in bf16 with a LoRA of rank 128, blocks computed again,
33,600 tokens: {memory}.

Where the time of such a pass of the shape `{largest}` goes, {seconds:.2f} s in all:

| operation | calls | share of the time |
|---|---:|---:|
{table}
"""


if __name__ == "__main__":
    raise SystemExit(main())
