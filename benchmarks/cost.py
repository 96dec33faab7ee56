"""How the cost of a forward pass grows with tokens and with blocks, and what whole runs are planned to take.

    python -m benchmarks.cost [--repeats 5]

times a Wan transformer with random weights (on a GPU at the shape of Wan2.1-1.3B in bf16, else at one that two cores
can do) on more and more tokens and with more and more blocks, beside the operations that `distill.calls` counts; and
plans the recipes of large models for 8 and for 64 GPUs. Writes Markdown and a plot beside this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import WanTransformer3DModel
from matplotlib.figure import Figure

from distill import calls, plan, recipes, report

FRAME = 32
"""Side of a latent frame, of 256 tokens."""
RECIPES = {
    "wan2.1-t2v-1.3b": "832x480x81", "wan2.1-i2v-14b": "832x480x81", "hunyuanvideo-i2v": "960x544x97",
    "hunyuanvideo-t2v": "960x544x97",
}  # fmt: skip
"""With the size of clips. At HunyuanVideo's largest, 1280x720x129, no setting fits 64 GPUs of 80 GB."""
GPU, MEMORY, EFFICIENCY = "h100", "80GB", 0.4


@dataclass(frozen=True)
class Point:
    """One size."""

    tokens: int
    blocks: int
    seconds: float
    """Median."""
    flops: int


def main() -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, help="tokens (8192; on a GPU 32768)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    largest = options.largest or (32768 if gpu else 8192)
    frames = [2**power for power in range(9) if 256 * 2**power <= largest]
    heads, head_dim, ffn_dim, blocks = (12, 128, 8960, 30) if gpu else (4, 64, 1024, 2)
    shape = {"num_attention_heads": heads, "attention_head_dim": head_dim, "ffn_dim": ffn_dim}
    by_tokens = [_timed(shape, blocks, count, options.repeats) for count in frames]
    by_blocks = [_timed(shape, count, 4, options.repeats) for count in (1, 2, 4, 8)]
    _plot(options.out.with_suffix(".png"), by_tokens, by_blocks)
    text = _report(shape, by_tokens, by_blocks, options)
    options.out.write_text(text)
    sys.stdout.write(text)
    return 0


@torch.no_grad()
def _timed(shape: dict[str, int], blocks: int, frames: int, repeats: int) -> Point:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        **shape, num_layers=blocks, in_channels=16, out_channels=16, text_dim=256, freq_dim=256, cross_attn_norm=True
    ).eval()
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, FRAME, FRAME).to(device, model.dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, 128, 256).to(device, model.dtype),
    }
    counting = calls.Counting([])
    with counting:
        model(**inputs, return_dict=False)
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        model(**inputs, return_dict=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    found = Point(frames * (FRAME // 2) ** 2, blocks, statistics.median(seconds[1:]), counting.flops)
    sys.stderr.write(f"{found}\n")
    return found


def _plot(path: Path, by_tokens: list[Point], by_blocks: list[Point]) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, points, name in zip(figure.subplots(1, 2), (by_tokens, by_blocks), ("tokens", "blocks"), strict=True):
        sizes = [getattr(point, name) for point in points]
        per_s = max(point.flops / point.seconds for point in points)
        axes.plot(sizes, [point.seconds for point in points], "o-", label="measured")
        label = f"operations at {per_s / 1e9:,.0f} GFLOP/s, the best of them"
        axes.plot(sizes, [point.flops / per_s for point in points], "--", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel("seconds of a forward pass")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    report.save(figure, path)


def _projection(recipe: str, gpus: int) -> str:
    config = recipes.load(recipe, [])
    teacher = plan.with_clips_of(calls.teacher_of(Path(config.teacher), known=True), RECIPES[recipe])
    machine = plan.machine(gpus, MEMORY, GPU, None, EFFICIENCY, "cuda")
    found = plan.remedy(config, machine, teacher, plan.calls_of(config, machine, teacher))
    made = found if isinstance(found, plan.Plan) else found.plan
    settings = "none fits" if isinstance(found, plan.Plan) else ", ".join(f"`{s}`" for s in found.settings)
    days = [made.gpu_hours(stage) / made.machine.processes / 24 for stage in made.stages]
    return (
        f"| {recipe} | {RECIPES[recipe]} | {made.machine.processes} | {made.tokens:,} | "
        f"{made.peak_bytes / plan.GB:.1f} | {' | '.join(f'{day:.2f}' for day in days)} | {sum(days):.2f} | "
        f"{sum(map(made.gpu_hours, made.stages)) / 24:.0f} | {settings or 'as it is'} |"
    )


def _rows(points: list[Point]) -> str:
    first = points[0]
    return "\n".join(
        f"| {p.tokens:,} | {p.blocks} | {1000 * p.seconds:,.1f} | {p.seconds / first.seconds:.2f} | "
        f"{p.flops / 1e9:,.1f} | {p.flops / first.flops:.2f} | {p.flops / p.seconds / 1e9:,.1f} |"
        for p in points
    )


def _report(shape: dict[str, int], by_tokens: list[Point], by_blocks: list[Point], options: argparse.Namespace) -> str:
    head = """| tokens | blocks | ms | over the first | GFLOP | over the first | GFLOP/s |
|---:|---:|---:|---:|---:|---:|---:|"""
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, bfloat16"
    else:
        where = f"CPU, float32, {torch.get_num_threads()} torch threads. GPU: not measured"
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    projections = "\n".join(_projection(recipe, gpus) for recipe in RECIPES for gpus in (8, 64))
    return f"""# How cost grows

`python -m benchmarks.cost --repeats {options.repeats}`: forward passes of a Wan transformer of random weights, width \
{width}, {shape["num_attention_heads"]} heads, feed-forward {shape["ffn_dim"]}; median of {options.repeats}. {where}. \
{os.cpu_count()} cores ({platform.machine()}), torch {version("torch")}, diffusers {version("diffusers")}, \
Python {platform.python_version()}.

With the number of tokens ({by_tokens[0].blocks} blocks):

{head}
{_rows(by_tokens)}

With the number of blocks ({by_blocks[0].tokens:,} tokens):

{head}
{_rows(by_blocks)}

![time and operations](cost.png)

Of width D and feed-forward F a block of Wan computes about N (12 D^2 + 4 D F) + 4 N^2 D on N tokens: attention is most
of it from N = 3 D + F on ({3 * width + shape["ffn_dim"]:,} here, 29,184 of Wan 14B), so that twice the tokens cost
twice as much well below that number, and four times as much well above it. Blocks cost as many times as there are.

## Whole runs, on paper

Nothing here is measured. `distill plan` for {GPU.upper()} GPUs of {MEMORY} ({plan.PEAK_TFLOPS[GPU]:g} TFLOPS of dense
bf16), with the first settings that fit and let the GPUs share the batch. Assumed: {EFFICIENCY:.0%} of the peak is kept
up, on 64 GPUs as on 8 (a network between machines that is slower than the GPUs' work makes it less); nothing but the
transformer's operations takes time (data is prepared, checkpoints are written beside); blocks are not compiled, which
would keep less; the recipe's steps. An update sees 16 clips; more GPUs than that share a clip's tokens, or, of
HunyuanVideo, whose tokens cannot be shared, an update sees one clip for each and costs as much more. Days of each
stage, and of all:

| recipe | clips | GPUs | tokens | GB each | I | II | III | days | GPU-days | settings |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|
{projections}
"""


if __name__ == "__main__":
    raise SystemExit(main())
