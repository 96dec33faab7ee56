"""`python -m distill evaluate FOLDER`: what a model folder is worth, on clips that it has never seen.

Every setting asked for (number of steps, guidance) gets the same images, captions and noise, so two settings, or two
folders, can be compared clip by clip. Written to the output folder: `report.json` (every value of every clip),
`report.md`, `metrics.png` and `sheet.png`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from distill import features, fitting, losses, metrics, report, sampler, student
from distill.autoencoder import in_one_pass
from distill.backbones import wan
from distill.config import ConfigError, EvaluateConfig
from distill.data import shapes
from distill.loop import training_device

BATCH = 32
FEATURES = Path(__file__).resolve().parent.parent / "models" / "shapes-features" / "model.safetensors"
PARTS = ("all", "closed", "open")
ROWS = ("score", *metrics.SCORED, *metrics.REPORTED)


@dataclass(frozen=True)
class Setting:
    """One way to call the model."""

    num_inference_steps: int
    guidance_scale: float

    def __str__(self) -> str:
        return f"{self.num_inference_steps} steps, guidance {self.guidance_scale:g}"


@dataclass(frozen=True)
class Result:
    """The metrics of one setting, an array ``[seeds, clips]`` each."""

    setting: Setting
    values: dict[str, np.ndarray]
    diversity: np.ndarray
    """``[pairs]``."""
    seconds_per_clip: float
    fvd_shapes: tuple[float, float] | None
    """Frechet distance of the clips' features to those of drawn clips, and the same between two sets of drawn ones."""

    @property
    def mean_score(self) -> float:
        """``score`` over all clips and seeds."""
        return float(np.nanmean(self.values["score"]))


def evaluate(folder: Path, out: Path, config: EvaluateConfig, say: Callable[[str], None]) -> list[Result]:
    """Sample, measure, and write the report of ``folder`` into ``out``.

    Raises:
        FolderError: the folder is no model folder, or was changed.
        ConfigError: more clips asked for than the split has.
    """
    card = student.read_card(folder)
    pipe = load(folder)
    clips, closed = draw_clips(config.split, config.clips)
    reconstruct = _reconstruction(pipe)
    vae_psnr_db_T = losses.psnr_db(reconstruct(clips.video_BCTHW), clips.video_BCTHW).mean(0).numpy()
    settings = settings_of(card, config)
    results, shown = [], {}
    for setting in settings:
        result, sheet = _evaluate_setting(pipe, card, clips, reconstruct, setting, config, say)
        results.append(result)
        shown[str(setting)] = sheet
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.json", json.dumps(_as_json(card, config, closed, vae_psnr_db_T, results)) + "\n")
    _write(out / "report.md", as_markdown(card, config, closed, vae_psnr_db_T, results))
    report.bars(out / "metrics.png", _bars(results, closed), title=f"{card.name}, {config.split} split")
    # Half of the sheet closed, half open: draw_clips puts the closed ones first.
    half = min(6, len(clips.captions) // 2)
    rows = torch.tensor([*range(half), *range(len(clips.captions) - half, len(clips.captions))])
    for number, setting in enumerate(settings):
        name = "sheet.png" if number == 0 else f"sheet-{setting.num_inference_steps}-{setting.guidance_scale:g}.png"
        made, truth = shown[str(setting)][rows], clips.video_BCTHW[rows]
        report.contact_sheet(out / name, [truth, made, (made - truth) / 2], inputs_BCHW=truth[:, :, 0])
        if number == 0:
            given = truth[:, :, :1].expand_as(truth)
            report.animation(out / "comparison.webp", [given, truth, made], shapes.FPS)
    return results


def load(folder: Path) -> Any:
    """The stock pipeline of a folder, in full precision, on the accelerator if there is one."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    in_one_pass(pipe.vae)
    return pipe.to(training_device())


def settings_of(card: student.Card, config: EvaluateConfig) -> list[Setting]:
    """Every combination asked for; the card's own values where nothing is."""
    steps = config.num_inference_steps or (card.call["num_inference_steps"],)
    scales = config.guidance_scale or (card.call["guidance_scale"],)
    return [Setting(*pair) for pair in product(steps, scales)]


def draw_clips(split: str, count: int) -> tuple[shapes.Clips, np.ndarray]:
    """``count`` clips of a split, first closed captions, then as many open ones; and which are closed."""
    everything = shapes.SPLITS[split][: 4 * count + 64]
    captions, _ = shapes.sample(0, everything)
    closed = [index for index, caption in zip(everything, captions, strict=True) if caption.closed]
    opened = [index for index, caption in zip(everything, captions, strict=True) if not caption.closed]
    half = count // 2
    if min(len(closed), len(opened)) < count - half:
        raise ConfigError(f"--clips {count}: the {split} split does not hold as many of both kinds; ask for fewer")
    indices = closed[:half] + opened[: count - half]
    clips = shapes.clips(0, indices)
    return clips, np.array([caption.closed for caption in clips.captions])


def make(
    pipe: Any, card: student.Card, setting: Setting, first_BCHW: Tensor, prompts: Sequence[str], seeds: Sequence[int],
    precision: torch.dtype,
) -> Tensor:  # fmt: skip
    """Videos by our batched sampler, ``BATCH`` at a time."""
    call = {**card.call, "num_inference_steps": setting.num_inference_steps, "guidance_scale": setting.guidance_scale}
    parts = []
    for i in range(0, len(prompts), BATCH):
        part = slice(i, i + BATCH)
        noise_BCTHW = sampler.draw_noise(pipe, seeds[part], call)
        parts.append(sampler.sample(pipe, first_BCHW[part], prompts[part], call, noise_BCTHW, precision).cpu())
    return torch.cat(parts)


def noise_seed(seed: int, index: int) -> int:
    """The generator seed of a clip's noise: the same for every model and setting."""
    return seed * 1_000_003 + index


def _reconstruction(pipe: Any) -> Callable[[Tensor], Tensor]:
    """Encodes and decodes videos: what the model's autoencoder can show at best."""

    @torch.no_grad()
    def reconstruct(video_BCTHW: Tensor) -> Tensor:
        parts = video_BCTHW.to(pipe.vae.device).split(BATCH)
        return torch.cat([wan.decode_latents(pipe.vae, wan.encode_video(pipe.vae, part)).cpu() for part in parts])

    return reconstruct


def _evaluate_setting(
    pipe: Any, card: student.Card, clips: shapes.Clips, reconstruct: Callable[[Tensor], Tensor], setting: Setting,
    config: EvaluateConfig, say: Callable[[str], None],
) -> tuple[Result, Tensor]:  # fmt: skip
    assert clips.source is not None
    prompts = [str(caption) for caption in clips.captions]
    precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32

    rows: list[dict[str, Tensor]] = []
    all_made: list[Tensor] = []
    seconds = 0.0
    for seed in range(config.seeds):
        started = time.monotonic()
        seeds = [noise_seed(seed, index) for index in clips.source[1]]
        made = make(pipe, card, setting, clips.video_BCTHW[:, :, 0], prompts, seeds, precision)
        seconds += time.monotonic() - started
        say(f"{setting}: seed {seed}: {len(prompts)} clips in {time.monotonic() - started:.0f} s")
        rows.append(metrics.measure(made, clips, reconstruct).values)
        say(f"{setting}: seed {seed}: score {rows[-1]['score'].mean():.3f}")
        all_made.append(made)
    values = {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]}
    spread = _diversity(pipe, card, setting, config, precision, say)
    distances = fvd_shapes(all_made, clips)
    return Result(setting, values, spread, seconds / (config.seeds * len(prompts)), distances), all_made[0]


