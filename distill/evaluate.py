"""`python -m distill evaluate FOLDER`: what a model folder is worth, on clips that it has never seen.

Every setting asked for (number of steps, guidance) gets the same images, captions and noise, so two settings, or two
folders, can be compared clip by clip. Written to the output folder: `report.json` (every value of every clip),
`report.md`, `metrics.png` and `sheet.png`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill import features, fitting, losses, metrics, report, sampler, schedule, student
from distill.backbones import base as backbones
from distill.backbones import wan
from distill.backbones.wan_autoencoder import in_one_pass
from distill.config import ConfigError, EvaluateConfig
from distill.data import shapes
from distill.loop import can_compile, training_device

BATCH = 32
FEATURES = Path(__file__).resolve().parent.parent / "models" / "shapes-features" / "model.safetensors"
PARTS = ("all", "closed", "open")
ROWS = ("score", *metrics.SCORED, *metrics.REPORTED)
Interval = tuple[float, float, float]
"""Mean and the ends of its 95 % interval."""
Say = Callable[[str], None]


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
    closed: np.ndarray
    """Which of the clips have closed captions."""
    values: dict[str, np.ndarray]
    diversity: np.ndarray
    """``[pairs]``; empty where it was not asked for."""
    seconds_per_clip: float
    fvd_shapes: tuple[float, float] | None
    """Frechet distance of the clips' features to those of drawn clips, and the same between two sets of drawn ones."""

    @property
    def mean_score(self) -> float:
        """``score`` over all clips and seeds."""
        return float(np.nanmean(self.values["score"]))

    @cached_property
    def summary(self) -> dict[str, dict[str, Interval]]:
        """Every metric over all clips and over either kind of caption."""
        return {
            part: {name: interval(part_of(self.values[name], self.closed, part)) for name in ROWS} for part in PARTS
        }


