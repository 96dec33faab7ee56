"""`python -m distill gate NEW --against ACTIVE --teacher T`: may a new student replace the active one?

Every model gets the same fixed images, prompts and noise. Two forms of judgement, each with its limits
(`distill.config.GateConfig`):

    ground truth   the world `shapes` is fitted to both students' clips, the differences are paired (`distill.metrics`)
    reference      the new student's clips beside the teacher's, for any model (`distill.reference`)

One limit refused is the student refused. Written to the output folder: `gate.json` last, before it `gate.md`,
`gate.png` and `sheet.png`. `catch_table` shows what the gate makes of the failures that image-to-video distillation is
known for.

Shape suffixes: B clip, C channel, T frame, H row, W column.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from distill import evaluate, metrics, reference, report, schedule, student
from distill.backbones import base as backbones
from distill.config import ConfigError, GateConfig, GroundTruthLimits, ReferenceLimits
from distill.data import shapes
from distill.reference import Looks
from distill.student import Card, FolderError

GATE_SET = "shapes-1"
"""Name of the fixed clips of `shapes`: another choice of clips, prompts or seeds gets another name."""

FIRST_INDEX = 15_000
"""Of the dev split, where the fixed clips begin: far behind those on which a distillation chooses what to keep."""

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
SEEN_SIZE = 128
"""Shorter side, pixels, that larger videos are made smaller to: twice what a latent of 480 rows can tell apart."""

RESAMPLES = 1000
SHOWN = 8
PLOTTED = 4
"""Margins that the plot reaches to."""

ROLES = ("teacher", "active", "new")

WORDS = {
    "score": ("the clips are worse on the whole", ""),
    "prompt_following": ("the prompt is not followed", ""),
    "motion_amount": ("the amount of motion is not what is asked for", ""),
    "subject_consistency": ("the subject changes", ""),
    "background_consistency": ("the background changes", ""),
    "imaging_quality": ("the pictures are blurred, noisy or off in colour", ""),
    "trajectory_error_px": ("", "the subject does not go where it should"),
    "motion": ("the videos stand still", "the motion is exaggerated"),
    "flicker": ("the colours do not change as they should", "the videos flash"),
    "sharpness": ("the pictures are blurred or flat", "the pictures are noisy or over-sharpened"),
    "detail": ("edges are washed out", "what should be edges is noise"),
    "warp_error": ("the videos stand still", "things change that do not move"),
    "saturation": ("the colours are washed out", "the colours are over-saturated"),
    "first_frame_ssim": ("the videos do not begin with the given image", ""),
    "colour_drift": ("", "the colours leave those of the given image"),
    "dead_frames": ("", "frames are black, of one colour, or no numbers"),
    "other_motion": ("", "things move another way than in the teacher's"),
    "broken_clips": ("", "single clips are nothing like the teacher's"),
}
"""What it means to be below a limit, and above it."""

Say = Callable[[str], None]
Values = dict[str, Tensor]
"""A metric's value of every clip, ``[B]``; NaN where it does not apply."""


@dataclass(frozen=True)
class Check:
    """One limit and what was found."""

    form: str
    name: str
    value: float
    """Mean difference, or geometric mean of the ratios."""
    interval: tuple[float, float]
    """95 %, by paired bootstrap over clips."""
    allowed: tuple[float, float]
    """Infinite where there is no limit."""
    in_margins: tuple[float, float, float]
    """Value and interval, where 1 is what is allowed at most and -1 at least."""
    ok: bool
    means: str
    """What is wrong, in words; empty where nothing is."""


@dataclass(frozen=True)
class Verdict:
    """All limits of both forms."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return all(check.ok for check in self.checks)

    @property
    def refusals(self) -> list[str]:
        """What is wrong, a line for each limit that is not kept."""
        return [f"{check.form}, {check.name}: {check.means}" for check in self.checks if not check.ok]


@dataclass(frozen=True)
class Made:
    """What a model made of the fixed clips."""

    card: Card
    video_BCTHW: Tensor
    seconds: float
    reconstruct: Callable[[Tensor], Tensor] | None
    """Encodes and decodes videos by the model's own autoencoder; None where nothing is measured by it."""


