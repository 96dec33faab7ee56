"""What a student is worth beside its teacher and the controls: `python -m benchmarks.distillation models/shapes-4step`.

Everything is measured on the same clips of the test split with the same noise, so that differences are paired. The
controls, made here from the student's teacher: four undistilled Euler steps on the student's noise levels, with the
teacher's guidance and without, and the teacher without the student's pruned blocks, untrained. Each evaluation is kept
in the folder of `--out` and is not done again while model and settings are the same. Then request times are measured,
teacher and student in turn. Writes Markdown beside this file. About an hour and a half on two cores, most of it
measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from distill import evaluate, metrics, recipes, student
from distill.backbones import wan
from distill.config import EvaluateConfig
from distill.loop import training_device
from worker.contract import Phase
from worker.pipeline import Options, VideoPipeline
from worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).with_suffix(".md")
SHOWN = (
    "score",
    *metrics.SCORED,
    "trajectory_error_px",
    "dynamic_degree",
    "flicker",
    "explained_psnr_db",
    "i2v_fidelity",
)
REPEATS = 7
WHOLE = "whole"


@dataclass(frozen=True)
class Row:
    """One model as it is called."""

    name: str
    folder: Path
    steps: int
    guidance: float
    blocks: int
    diversity: bool

    @property
    def block_evaluations(self) -> int:
        """Blocks run for one clip: steps, twice with guidance, times depth."""
        return self.steps * (2 if self.guidance > 1 else 1) * self.blocks


@dataclass(frozen=True)
class Measured:
    """What `distill evaluate` found for a row."""

    row: Row
    closed: np.ndarray
    values: dict[str, np.ndarray]
    diversity: np.ndarray
    fvd_shapes: float | None


def main() -> int:
    """Measure what is not measured yet and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--teacher", type=Path, default=ROOT / "models" / "shapes-teacher")
    parser.add_argument("--out", type=Path, default=Path("var/evaluations/distillation"), help="keeps the evaluations")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    config = recipes.evaluate_shapes().model_copy(update={"clips": options.clips, "seeds": options.seeds})
    measured = [_measure(row, options.out, config) for row in _rows(options.student, options.teacher, options.out)]
    seconds = _seconds([options.teacher, options.student])
    OUT.write_text(_report(measured, seconds, config, options.student))
    sys.stdout.write(OUT.read_text())
    return 0


def _rows(made: Path, teacher: Path, out: Path) -> list[Row]:
    card, of = student.read_card(made), student.read_card(teacher)
    assert card.blocks is not None
    assert card.teacher is not None
    if card.teacher.sha256 != of.sha256:
        raise SystemExit(f"error: {made} was made from another version of {teacher}; give its own by --teacher")
    steps, guidance = card.call["num_inference_steps"], of.call["guidance_scale"]
    every = len(card.blocks.kept) + len(card.blocks.pruned)
    few = _control(out / "few-steps", made, teacher, ())
    pruned = _control(out / "pruned", made, teacher, card.blocks.pruned)
    left = len(card.blocks.kept)
    return [
        Row("student", made, steps, 1.0, left, True),
        Row("teacher", teacher, of.call["num_inference_steps"], guidance, every, True),
        Row(f"{steps} undistilled steps, guidance {guidance:g}", few, steps, guidance, every, False),
        Row(f"{steps} undistilled steps, no guidance", few, steps, 1.0, every, False),
        Row(f"pruned, untrained, {steps} steps, guidance {guidance:g}", pruned, steps, guidance, left, False),
    ]


def _control(folder: Path, made: Path, teacher: Path, pruned: tuple[int, ...]) -> Path:
    """The teacher's weights with the student's scheduler, and without some blocks."""
    card = student.read_card(teacher)
    transformer = wan.WanTransformer3DModel.from_pretrained(teacher / "transformer", local_files_only=True)

    def save_parts(aside: Path) -> None:
        wan.without_blocks(transformer, pruned).half().save_pretrained(aside / "transformer")
        shutil.copytree(made / "scheduler", aside / "scheduler")
        shutil.copy(teacher / "model_index.json", aside / "model_index.json")

    # When it was made is no part of what it is: the evaluation is found again by the folder's hash.
    student.write_student(folder, teacher, card.model_copy(update={"kind": "student", "name": folder.name}), save_parts)
    return folder


def _measure(row: Row, out: Path, config: EvaluateConfig) -> Measured:
    config = config.model_copy(
        update={
            "num_inference_steps": (row.steps,),
            "guidance_scale": (row.guidance,),
            "diversity_pairs": config.diversity_pairs if row.diversity else 0,
        }
    )
    sha256 = student.read_card(row.folder).sha256
    folder = out / f"{sha256[:12]}-{row.steps}-{row.guidance:g}"
    path = folder / "report.json"
    if not path.exists() or json.loads(path.read_text())["config"] != config.model_dump(mode="json"):
        evaluate.evaluate(row.folder, folder, config, lambda line: sys.stderr.write(f"{row.name}: {line}\n"))
    found = json.loads(path.read_text())
    [setting] = found["settings"]
    return Measured(
        row=row,
        closed=np.array(found["closed"]),
        values={name: np.array(values, dtype=float) for name, values in setting["values"].items()},
        diversity=np.array(setting["diversity_values"], dtype=float),
        fvd_shapes=setting["fvd_shapes"][0] if setting["fvd_shapes"] else None,
    )


