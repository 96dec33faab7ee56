"""What a student makes while it trains, beside the teacher's videos of the same images, captions and noise.

The reference form of the metrics: it needs no world to fit, so it is cheap and works for any model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import report, sampler
from distill.config import LimitsConfig
from distill.loop import Run
from distill.stages.given import Given

CHUNK = 8
SHOWN = 8
"""Clips on a contact sheet."""


class Watch:
    """Draws the first held-out clips with any transformer and compares them with the teacher's."""

    def __init__(self, run: Run, given: Given, scheduler: Any, call: dict[str, Any] | None = None) -> None:
        """``call``: how what is looked at is called, where that is not in the student's steps without guidance."""
        self._run = run
        self._given = given
        self._scheduler = scheduler
        self._call = given.few_steps_call if call is None else call
        clips = given.config.watched
        self._batches = [
            given.batch(given.dev, rows_B)
            for rows_B in torch.arange(min(clips, len(given.dev))).split(min(CHUNK, given.config.looked_at))
        ]
        self._noise = sampler.draw_noise(given.backbone, given.pipe, range(clips), given.card.call)

    @cached_property
    def teachers(self) -> dict[int, Tensor]:
        """The teacher's videos, by its own call; of several processes each makes some, by the number of their batch.

        Making them takes a while: between parts a signal may stop the run.
        """
        return self._make(self._given.pipe, self._given.card.call, between=self._run.check_stop)

    @torch.no_grad()
    def look(self, transformer: Any, sheet: Path) -> dict[str, float]:
        """Ratios of what ``transformer`` makes in the student's steps to the teacher's videos, and a contact sheet."""
        student = self._given.backbone.with_parts(self._given.pipe, transformer, self._scheduler)
        made, world = self._make(student, self._call), self._run.world
        shown = {
            number: [
                report.shown_frames(video) for video in (*self._drawn(number), self.teachers[number], made[number])
            ]
            for number in made
            if number * len(self._batches[0]) < SHOWN
        }
        if found := world.told_first(shown):
            of_batches = [videos for _, videos in sorted((n, v) for of in found for n, v in of.items())]
            report.contact_sheet(sheet, [torch.cat(videos)[:SHOWN] for videos in zip(*of_batches, strict=True)])
        looks = [(len(made[n]), _looks(made[n].clamp(-1, 1)), _looks(self.teachers[n].clamp(-1, 1))) for n in made]
        return _ratios([look for of in world.gathered(looks) for look in of])

    def _drawn(self, number: int) -> list[Tensor]:
        """The clips themselves, of one batch; none where there are captions alone."""
        latents_BCTHW = self._batches[number].latents_BCTHW
        if latents_BCTHW is None:
            return []
        return [self._given.backbone.decode_latents(self._given.pipe.vae, latents_BCTHW).cpu()]

    def _make(self, pipe: Any, call: dict[str, Any], between: Callable[[], None] = lambda: None) -> dict[int, Tensor]:
        precision = torch.bfloat16 if self._given.config.precision == "bfloat16" else torch.float32
        backbone, made = self._given.backbone, {}
        starts = list(accumulate((len(batch) for batch in self._batches), initial=0))
        for number, batch, counts in self._run.world.dealt(self._batches):
            between()
            noise_BCTHW = self._noise[starts[number] : starts[number + 1]]
            given = sampler.Given(batch.image, batch.text, batch.empty)
            x_BCTHW = sampler.denoise(backbone, pipe, given, call, noise_BCTHW, precision)
            if counts:
                with torch.no_grad():
                    made[number] = backbone.decode_latents(pipe.vae, x_BCTHW).cpu()
        return made


def compare(made_BCTHW: Tensor, reference_BCTHW: Tensor) -> dict[str, float]:
    """Motion, contrast, saturation and flicker of one set of videos over those of another; 1 where they are alike."""
    return _ratios([(len(made_BCTHW), _looks(made_BCTHW.clamp(-1, 1)), _looks(reference_BCTHW.clamp(-1, 1)))])


def _ratios(looks: list[tuple[int, dict[str, float], dict[str, float]]]) -> dict[str, float]:
    """Of the means over some sets of clips: how many each has, how they look, how their references do."""
    clips, ratios = sum(count for count, _, _ in looks), {}
    for name in looks[0][1]:
        made = sum(count * look[name] for count, look, _ in looks) / clips
        reference = sum(count * look[name] for count, _, look in looks) / clips
        ratios[name] = made / max(reference, 1e-6)
    return ratios


def _looks(video_BCTHW: Tensor) -> dict[str, float]:
    grey = video_BCTHW.mean(dim=1, keepdim=True)
    return {
        "motion": (video_BCTHW[:, :, 1:] - video_BCTHW[:, :, :1]).abs().mean().item(),
        "contrast": video_BCTHW[:, :, 1:].std(dim=(3, 4)).mean().item(),
        "saturation": (video_BCTHW - grey)[:, :, 1:].abs().mean().item(),
        "flicker": video_BCTHW.diff(n=2, dim=2).abs().mean().item(),
    }


def alarm(values: dict[str, float], limits: LimitsConfig) -> str | None:
    """What is wrong with a student that looks like this, or None."""
    names = {
        "motion": ("the videos stand still", "the motion is exaggerated"),
        "contrast": ("the videos are of a flat colour", "the contrast is exaggerated"),
        "saturation": ("the colours are washed out", "the colours are over-saturated"),
        "flicker": ("the motion has no change of speed", "the videos flicker"),
    }
    wrong = []
    for key, (too_low, too_high) in names.items():
        low, high = getattr(limits, key)
        if not low <= values[key] <= high:
            what = too_low if values[key] < low else too_high
            wrong.append(f"{what} ({key} is {values[key]:.2f} of the teacher's, {low} to {high} is allowed)")
    if (critic := values.get("critic_loss", 0.0)) > limits.critic:
        wrong.append(f"the critic diverges (its loss is {critic:.2f}, {limits.critic} at most)")
    return "; ".join(wrong) or None