def gate(new: Path, active: Path, teacher: Path, out: Path, config: GateConfig, say: Say) -> Verdict:
    """Judge ``new`` and write the report into ``out``.

    Args:
        new: the folder of the student that wants to be served.
        active: the folder of the model that is served now.
        teacher: the folder of the teacher that ``new`` was made from.
        out: made if need be; an earlier report in it is replaced.
        config: clips and limits.
        say: takes lines of progress.

    Raises:
        FolderError: a folder is no model folder, was changed, or has another schedule than its card says.
        ConfigError: the models do not make the same kind of video, or the fixed clips do not fit them.
    """
    trial = Trial(new, active, teacher, config, say)
    verdict = trial.judge(trial.made["new"])
    out.mkdir(parents=True, exist_ok=True)
    # What stands beside a gate.json belongs to it.
    (out / "gate.json").unlink(missing_ok=True)
    _write_pictures(out, trial, verdict)
    report.write(out / "gate.md", as_markdown(trial, verdict))
    report.write(out / "gate.json", json.dumps(as_json(trial, verdict), indent=2) + "\n")
    return verdict


class Trial:
    """What a new student is held against: the fixed clips as its teacher and the active student make them."""

    def __init__(self, new: Path, active: Path, teacher: Path, config: GateConfig, say: Say) -> None:
        self.config = config
        self.folders = dict(zip(ROLES, (teacher, active, new), strict=True))
        self.cards = {role: student.read_card(folder) for role, folder in self.folders.items()}
        _check_cards(self.cards)
        self.clips = load_clips(config, self.cards["teacher"])
        self._say = say
        self._known: dict[str, Made] = {}
        self.made = {role: self._make(role) for role in ROLES}
        count = self.count("teacher")
        self.teacher_looks = reference.looks(self.made["teacher"].video_BCTHW[:count], self._given(count))
        self.active_values = self.measure(self.made["active"])

    def count(self, role: str) -> int:
        """Clips that a role makes: the teacher, which takes by far the longest, those of the reference form alone."""
        wanted = self.config.reference_clips if role == "teacher" or not self.clips.world else self.config.clips
        return min(wanted, len(self.clips.prompts))

    def _given(self, count: int) -> Tensor | None:
        given_BCHW = self.clips.given_BCHW
        return None if given_BCHW is None else given_BCHW[:count]

    def judge(self, made: Made) -> Verdict:
        """Hold videos of the fixed clips against all limits."""
        limits, far = self.config, self.config.far
        checks: list[Check] = []
        if self.clips.world:
            values = self.active_values if made is self.made["active"] else self.measure(made)
            checks += ground_truth_checks(values, self.active_values, limits.ground_truth, far)
        count = self.count("teacher")
        looks = reference.looks(made.video_BCTHW[:count], self._given(count))
        return Verdict((*checks, *reference_checks(looks, self.teacher_looks, limits.reference, far)))

    def measure(self, made: Made) -> Values:
        """The ground-truth metrics of videos; none where the fixed clips are of no known world."""
        if not self.clips.world or not made.reconstruct:
            return {}
        started = time.monotonic()
        values = measure(made.video_BCTHW[: self.config.clips], self.clips.world, made.reconstruct)
        self._say(f"{made.card.name}: clips measured in {time.monotonic() - started:.0f} s")
        return values

    def _make(self, role: str) -> Made:
        """The clips of a role; a folder that has two of them makes its clips once."""
        card = self.cards[role]
        count = max(self.count(other) for other in ROLES if self.cards[other].sha256 == card.sha256)
        if card.sha256 not in self._known:
            pipe = evaluate.load(self.folders[role])
            _check_schedule(self.folders[role], card, pipe.scheduler)
            started = time.monotonic()
            video_BCTHW = self.clips.make(pipe, card, count)
            seconds = time.monotonic() - started
            # It keeps the pipeline; without a world the next one takes its place in memory.
            reconstruct = evaluate.reconstruction(pipe) if self.clips.world else None
            self._known[card.sha256] = Made(card, video_BCTHW, seconds, reconstruct)
            self._say(f"{role} {card.name}: {count} clips made in {seconds:.0f} s")
        return self._known[card.sha256]


