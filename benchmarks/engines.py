"""Pixels to frames, stock diffusers beside ours: `make bench`, or `python -m benchmarks.engines`.

Three ways to the same clip, in turn, several times, in one process on one machine: the teacher's folder and the
student's folder as anyone would call them with stock diffusers, and the student through our pipeline. Each by phase:
encoding (sentence and image, up to the transformer's first call), denoising, decoding (up to frames as bytes). The MP4
is timed apart. Writes Markdown to the given file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does

import diffusers
import numpy as np
import torch
from PIL import Image

from distill import student
from worker import video
from worker.contract import Phase
from worker.pipeline import Options, VideoPipeline
from worker.settings import MODELS_DIR, Settings

IMAGE = MODELS_DIR / "examples" / "red-circle.png"
PROMPT = "a red circle moves right quickly, static camera"
PHASES = (Phase.ENCODING, Phase.DENOISING, Phase.DECODING)

Call = Callable[[int], tuple[Any, dict[Phase, float]]]
"""``seed -> (frames [T, H, W, 3] as bytes, seconds of each phase)``"""


def main() -> int:
    """Exit code 1: our frames are not the stock student's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("engines.md"))
    options = parser.parse_args()
    settings = Settings()
    ours = VideoPipeline(MODELS_DIR / "shapes-4step", Options.of(settings))
    image = Image.open(IMAGE).convert("RGB")

    def call_ours(seed: int) -> tuple[Any, dict[Phase, float]]:
        # Or what is kept of the sentence would make its encoding free.
        ours._texts.clear()
        result = ours(image, PROMPT, seed=seed)
        return result.frames_THWC, result.timings_s

    calls: dict[str, Call] = {
        "stock diffusers, teacher": stock(MODELS_DIR / "shapes-teacher", image),
        "stock diffusers, student": stock(MODELS_DIR / "shapes-4step", image),
        "ours, student": call_ours,
    }
    times: dict[str, list[dict[Phase, float]]] = {name: [] for name in calls}
    frames: dict[str, Any] = {}
    for repeat in range(-1, options.repeats):  # the first warms up
        for name, call in calls.items():
            frames[name], seconds = call(repeat + 1)
            if repeat >= 0:
                times[name].append(seconds)
        sys.stderr.write(f"{repeat + 1} of {options.repeats}\n")
    error = np.mean((frames["ours, student"].astype(float) - frames["stock diffusers, student"].astype(float)) ** 2)
    psnr_db = 10 * np.log10(255**2 / max(error, 1e-9))
    if psnr_db < 45:
        sys.stderr.write(f"error: our frames are {psnr_db:.1f} dB from the stock student's; 45 are wanted\n")
        return 1
    muxing = [_seconds(lambda: video.encode_mp4(frames["ours, student"], 8)) for _ in range(options.repeats)]
    table = _table(ours, times, statistics.median(muxing), psnr_db, options.repeats)
    options.out.write_text(table)
    sys.stdout.write(table)
    return 0


def stock(folder: Path, image: Image.Image) -> Call:
    """A model folder as its README says to call it."""
    call = student.read_card(folder).call
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    marks: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    pipe.transformer.register_forward_pre_hook(lambda *_: mark() if len(marks) == 1 else None)
    decode = pipe.vae.decode

    def marked(*arguments: Any, **named: Any) -> Any:
        mark()
        return decode(*arguments, **named)

    pipe.vae.decode = marked

    def run(seed: int) -> tuple[Any, dict[Phase, float]]:
        marks.clear()
        mark()
        made = pipe(image=image, prompt=PROMPT, generator=torch.Generator().manual_seed(seed), **call).frames[0]
        frames = (np.asarray(made) * 255).round().astype(np.uint8)
        mark()
        return frames, {phase: after - before for phase, (before, after) in zip(PHASES, pairwise(marks), strict=True)}

    return run


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _table(
    ours: VideoPipeline, times: dict[str, list[dict[Phase, float]]], muxing_s: float, psnr_db: float, repeats: int
) -> str:
    totals = {name: [sum(one.values()) for one in runs] for name, runs in times.items()}

    def ms(values: list[float]) -> str:
        return f"{1000 * statistics.median(values):.0f}"

    def over(name: str, reference: str) -> str:
        ratios = [a / b for a, b in zip(totals[name], totals[reference], strict=True)]
        return f"{statistics.median(ratios):.2f}"

    teacher, stock_student, _ = times
    lines = "\n".join(
        f"| {name} | {' | '.join(ms([one[phase] for one in runs]) for phase in PHASES)} | {ms(totals[name])} "
        f"| {over(name, stock_student)} | {over(name, teacher)} |"
        for name, runs in times.items()
    )
    card, engine = ours.card, ours.choice
    return f"""# Pixels to frames, stock diffusers beside ours

`make bench` (`python -m benchmarks.engines`): medians of {repeats} after a warm-up, the three in turn in one process.
{card.video.num_frames} frames of {card.video.width} x {card.video.height}; ours: {engine.name}, decoder \
{engine.decoder.name}; {ours.threads} threads, {os.cpu_count()} cores ({platform.machine()}), torch \
{version("torch")}, diffusers {version("diffusers")}, onnxruntime {version("onnxruntime")}, Python \
{platform.python_version()}. Milliseconds; the ratios are medians of paired ratios.

| | encoding | denoising | decoding | in all | over stock student | over stock teacher |
|---|---:|---:|---:|---:|---:|---:|
{lines}

The MP4 of the frames, apart: {1000 * muxing_s:.0f} ms. Our frames and the stock student's, same seed: {psnr_db:.1f} dB.
Goal: ours at most .8 of the stock student. GPU: not measured (see engines_gpu.py).
"""


if __name__ == "__main__":
    raise SystemExit(main())