def fvd_shapes(made: list[Tensor], clips: shapes.Clips) -> tuple[float, float] | None:
    """Distance of a model's clips to drawn ones with the same first frames and captions, and between two drawn sets.

    None where the classifier is not at hand, or there are too few clips for its features.
    """
    if not FEATURES.exists() or len(made) * len(clips.captions) <= features.FEATURES:
        return None
    classifier = features.load(FEATURES)

    @torch.no_grad()
    def of(videos: list[Tensor]) -> Tensor:
        return torch.cat([classifier(part) for video in videos for part in video.split(BATCH)])

    drawn = [shapes.render(scene) for scene in metrics.truth_futures(clips, 2 * len(made))]
    world, again = of(drawn[: len(made)]), of(drawn[len(made) :])
    return features.frechet_distance(of(made), world), features.frechet_distance(again, world)


def _diversity(
    pipe: Any, card: student.Card, setting: Setting, config: EvaluateConfig, precision: torch.dtype,
    say: Callable[[str], None],
) -> np.ndarray:  # fmt: skip
    """Entropy of the model's choices over that of the world's, for each of some open (image, caption) pairs."""
    if not config.diversity_pairs:
        return np.empty(0)
    split = shapes.SPLITS[config.split]
    candidates = split[: 8 * config.diversity_pairs + 64]
    captions, _ = shapes.sample(0, candidates)
    opened = [index for index, caption in zip(candidates, captions, strict=True) if not caption.closed]
    indices = opened[: config.diversity_pairs]
    pairs = shapes.clips(0, indices)
    made, drawn = [], []
    for sample_number in range(config.diversity_samples):
        seeds = [noise_seed(1000 + sample_number, index) for index in indices]
        prompts = [str(caption) for caption in pairs.captions]
        videos = make(pipe, card, setting, pairs.video_BCTHW[:, :, 0], prompts, seeds, precision)
        made.append(metrics.choices(fitting.fit(videos, pairs.scene)))
        _, scene = shapes.sample(0, indices, future=1 + sample_number)
        drawn.append(metrics.choices_of(pairs.captions, scene))
    by_pair = (list(map(list, zip(*samples, strict=True))) for samples in (made, drawn))
    ratios = metrics.diversity(*by_pair).numpy()
    say(f"{setting}: diversity {np.nanmean(ratios):.3f} over {len(indices)} pairs")
    return ratios