def _check_cards(cards: dict[str, Card]) -> None:
    new, teacher = cards["new"], cards["teacher"]
    for role in ("active", "new"):
        if cards[role].video != teacher.video:
            raise ConfigError(f"the {role} model makes {cards[role].video}, and the teacher {teacher.video}")
        if cards[role].task != teacher.task:
            raise ConfigError(
                f"the {role} model is for the task {cards[role].task}, and the teacher for {teacher.task}"
            )
    if new.teacher and new.teacher.sha256 != teacher.sha256:
        raise ConfigError(
            f"{new.name} was made from {new.teacher.name} {new.teacher.sha256[:12]}, and --teacher is {teacher.name} "
            f"{teacher.sha256[:12]}: name its own teacher"
        )


def _check_schedule(folder: Path, card: Card, scheduler: Any) -> None:
    """A student is trained for its noise levels alone; with others its clips are only a little worse to look at."""
    visited = schedule.visited(backbones.load(card.backbone, card.task), scheduler, card.call["num_inference_steps"])
    if len(visited) != len(card.sigmas) or not np.allclose(visited, card.sigmas, atol=1e-4):
        raise FolderError(
            f"{folder / 'scheduler'} visits the noise levels {visited}, and {card.kind}.json says {card.sigmas}: "
            "it was saved with another schedule than it was made for"
        )


# --- the fixed clips ------------------------------------------------------------------------------------------------


class FixedClips(Protocol):
    """Images, prompts and seeds that every model gets."""

    version: str
    prompts: list[str]

    @property
    def given_BCHW(self) -> Tensor | None:
        """The images; None where there are prompts alone."""

    @property
    def world(self) -> shapes.Clips | None:
        """The drawn clips, where there is a ground truth."""

    def make(self, pipe: Any, card: Card, count: int) -> Tensor:
        """Videos ``[B, C, T, H, W]`` in [-1, 1] of the first ``count``, by the card's own call."""


def load_clips(config: GateConfig, card: Card) -> FixedClips:
    """The clips that ``config`` names. Raises ``ConfigError`` where they do not fit the model or are not there."""
    if config.clips_from == GATE_SET:
        return ShapesClips(config, card)
    return FolderClips(config, card)


class ShapesClips:
    """`shapes-1`: clips of the dev split, closed and open captions in turn, so that the first of them are half closed.

    Raises:
        ConfigError: the model does not read these captions, or makes other videos.
    """

    version = GATE_SET

    def __init__(self, config: GateConfig, card: Card) -> None:
        if not evaluate.is_of_world(card):
            raise ConfigError(
                f"{card.name} is no model of the world shapes, whose clips are {GATE_SET}; "
                "set gate.clips_from to a folder of images with a .txt each that holds the prompt"
            )
        self.world = shapes.clips(0, fixed_indices(config.clips))
        self.prompts = [str(caption) for caption in self.world.captions]
        self.given_BCHW = self.world.video_BCTHW[:, :, 0]
        assert self.world.source is not None
        self._seeds = [evaluate.noise_seed(config.seed, index) for index in self.world.source[1]]

    def make(self, pipe: Any, card: Card, count: int) -> Tensor:
        """By our batched sampler, which gives what the stock pipeline gives."""
        setting = evaluate.Setting(card.call["num_inference_steps"], card.call["guidance_scale"])
        first = slice(count)
        return evaluate.make(
            pipe, card, setting, self.given_BCHW[first], self.prompts[first], self._seeds[first], torch.float32
        )