def evaluate(folder: Path, out: Path, config: EvaluateConfig, say: Say) -> list[Result]:
    """Sample, measure, and write the report of ``folder`` into ``out``.

    Raises:
        FolderError: the folder is no model folder, or was changed.
        ConfigError: more clips asked for than the split has.
    """
    card = student.read_card(folder)
    check_world(card)
    pipe = load(folder)
    # 1.7 times as fast on two cores; in full precision the numbers stay those of the stock pipeline.
    if config.precision == "bfloat16" and can_compile():
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    yardstick = Yardstick(config, pipe)
    truth_BCTHW = yardstick.clips.video_BCTHW
    vae_psnr_db_T = losses.psnr_db(yardstick.reconstruct(truth_BCTHW), truth_BCTHW).mean(0).numpy()
    results, shown = [], []
    for setting in settings_of(card, config):
        result, made_BCTHW = _evaluate_setting(pipe, card, yardstick, setting, say)
        results.append(result)
        shown.append(made_BCTHW)
    out.mkdir(parents=True, exist_ok=True)
    report.write(out / "report.json", json.dumps(_as_json(card, config, vae_psnr_db_T, results)) + "\n")
    report.write(out / "report.md", as_markdown(card, config, vae_psnr_db_T, results))
    report.bars(out / "metrics.png", _bars(results), title=f"{card.name}, {config.split} split")
    # Half of the sheet closed, half open: draw_clips puts the closed ones first.
    count = len(truth_BCTHW)
    half = min(6, count // 2)
    rows = torch.tensor([*range(half), *range(count - half, count)])
    truth_BCTHW = truth_BCTHW[rows]
    for number, (result, made_BCTHW) in enumerate(zip(results, shown, strict=True)):
        steps, scale = result.setting.num_inference_steps, result.setting.guidance_scale
        made_BCTHW = made_BCTHW[rows]
        columns = [truth_BCTHW, made_BCTHW, (made_BCTHW - truth_BCTHW) / 2]
        name = "sheet.png" if number == 0 else f"sheet-{steps}-{scale:g}.png"
        report.contact_sheet(out / name, columns, inputs_BCHW=truth_BCTHW[:, :, 0])
        if number == 0:
            given_BCTHW = truth_BCTHW[:, :, :1].expand_as(truth_BCTHW)
            report.animation(out / "comparison.webp", [given_BCTHW, truth_BCTHW, made_BCTHW], shapes.FPS)
    return results


class Yardstick:
    """What every setting is asked to make and measured against: drawn once."""

    def __init__(self, config: EvaluateConfig, pipe: Any) -> None:
        self.config = config
        self.clips, self.closed = draw_clips(config.split, config.clips)
        self.reconstruct = reconstruction(pipe)
        self.pairs: shapes.Clips | None = None
        if config.diversity_pairs:
            _, indices = by_kind(config.split, config.diversity_pairs)
            self.pairs = shapes.clips(0, indices)
            futures = metrics.truth_futures(self.pairs, config.diversity_samples)
            self.drawn_choices = by_pair([metrics.choices_of(self.pairs.captions, scene) for scene in futures])
        # A covariance of so many features wants more clips than features.
        self.classifier: features.ClipClassifier | None = None
        if FEATURES.exists() and config.seeds * config.clips > features.FEATURES:
            self.classifier = features.load(FEATURES)
            futures = metrics.truth_futures(self.clips, 2 * config.seeds)
            self.world_NF = self.features_of(shapes.render(scene) for scene in futures[: config.seeds])
            self.world_again_NF = self.features_of(shapes.render(scene) for scene in futures[config.seeds :])

    @torch.no_grad()
    def features_of(self, videos: Iterable[Tensor]) -> Tensor:
        """``[N, features]`` of all clips of all videos."""
        assert self.classifier is not None
        return torch.cat([self.classifier(part) for video in videos for part in video.split(BATCH)])

    def fvd_shapes(self, made: Sequence[Tensor]) -> tuple[float, float] | None:
        """Distance of a model's clips to drawn ones with the same first frames and captions, and of two drawn sets.

        None where the classifier is not at hand, or there are too few clips for its features.
        """
        if self.classifier is None:
            return None
        distance = features.frechet_distance(self.features_of(made), self.world_NF)
        return distance, features.frechet_distance(self.world_again_NF, self.world_NF)


def by_pair(samples: Sequence[list[tuple[str, ...]]]) -> list[list[tuple[str, ...]]]:
    """From one list for each sample to one list for each (image, caption) pair."""
    return [list(pair) for pair in zip(*samples, strict=True)]


def load(folder: Path) -> Any:
    """The stock pipeline of a folder, in full precision, on the accelerator if there is one."""
    pipe = student.load_pipeline(folder, training_device())
    in_one_pass(pipe.vae)
    return pipe


def settings_of(card: student.Card, config: EvaluateConfig) -> list[Setting]:
    """Every combination asked for; the card's own values where nothing is."""
    steps = config.num_inference_steps or (card.call["num_inference_steps"],)
    scales = config.guidance_scale or (card.call["guidance_scale"],)
    return [Setting(*pair) for pair in product(steps, scales)]


def by_kind(split: str, count: int) -> tuple[list[int], list[int]]:
    """The first indices of a split with closed and with open captions, ``count`` of each.

    Raises:
        ConfigError: the split has not that many.
    """
    # Half of the captions are closed: so many hold enough of both kinds, but for the end of a split.
    everything = shapes.SPLITS[split][: 4 * count + 64]
    captions, _ = shapes.sample(0, everything)
    closed = [index for index, caption in zip(everything, captions, strict=True) if caption.closed]
    opened = [index for index, caption in zip(everything, captions, strict=True) if not caption.closed]
    if min(len(closed), len(opened)) < count:
        raise ConfigError(f"the {split} split does not hold {count} closed and as many open captions; ask for fewer")
    return closed[:count], opened[:count]


def is_of_world(card: student.Card) -> bool:
    """Whether a model makes clips of the drawn world, at its size."""
    size = (card.video.num_frames, card.video.height, card.video.width)
    return card.prompt.grammar == shapes.GRAMMAR and size == (shapes.NUM_FRAMES, shapes.SIZE, shapes.SIZE)


def check_world(card: student.Card) -> None:
    """Only videos of the drawn world can be measured. Raises ``ConfigError``."""
    if not is_of_world(card):
        raise ConfigError(
            f"{card.name} is no model of the world shapes, which alone is measured by fitting it; "
            "`python -m distill gate` compares a student with its teacher, `vbench` any videos"
        )


def draw_clips(split: str, count: int) -> tuple[shapes.Clips, np.ndarray]:
    """``count`` clips of a split, first closed captions, then as many open ones; and which are closed."""
    closed, opened = by_kind(split, count - count // 2)
    clips = shapes.clips(0, closed[: count // 2] + opened)
    return clips, np.array([caption.closed for caption in clips.captions])


def make(
    pipe: Any, card: student.Card, setting: Setting, first_BCHW: Tensor, prompts: Sequence[str], seeds: Sequence[int],
    precision: torch.dtype,
) -> Tensor:  # fmt: skip
    """Videos by our batched sampler, ``BATCH`` at a time."""
    backbone = backbones.load(card.backbone, card.task)
    call = backbone.calling(card.call, setting.num_inference_steps, setting.guidance_scale)
    parts = []
    for i in range(0, len(prompts), BATCH):
        part = slice(i, i + BATCH)
        noise_BCTHW = sampler.draw_noise(backbone, pipe, seeds[part], call)
        parts.append(
            sampler.sample(backbone, pipe, first_BCHW[part], prompts[part], call, noise_BCTHW, precision).cpu()
        )
    return torch.cat(parts)


def noise_seed(seed: int, index: int) -> int:
    """The generator seed of a clip's noise: the same for every model and setting."""
    return seed * 1_000_003 + index


def reconstruction(pipe: Any) -> Callable[[Tensor], Tensor]:
    """Encodes and decodes videos: what the model's autoencoder can show at best."""

    @torch.no_grad()
    def reconstruct(video_BCTHW: Tensor) -> Tensor:
        parts = video_BCTHW.to(pipe.vae.device).split(BATCH)
        return torch.cat([wan.decode_latents(pipe.vae, wan.encode_video(pipe.vae, part)).cpu() for part in parts])

    return reconstruct


def _evaluate_setting(
    pipe: Any, card: student.Card, yardstick: Yardstick, setting: Setting, say: Say
) -> tuple[Result, Tensor]:
    """The numbers of one setting, and the clips of its first seed."""
    config, clips = yardstick.config, yardstick.clips
    assert clips.source is not None
    prompts = [str(caption) for caption in clips.captions]
    rows: list[dict[str, Tensor]] = []
    all_made: list[Tensor] = []
    seconds = 0.0
    for seed in range(config.seeds):
        started = time.monotonic()
        seeds = [noise_seed(seed, index) for index in clips.source[1]]
        made = make(pipe, card, setting, clips.video_BCTHW[:, :, 0], prompts, seeds, precision_of(config.precision))
        took = time.monotonic() - started
        seconds += took
        rows.append(metrics.measure(made, clips, yardstick.reconstruct).values)
        say(
            f"{setting}: seed {seed}: {len(prompts)} clips, {took:.0f} s to make them, "
            f"{time.monotonic() - started - took:.0f} s to measure them: score {rows[-1]['score'].mean():.3f}"
        )
        all_made.append(made)
    values = {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]}
    result = Result(
        setting=setting,
        closed=yardstick.closed,
        values=values,
        diversity=_diversity(pipe, card, yardstick, setting, say),
        seconds_per_clip=seconds / (config.seeds * len(prompts)),
        fvd_shapes=yardstick.fvd_shapes(all_made),
    )
    return result, all_made[0]


def precision_of(name: str) -> torch.dtype:
    """Of the transformer's matrix products, as configurations say it."""
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _diversity(pipe: Any, card: student.Card, yardstick: Yardstick, setting: Setting, say: Say) -> np.ndarray:
    """Entropy of the model's choices over that of the world's, for each of some open (image, caption) pairs."""
    if yardstick.pairs is None:
        return np.empty(0)
    made = [
        made_choices(pipe, card, setting, yardstick.pairs, number, precision_of(yardstick.config.precision))
        for number in range(yardstick.config.diversity_samples)
    ]
    ratios = metrics.diversity(by_pair(made), yardstick.drawn_choices).numpy()
    say(f"{setting}: diversity {np.nanmean(ratios):.3f} over {len(ratios)} pairs")
    return ratios


def made_choices(
    pipe: Any, card: student.Card, setting: Setting, pairs: shapes.Clips, number: int, precision: torch.dtype
) -> list[tuple[str, ...]]:
    """What the model chose of all that these open captions leave open, in its sample of that number."""
    assert pairs.source is not None
    seeds = [noise_seed(1000 + number, index) for index in pairs.source[1]]
    prompts = [str(caption) for caption in pairs.captions]
    videos = make(pipe, card, setting, pairs.video_BCTHW[:, :, 0], prompts, seeds, precision)
    return metrics.choices(fitting.fit(videos, pairs.scene))


# --- intervals ------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray, resamples: int = 2000) -> Interval:
    """Mean and 95 % interval of ``[seeds, clips]`` values by bootstrap over clips and seeds; NaN where nothing applies.

    Of a difference of two settings' values (same clips, same noise) this is the paired interval. There may be more
    kinds of seeds than one, each an axis of its own before the clips'.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return float("nan"), float("nan"), float("nan")
    seeds, clips = _draws(values.shape, resamples)

    def totals(array: np.ndarray) -> np.ndarray:
        return ((seeds @ array.reshape(-1, array.shape[-1])) * clips).sum(1)

    sums, counts = totals(np.where(finite, values, 0.0)), totals(finite.astype(float))
    low, high = np.percentile(sums[counts > 0] / counts[counts > 0], [2.5, 97.5])
    return float(np.nanmean(values)), float(low), float(high)


@lru_cache(maxsize=16)
def _draws(shape: tuple[int, ...], resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each (combination of) seeds, and each clip, is in each resample: always the same draws."""
    chance = np.random.default_rng(0)
    drawn = [np.empty((resamples, count)) for count in shape]
    for resample in range(resamples):
        for often in drawn:
            count = often.shape[1]
            often[resample] = np.bincount(chance.integers(count, size=count), minlength=count)
    *kinds, clips = drawn
    seeds = kinds[0]
    for more in kinds[1:]:
        seeds = (seeds[:, :, None] * more[:, None]).reshape(resamples, -1)
    return seeds, clips


def part_of(values: np.ndarray, closed: np.ndarray, part: str) -> np.ndarray:
    """Of ``[seeds, clips]`` the clips with closed captions, or open ones, or all."""
    return values if part == "all" else values[:, closed if part == "closed" else ~closed]


# --- what is written ------------------------------------------------------------------------------------------------


def _as_json(
    card: student.Card, config: EvaluateConfig, vae_psnr_db_T: np.ndarray, results: list[Result]
) -> dict[str, Any]:
    def numbers(array: np.ndarray) -> Any:
        return json.loads(json.dumps(np.round(array, 5).tolist()).replace("NaN", "null"))

    return {
        "model": {"name": card.name, "sha256": card.sha256},
        "config": config.model_dump(mode="json"),
        "closed": results[0].closed.tolist(),
        "autoencoder_psnr_db": numbers(vae_psnr_db_T),
        "settings": [
            {
                "num_inference_steps": r.setting.num_inference_steps,
                "guidance_scale": r.setting.guidance_scale,
                "seconds_per_clip": round(r.seconds_per_clip, 4),
                "summary": {
                    part: {name: numbers(np.array(given)) for name, given in rows.items()}
                    for part, rows in r.summary.items()
                },
                "diversity": numbers(np.array(interval(r.diversity[None]))) if r.diversity.size else None,
                "values": {name: numbers(array) for name, array in r.values.items()},
                "diversity_values": numbers(r.diversity),
                "fvd_shapes": r.fvd_shapes,
            }
            for r in results
        ],
    }


def as_markdown(card: student.Card, config: EvaluateConfig, vae_psnr_db_T: np.ndarray, results: list[Result]) -> str:
    """The report: the autoencoder by frame, each setting by part, and what the others lose against the first."""
    closed = results[0].closed
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
            cells = [_cell(*result.summary[part][name]) for part in PARTS]
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
                lost = part_of(first.values["score"] - other.values["score"], closed, part)
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


def _bars(results: list[Result]) -> dict[str, dict[str, Interval]]:
    return {
        f"{result.setting}, {part}": {name: result.summary[part][name] for name in ("score", *metrics.SCORED)}
        for result in results
        for part in ("closed", "open")
    }


def store_best(folder: Path, results: list[Result]) -> Setting:
    """Write the setting with the best ``score`` into a folder's card; the choice is for the dev split to make."""
    best = max(results, key=lambda result: result.mean_score).setting
    card = student.read_card(folder)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    call = {**card.call, "num_inference_steps": best.num_inference_steps, "guidance_scale": best.guidance_scale}
    sigmas = schedule.visited(backbones.load(card.backbone, card.task), scheduler, best.num_inference_steps)
    student.write_card(folder, card.model_copy(update={"call": call, "sigmas": sigmas}))
    return best