def _seconds(folders: list[Path]) -> dict[Path, dict[str, float]]:
    """Median seconds by phase of a request to each model, taken in turn in this process."""
    options = Options.of(Settings(device="cpu"))
    pipelines = {folder: VideoPipeline(folder, options) for folder in folders}
    image = Image.open(ROOT / "models" / "examples" / "red-circle.png").convert("RGB")
    taken: dict[Path, list[dict[str, float]]] = {folder: [] for folder in folders}
    for repeat in range(REPEATS + 1):
        for folder, pipeline in pipelines.items():
            timings = pipeline(image, pipeline.card.prompt.examples[0], seed=repeat).timings_s
            if repeat:  # the first of each warms up
                taken[folder].append({**timings, WHOLE: sum(timings.values())})
    return {
        folder: {phase: statistics.median(timings[phase] for timings in runs) for phase in runs[0]}
        for folder, runs in taken.items()
    }


# --- the report -----------------------------------------------------------------------------------------------------


def ratio(one: np.ndarray, other: np.ndarray, resamples: int = 2000) -> evaluate.Interval:
    """Ratio of two means over the same ``[seeds, clips]``, and its 95 % interval by paired bootstrap."""
    chance = np.random.default_rng(0)
    num_seeds, num_clips = one.shape
    ratios = []
    for _ in range(resamples):
        picked = np.ix_(chance.integers(num_seeds, size=num_seeds), chance.integers(num_clips, size=num_clips))
        ratios.append(np.nanmean(one[picked]) / np.nanmean(other[picked]))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.nanmean(one) / np.nanmean(other)), float(low), float(high)


def _report(
    measured: list[Measured], seconds: dict[Path, dict[str, float]], config: EvaluateConfig, folder: Path
) -> str:
    made, teacher, *controls = measured
    card = student.read_card(folder)
    assert card.blocks is not None
    counted = teacher.row.block_evaluations / made.row.block_evaluations
    denoising = seconds[teacher.row.folder][Phase.DENOISING] / seconds[made.row.folder][Phase.DENOISING]
    whole = seconds[teacher.row.folder][WHOLE] / seconds[made.row.folder][WHOLE]
    lines = [
        f"# {card.name}",
        "",
        f"`python -m benchmarks.distillation models/{card.name}`: test split, {config.clips} clips, half of them with "
        f"closed captions, {config.seeds} seeds of noise, the same for every row; 95 % intervals by paired bootstrap "
        f"over clips and seeds. One training seed ({card.stages[-1]['seed']}). sha256 {card.sha256[:12]}, teacher "
        f"{student.read_card(teacher.row.folder).sha256[:12]}. torch {torch.__version__}, {os.cpu_count()} cores "
        f"({platform.machine()}), evaluated on {training_device().type}; request times on a GPU: not measured.",
        "",
        f"Blocks {', '.join(map(str, card.blocks.pruned))} of {len(card.blocks.kept) + len(card.blocks.pruned)} are "
        f"gone: {card.blocks.block_ratio:.0%} of the block parameters and {card.blocks.ratio:.1%} of the transformer's "
        "are left.",
        "",
        "## What was wanted",
        "",
        "| | wanted | reached |",
        "|---|---:|---:|",
    ]
    for name in ("score", "prompt_following", "motion_amount", "validity"):
        lines.append(f"| {name} over the teacher's | .97 | {_cell(ratio(made.values[name], teacher.values[name]))} |")
    error = ratio(made.values["trajectory_error_px"], teacher.values["trajectory_error_px"])
    lines.append(f"| trajectory error over the teacher's | 1.25 at most | {_cell(error)} |")
    lines.append(
        f"| diversity over the teacher's | .9 | {_cell(ratio(made.diversity[None], teacher.diversity[None]))} |"
    )
    for control in controls:
        difference = evaluate.interval(made.values["score"] - control.values["score"])
        lines.append(f"| score minus that of: {control.row.name} | above 0 | {_cell(difference)} |")
    lines += [
        f"| denoising, times as fast as the teacher | .85 x {counted:.1f} = {0.85 * counted:.1f} | {denoising:.1f} |",
        "",
        f"Block evaluations: {teacher.row.block_evaluations} over {made.row.block_evaluations} = {counted:.1f}. "
        f"The whole request is {whole:.1f} times as fast.",
        "",
        "| median of seven, ms | encode | denoise | decode | whole |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in (teacher.row, made.row):
        taken = seconds[row.folder]
        phases = (Phase.ENCODING, Phase.DENOISING, Phase.DECODING, WHOLE)
        lines.append(f"| {row.name} | " + " | ".join(f"{1000 * taken[phase]:.0f}" for phase in phases) + " |")
    lines += ["", "## Every row", ""]
    for part in ("all", "closed", "open"):
        lines += [
            f"### {part} captions",
            "",
            "| | block evaluations | " + " | ".join(SHOWN) + " |",
            "|---|---:|" + "---|" * len(SHOWN),
        ]
        for m in measured:
            cells = [_cell(evaluate.interval(evaluate.part_of(m.values[name], m.closed, part))) for name in SHOWN]
            lines.append(f"| {m.row.name} | {m.row.block_evaluations} | " + " | ".join(cells) + " |")
        lines.append("")
    for m in measured:
        if m.diversity.size:
            fvd = f", fvd_shapes {m.fvd_shapes:.1f}" if m.fvd_shapes is not None else ""
            lines.append(f"- {m.row.name}: diversity {_cell(evaluate.interval(m.diversity[None]))}{fvd}")
    return "\n".join(lines) + "\n"


def _cell(found: evaluate.Interval) -> str:
    mean, low, high = found
    if not np.isfinite(mean):
        return ""
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    raise SystemExit(main())