# --- intervals ------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % interval of ``[seeds, clips]`` values by bootstrap over clips and seeds; NaN where nothing applies.

    Of a difference of two settings' values (same clips, same noise) this is the paired interval.
    """
    chance = np.random.default_rng(0)
    num_seeds, num_clips = values.shape
    if not np.isfinite(values).any():
        return float("nan"), float("nan"), float("nan")
    means = []
    for _ in range(resamples):
        seeds = chance.integers(num_seeds, size=num_seeds)
        clips = chance.integers(num_clips, size=num_clips)
        picked = values[np.ix_(seeds, clips)]
        if np.isfinite(picked).any():
            means.append(np.nanmean(picked))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.nanmean(values)), float(low), float(high)


def _part(values: np.ndarray, closed: np.ndarray, part: str) -> np.ndarray:
    return values if part == "all" else values[:, closed if part == "closed" else ~closed]


# --- what is written ------------------------------------------------------------------------------------------------


def _as_json(
    card: student.Card, config: EvaluateConfig, closed: np.ndarray, vae_psnr_db_T: np.ndarray, results: list[Result]
) -> dict[str, Any]:
    def numbers(array: np.ndarray) -> Any:
        return json.loads(json.dumps(np.round(array, 5).tolist()).replace("NaN", "null"))

    return {
        "model": {"name": card.name, "sha256": card.sha256},
        "config": config.model_dump(mode="json"),
        "closed": closed.tolist(),
        "autoencoder_psnr_db": numbers(vae_psnr_db_T),
        "settings": [
            {
                "num_inference_steps": r.setting.num_inference_steps,
                "guidance_scale": r.setting.guidance_scale,
                "seconds_per_clip": round(r.seconds_per_clip, 4),
                "summary": {
                    part: {name: numbers(np.array(interval(_part(r.values[name], closed, part)))) for name in ROWS}
                    for part in PARTS
                },
                "diversity": numbers(np.array(interval(r.diversity[None]))) if r.diversity.size else None,
                "values": {name: numbers(array) for name, array in r.values.items()},
                "diversity_values": numbers(r.diversity),
                "fvd_shapes": r.fvd_shapes,
            }
            for r in results
        ],
    }


def as_markdown(
    card: student.Card, config: EvaluateConfig, closed: np.ndarray, vae_psnr_db_T: np.ndarray, results: list[Result]
) -> str:
    """The report: the autoencoder by frame, each setting by part, and what the others lose against the first."""
    lines = [
        f"# {card.name}",
        "",
        f"{config.split} split, {closed.size} clips ({int(closed.sum())} closed captions), {config.seeds} seeds of "
        f"noise, {config.precision}; 95 % intervals by bootstrap over clips and seeds. sha256 {card.sha256[:12]}.",
        "",
        f"Autoencoder on whole clips: {vae_psnr_db_T.mean():.1f} dB, worst frame position "
        f"{vae_psnr_db_T.min():.1f} dB; by frame " + " ".join(f"{value:.1f}" for value in vae_psnr_db_T) + ".",
    ]
    for result in results:
        lines += ["", f"## {result.setting}", "", *_head("metric")]
        for name in ROWS:
            cells = [_cell(*interval(_part(result.values[name], closed, part))) for part in PARTS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if result.diversity.size:
            lines.append(f"| diversity | | | {_cell(*interval(result.diversity[None]))} |")
        if result.fvd_shapes:
            distance, floor = result.fvd_shapes
            lines.append(f"| fvd_shapes | {distance:.2f} (two drawn sets: {floor:.2f}) | | |")
        lines += ["", f"{result.seconds_per_clip:.2f} s a clip."]
    if len(results) > 1:
        first = results[0]
        lines += ["", f"## Against {first.setting}", ""]
        lines += ["Paired differences of `score`; level means that the interval holds 0.", "", *_head("setting")]
        for other in results[1:]:
            cells = []
            for part in PARTS:
                lost = _part(first.values["score"] - other.values["score"], closed, part)
                mean, low, high = interval(lost)
                cells.append(f"{-mean:+.3f} ({-high:+.3f} to {-low:+.3f})" + (", level" if low <= 0 <= high else ""))
            lines.append(f"| {other.setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _head(first: str) -> list[str]:
    return [f"| {first} | " + " | ".join(PARTS) + " |", "|---|" + "---|" * len(PARTS)]


def _cell(mean: float, low: float, high: float) -> str:
    if not np.isfinite(mean):
        return ""
    digits = 2 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _bars(results: list[Result], closed: np.ndarray) -> dict[str, dict[str, tuple[float, float, float]]]:
    names = ("score", *metrics.SCORED)
    return {
        f"{result.setting}, {part}": {name: interval(_part(result.values[name], closed, part)) for name in names}
        for result in results
        for part in ("closed", "open")
    }


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)