def fixed_indices(count: int) -> list[int]:
    """Closed, open, closed, open ... by index in the dev split. Raises ``ConfigError`` where it has not so many."""
    everything = range(FIRST_INDEX, min(FIRST_INDEX + 4 * count + 64, shapes.SPLITS["dev"].stop))
    captions, _ = shapes.sample(0, everything)
    closed = [index for index, caption in zip(everything, captions, strict=True) if caption.closed]
    opened = [index for index, caption in zip(everything, captions, strict=True) if not caption.closed]
    in_turn = [index for pair in zip(closed, opened, strict=False) for index in pair]
    if len(in_turn) < count:
        raise ConfigError(f"gate.clips={count}: {GATE_SET} holds {len(in_turn)} clips; ask for fewer")
    return in_turn[:count]


class FolderClips:
    """Images of a folder by name, each with a `.txt` of the same name that holds its prompt; of a model that is given
    no image the prompts alone.

    Raises:
        ConfigError: no such folder, fewer than two of them, or an image without a prompt.
    """

    world = None

    def __init__(self, config: GateConfig, card: Card) -> None:
        folder = Path(config.clips_from)
        kinds, what = ((".txt",), "prompts (.txt)") if card.task == "t2v" else (IMAGES, "images")
        paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in kinds)[: config.reference_clips]
        if len(paths) < 2:
            raise ConfigError(f"gate.clips_from={folder}: wanted two {what} or more, or {GATE_SET}; got {len(paths)}")
        for path in paths:
            if not path.with_suffix(".txt").is_file():
                raise ConfigError(f"{path} has no prompt: write it to {path.with_suffix('.txt').name} beside it")
        self.prompts = [path.with_suffix(".txt").read_text().strip() for path in paths]
        self._images: list[Image.Image | None] = [None] * len(paths)
        self.given_BCHW: Tensor | None = None
        if card.task != "t2v":
            size = (card.video.width, card.video.height)
            images = [_read(path).resize(size, Image.Resampling.LANCZOS) for path in paths]
            pixels_BHWC = torch.stack([torch.from_numpy(np.array(image)) for image in images])
            still_BCTHW = pixels_BHWC.permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1
            self.given_BCHW = reference.shrink(still_BCTHW, SEEN_SIZE)[:, :, 0]
            self._images = [*images]
        self._seeds = [evaluate.noise_seed(config.seed, i) for i in range(len(paths))]
        read = [p for path in paths for p in dict.fromkeys((path, path.with_suffix(".txt")))]
        mixed = hashlib.sha256(b"".join(p.read_bytes() for p in read))
        self.version = f"{folder.name} {mixed.hexdigest()[:12]}"

    def make(self, pipe: Any, card: Card, count: int) -> Tensor:
        """One after another by the stock pipeline, whatever it is."""
        pipe.set_progress_bar_config(disable=True)
        call = backbones.load(card.backbone, card.task).arguments(card.call)
        videos = []
        for image, prompt, seed in zip(self._images[:count], self.prompts, self._seeds, strict=False):
            of_image = {} if image is None else {"image": image}
            chance = torch.Generator().manual_seed(seed)
            made = pipe(prompt=prompt, generator=chance, output_type="pt", **of_image, **call)
            videos.append(reference.shrink(made.frames.float().cpu().transpose(1, 2) * 2 - 1, SEEN_SIZE))
        return torch.cat(videos)


