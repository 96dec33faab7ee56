"""What the low-memory settings of the eager engine save, and what they cost.

    MODEL=shapes-4step python -m benchmarks.memory [--clips 12]

makes the same clips in every setting of `worker.engine.memory`: bytes of the weights as they are kept, the frames
against those of full precision and, on a GPU, the peak of its memory while a clip is made and the time that this takes.
On a CPU nothing can be offloaded; the weights then take the same way without being copied. Writes Markdown beside this
file.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from distill import student
from worker.engine import memory
from worker.settings import MODELS_DIR, Settings, read

EXAMPLES = MODELS_DIR / "examples"
SETTINGS: tuple[tuple[memory.Offload, memory.Casting], ...] = (
    ("none", "none"),
    ("none", "fp8"),
    ("group", "none"),
    ("group", "fp8"),
)
MB = 1e6


@dataclass(frozen=True)
class Measured:
    """One setting."""

    transformer_bytes: int
    all_bytes: int
    clips: list[Tensor]
    seconds: list[float]
    peak_bytes: int | None


def main() -> int:
    """Exit code 2: MODEL is no model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12, help="each with its own seed, image and sentence")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    folder = read(Settings).model
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    measured = [_measure(folder, offload, casting, options.clips) for offload, casting in SETTINGS]
    report = _report(student.read_card(folder), measured)
    options.out.write_text(report)
    sys.stdout.write(report)
    return 0


def _measure(folder: Path, offload: memory.Offload, casting: memory.Casting, num_clips: int) -> Measured:
    gpu = torch.cuda.is_available()
    gc.collect()  # the pipeline of the setting before: it and its hooks refer to each other
    if gpu:
        torch.cuda.empty_cache()
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=torch.bfloat16 if gpu else torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    if gpu:
        memory.place(pipe, offload=offload, casting=casting, device=torch.device("cuda"))
    else:
        memory.place(pipe, offload="none", casting=casting, device=torch.device("cpu"))
        if offload == "group":
            memory.offload_groups(pipe, torch.device("cpu"))
    call = student.read_card(folder).call
    examples = json.loads((EXAMPLES / "index.json").read_text())

    def make(number: int) -> Tensor:
        example = examples[number % len(examples)]
        with Image.open(EXAMPLES / f"{example['name']}.png") as opened:
            image = opened.convert("RGB").resize((call["width"], call["height"]))
        noise = torch.Generator().manual_seed(number)
        frames = pipe(image, example["prompt"], generator=noise, output_type="np", **call).frames[0]
        return torch.from_numpy(frames)

    make(0)  # the first call finds the order of the blocks and warms the allocator
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    clips, seconds = [], []
    for number in range(num_clips):
        started = time.perf_counter()
        clips.append(make(number))  # waits for the GPU: its frames are here
        seconds.append(time.perf_counter() - started)
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return Measured(
        transformer_bytes=memory.weight_bytes(pipe.transformer),
        all_bytes=sum(map(memory.weight_bytes, networks)),
        clips=clips,
        seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if gpu else None,
    )


def _psnr_db(clip: Tensor, wanted: Tensor) -> float:
    """Of frames in [0, 1]; infinite where they are equal."""
    error = (clip - wanted).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def _report(card: student.Card, measured: list[Measured]) -> str:
    full, *_ = measured
    rows = []
    for (offload, casting), of in zip(SETTINGS, measured, strict=True):
        psnrs_db = [_psnr_db(*pair) for pair in zip(of.clips, full.clips, strict=True)]
        equal = all(map(math.isinf, psnrs_db))
        quality = "equal | equal" if equal else f"{statistics.median(psnrs_db):.1f} | {min(psnrs_db):.1f}"
        gpu = ""
        if of.peak_bytes is not None:
            gpu = f" {of.peak_bytes / MB:.0f} | {1000 * statistics.median(of.seconds):.0f} |"
        share = of.transformer_bytes / full.transformer_bytes
        rows.append(
            f"| {offload} | {casting} | {of.transformer_bytes / MB:.2f} ({share:.0%}) | {of.all_bytes / MB:.2f} | "
            f"{quality} |{gpu}"
        )
    lines = "\n".join(rows)
    if full.peak_bytes is None:
        where = f"CPU, float32, {torch.get_num_threads()} torch threads. GPU: not measured"
        head, rule = "", ""
    else:
        where = f"{torch.cuda.get_device_name()}, bfloat16"
        head, rule = " GPU peak, MB | median ms a clip |", "---:|---:|"
    return f"""# Less memory for the eager engine

`python -m benchmarks.memory`: {len(full.clips)} clips, each with its own seed, image and sentence, against the same \
clips in the first row's setting. {card.name}, {card.call["num_inference_steps"]} steps, \
{card.video.num_frames} frames of {card.video.width} x {card.video.height}. {where}. \
{os.cpu_count()} cores ({platform.machine()}), torch {version("torch")}, diffusers {version("diffusers")}, \
Python {platform.python_version()}.

| offload | casting | transformer's weights, MB | all weights, MB | PSNR, median dB | lowest |{head}
|---|---|---:|---:|---:|---:|{rule}
{lines}

Weights as they are kept, in 10^6 bytes. fp8 keeps the matrices of the blocks as float8_e4m3fn, without a scale, and
widens each for its use. Group offload keeps all weights in the host's memory and has a block or two at a time on the
GPU; on a CPU the weights take the same way without being copied, so that row shows only that the frames are the same.
"""


if __name__ == "__main__":
    raise SystemExit(main())