def _read(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError:
        raise ConfigError(f"{path} is no image that can be read; put another in its place") from None


# --- the limits -----------------------------------------------------------------------------------------------------


def measure(video_BCTHW: Tensor, world: shapes.Clips, reconstruct: Callable[[Tensor], Tensor]) -> Values:
    """The ground-truth metrics that have a limit; those of a video that holds a NaN are the worst that there are."""
    sound_B = video_BCTHW.flatten(1).isfinite().all(1)
    found = metrics.measure(video_BCTHW.nan_to_num(), world, reconstruct).values
    worst = {name: 0.0 for name in GroundTruthLimits.model_fields} | {"trajectory_error_px": float(shapes.SIZE)}
    # Where a metric does not apply (NaN), it does not apply to such a video either.
    return {name: torch.where(sound_B | found[name].isnan(), found[name], value) for name, value in worst.items()}


def ground_truth_checks(new: Values, active: Values, limits: GroundTruthLimits, far: float) -> list[Check]:
    """Hold the paired differences of two students' metrics against the limits."""
    checks = []
    for name, margin in limits:
        allowed = (-math.inf, margin) if name == "trajectory_error_px" else (-margin, math.inf)
        checks.append(hold("ground truth", name, new[name] - active[name], allowed, far))
    return checks


def reference_checks(new: Looks, teacher: Looks, limits: ReferenceLimits, far: float) -> list[Check]:
    """Hold two models' `reference.looks` against the limits."""
    beside = reference.beside(new, teacher)
    checks = []
    for name, limit in limits:
        if isinstance(limit, tuple):
            checks.append(hold("reference", name, beside[name], limit, far, ratio=True))
        else:
            allowed = (-limit, math.inf) if name == "first_frame_ssim" else (-math.inf, limit)
            checks.append(hold("reference", name, beside[name], allowed, far))
    return checks


def hold(
    form: str, name: str, values_B: Tensor, allowed: tuple[float, float], far: float, ratio: bool = False
) -> Check:
    """One limit. Ratios come as logarithms; their limits and what is found are said as ratios."""
    found = evaluate.interval(values_B.double().numpy()[None], RESAMPLES)
    low, high = (math.log(end) for end in allowed) if ratio else allowed
    value, lower, upper = found
    too_low = upper < low or value < far * low
    too_high = lower > high or value > far * high
    # What could be measured on no clip at all (NaN) is not known to be good.
    unknown = not math.isfinite(value)
    below, above = WORDS[name]
    told = [math.exp(number) if ratio else number for number in found]
    return Check(
        form=form,
        name=name,
        value=told[0],
        interval=(told[1], told[2]),
        allowed=allowed,
        in_margins=(_share(value, low, high), _share(lower, low, high), _share(upper, low, high)),
        ok=not (too_low or too_high or unknown),
        means="could not be measured" if unknown else below if too_low else above if too_high else "",
    )


def _share(number: float, low: float, high: float) -> float:
    """``number`` in units of the limit on its side of 0, or of the only one that there is."""
    end = low if (number < 0 and low > -math.inf) or high == math.inf else high
    return number / abs(end)


# --- the known failures ---------------------------------------------------------------------------------------------
# Each keeps the first frame, which is given, and spoils the rest of videos [B, C, T, H, W] in [-1, 1].


def corrupt_static(video_BCTHW: Tensor) -> Tensor:
    """Nothing moves."""
    return video_BCTHW[:, :, :1].repeat(1, 1, video_BCTHW.shape[2], 1, 1)


def corrupt_flashing(video_BCTHW: Tensor) -> Tensor:
    """Every other frame is brighter by a fifth of the range."""
    spoiled = video_BCTHW.clone()
    spoiled[:, :, 1::2] += 0.4
    return spoiled.clamp(-1, 1)


def corrupt_flat(video_BCTHW: Tensor) -> Tensor:
    """The picture fades to its mean colour within the first quarter."""
    colour = video_BCTHW.mean(dim=(2, 3, 4), keepdim=True)
    faded_T11 = (4 * torch.linspace(0, 1, video_BCTHW.shape[2])).clamp(max=1)[:, None, None]
    return video_BCTHW.lerp(colour.expand_as(video_BCTHW), faded_T11)


def corrupt_black(video_BCTHW: Tensor) -> Tensor:
    """All frames after the first are black."""
    spoiled = torch.full_like(video_BCTHW, -1.0)
    spoiled[:, :, 0] = video_BCTHW[:, :, 0]
    return spoiled


def corrupt_exaggerated(video_BCTHW: Tensor) -> Tensor:
    """Twice as fast: to the end by every other frame, and back."""
    last = video_BCTHW.shape[2] - 1
    there_and_back_T = last - (last - 2 * torch.arange(last + 1)).abs()
    return video_BCTHW[:, :, there_and_back_T.clamp(min=0)]


def corrupt_saturated(video_BCTHW: Tensor) -> Tensor:
    """Colours are 1.8 times as far from grey."""
    grey = video_BCTHW.mean(dim=1, keepdim=True)
    spoiled = (grey + 1.8 * (video_BCTHW - grey)).clamp(-1, 1)
    spoiled[:, :, 0] = video_BCTHW[:, :, 0]
    return spoiled


FAILURES: dict[str, Callable[[Tensor], Tensor]] = {
    "static": corrupt_static,
    "flashing": corrupt_flashing,
    "flat colour": corrupt_flat,
    "black after frame 1": corrupt_black,
    "exaggerated motion": corrupt_exaggerated,
    "over-saturation": corrupt_saturated,
}
"""What image-to-video distillation is known to end in."""


def failures(trial: Trial) -> dict[str, Verdict]:
    """The verdict on the new student as it is (``"none"``) and on its clips spoiled in each known way."""
    made = trial.made["new"]
    spoiled = {name: replace(made, video_BCTHW=spoil(made.video_BCTHW)) for name, spoil in FAILURES.items()}
    return {name: trial.judge(case) for name, case in {"none": made, **spoiled}.items()}


def all_caught(verdicts: dict[str, Verdict]) -> bool:
    """Whether each form that was asked refuses every failure, and none refuses what has none."""
    return all(passed == (name == "none") for name, verdict in verdicts.items() for passed in by_form(verdict).values())


def catch_table(verdicts: dict[str, Verdict]) -> str:
    """Markdown: for each failure what each form says, the limits that are furthest exceeded first."""
    forms = list(by_form(verdicts["none"]))
    lines = ["| failure | " + " | ".join(forms) + " |", "|---|" + "---|" * len(forms)]
    for name, verdict in verdicts.items():
        lines.append(f"| {name} | " + " | ".join(_caught_by(verdict, form) for form in forms) + " |")
    return "\n".join(lines) + "\n"


def by_form(verdict: Verdict) -> dict[str, bool]:
    """Whether each form that was asked lets the student through."""
    present = dict.fromkeys(check.form for check in verdict.checks)
    return {form: all(check.ok for check in verdict.checks if check.form == form) for form in present}


def _caught_by(verdict: Verdict, form: str) -> str:
    refused = [check for check in verdict.checks if check.form == form and not check.ok]
    if not refused:
        return "passed"
    refused.sort(key=lambda check: -abs(check.in_margins[0]))
    return "refused: " + ", ".join(f"{check.name} {check.value:.2f}" for check in refused[:3])


# --- what is written ------------------------------------------------------------------------------------------------


def as_markdown(trial: Trial, verdict: Verdict) -> str:
    """The report: the verdict, why, every limit, the pictures."""
    cards, counts = trial.cards, {role: trial.count(role) for role in ROLES}
    lines = [
        f"# {cards['new'].name}: {'passed' if verdict.passed else 'refused'}",
        "",
        *(f"- {refusal}" for refusal in verdict.refusals),
        *([""] if verdict.refusals else []),
        f"Clips {trial.clips.version}: {counts['new']} of each student, {counts['teacher']} of the teacher, noise seed "
        f"{trial.config.seed}, the same for all. 95 % intervals by paired bootstrap over clips. A limit refuses when "
        f"the whole interval is beyond it, or the value {trial.config.far:g} times as far off as is allowed.",
        "",
        "| | model | sha256 | s for all clips |",
        "|---|---|---|---:|",
        *(f"| {role} | {cards[role].name} | {cards[role].sha256[:12]} | {trial.made[role].seconds:.0f} |"
          for role in ROLES),
    ]  # fmt: skip
    compared = {"ground truth": "new minus active", "reference": "new beside the teacher"}
    for form in dict.fromkeys(check.form for check in verdict.checks):
        lines += ["", f"## {form.capitalize()}: {compared[form]}", "", "| | found | allowed | |", "|---|---|---|---|"]
        lines += [_row(check) for check in verdict.checks if check.form == form]
    lines += [
        "",
        "![limits](gate.png)",
        "",
        "The given image, and beside it by row the teacher, the active model, the new:",
    ]
    lines += ["", "![sheet](sheet.png)"]
    return "\n".join(lines) + "\n"


def _row(check: Check) -> str:
    low, high = check.allowed
    lower, upper = check.interval
    allowed = (
        f"at most {high:g}" if low == -math.inf else f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
    )
    found = f"{check.value:.3f} ({lower:.3f} to {upper:.3f})"
    return f"| {check.name} | {found} | {allowed} | {'ok' if check.ok else f'**refused**: {check.means}'} |"


def as_json(trial: Trial, verdict: Verdict) -> dict[str, Any]:
    """The report for programs; a limit that is not there, or a number that is none, is null."""
    models = {role: {"name": card.name, "sha256": card.sha256} for role, card in trial.cards.items()}
    return {
        "format": 1,
        "created_at": student.now(),
        "passed": verdict.passed,
        "refusals": verdict.refusals,
        **models,
        "clips": {"version": trial.clips.version, **{role: trial.count(role) for role in ROLES}},
        "config": trial.config.model_dump(mode="json"),
        "config_sha256": trial.config.sha256,
        "checks": [_finite(asdict(check)) for check in verdict.checks],
        "seconds": {role: round(made.seconds, 1) for role, made in trial.made.items()},
        "code": student.code_version(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_finite(part) for part in value]
    return value if not isinstance(value, float) else round(value, 5) if math.isfinite(value) else None


def _write_pictures(out: Path, trial: Trial, verdict: Verdict) -> None:
    shown = slice(min(SHOWN, trial.count("teacher")))
    given_BCHW = None if trial.clips.given_BCHW is None else trial.clips.given_BCHW[shown]
    videos = [trial.made[role].video_BCTHW[shown].nan_to_num() for role in ROLES]
    report.contact_sheet(out / "sheet.png", videos, inputs_BCHW=given_BCHW)
    plot(out / "gate.png", verdict, title=f"{trial.cards['new'].name}: {'passed' if verdict.passed else 'refused'}")


def plot(path: Path, verdict: Verdict, title: str) -> None:
    """Every limit as a line: what was found and its interval, in units of what is allowed. PNG, aside and renamed."""
    figure = Figure(figsize=(7, 0.8 + 0.28 * len(verdict.checks)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="0.92")
    axes.axvline(0, color="0.7", linewidth=0.8)
    for row, check in enumerate(verdict.checks):
        value, lower, upper = (min(max(number, -PLOTTED), PLOTTED) for number in check.in_margins)
        colour = "tab:green" if check.ok else "tab:red"
        axes.plot([lower, upper], [row, row], color=colour, linewidth=2)
        axes.plot([value], [row], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(verdict.checks)), [f"{check.name} ({check.form})" for check in verdict.checks])
    axes.invert_yaxis()
    axes.set_xlim(-1.05 * PLOTTED, 1.05 * PLOTTED)
    axes.set_xlabel("grey: what is allowed; further out is drawn at the edge")
    axes.set_title(title)
    report.save(figure, path)
