"""`VideoPipeline`: an image and a sentence in, frames out. No queue, no HTTP.

Around the stock diffusers pipeline: encode, denoise and decode are separate calls so that each is timed and reported,
and a caller may stop the work between steps by raising from ``on_progress``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by the hub client when it is imported

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from distill import student
from distill.backbones import wan
from worker.contract import ModelCard, Phase, VideoSize

OnProgress = Callable[[Phase, float], None]
"""Called with the phase and the share of all work done, 0 to 1. What it raises ends the call."""


@dataclass(frozen=True)
class Result:
    """One generated clip."""

    frames_THWC: NDArray[np.uint8]
    timings_s: dict[Phase, float]


class VideoPipeline:
    """A model folder, loaded once and called many times."""

    def __init__(self, folder: Path, *, device: str, threads: int) -> None:
        """Check the folder, load it and keep it on ``device``.

        Args:
            folder: a student's or a teacher's folder.
            device: "cpu" or "cuda".
            threads: of torch, for work on the CPU. The same number gives the same bytes.

        Raises:
            distill.student.FolderError: the folder cannot be used.
        """
        torch.set_num_threads(threads)
        for library in (diffusers, transformers):  # their progress bars and advice are not for a server's log
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        self.card = student.read_card(folder)
        self.device = device
        self.threads = threads
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self._pipe.to(device)
        self._pipe.set_progress_bar_config(disable=True)
        # Of the time that each phase takes, for the progress: a guess that each call replaces by what it measured.
        self._shares = {Phase.ENCODING: 0.05, Phase.DENOISING: 0.75, Phase.DECODING: 0.2}

    @property
    def model_card(self) -> ModelCard:
        """What clients may know of this model."""
        return ModelCard(
            name=self.card.name,
            sha256=self.card.sha256,
            task=self.card.task,
            num_inference_steps=self.card.call["num_inference_steps"],
            video=VideoSize(**self.card.video.model_dump()),
            prompt=self.card.prompt,
        )

    @property
    def engine(self) -> str:
        """What runs the transformer, and where."""
        return f"eager-{self.device}"

    def warm_up(self) -> Result:
        """One whole call, so that the first job meets no lazy initialisation."""
        grey = Image.new("RGB", (self.card.video.width, self.card.video.height), (128, 128, 128))
        return self(grey, self.card.prompt.examples[0], seed=0)

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, prompt: str, *, seed: int, on_progress: OnProgress = lambda _phase, _share: None
    ) -> Result:
        """Generate one clip.

        Args:
            image: RGB, of the model's size.
            prompt: in the model's canonical form.
            seed: of the starting noise; same seed, model, machine and thread count give the same frames.
            on_progress: see ``OnProgress``.

        Raises:
            ValueError: the image has another size.
        """
        size = (self.card.video.width, self.card.video.height)
        if image.size != size:
            raise ValueError(f"the image is {image.size[0]} x {image.size[1]}; this model takes {size[0]} x {size[1]}")
        call = dict(self.card.call)
        marks = [time.perf_counter()]
        encode_share, denoise_share = self._shares[Phase.ENCODING], self._shares[Phase.DENOISING]

        # 1. Encode the sentence here; the stock call encodes the image before its first step.
        on_progress(Phase.ENCODING, 0.0)
        guided = call["guidance_scale"] > 1
        embeds, negative_embeds = self._pipe.encode_prompt(
            prompt, None, guided, max_sequence_length=call["max_sequence_length"], device=self._pipe.device
        )

        # 2. Denoise. The transformer's first call marks the end of the encoding.
        def first_call(_module: Any, _args: Any, _kwargs: Any) -> None:
            if len(marks) == 1:
                marks.append(self._clock())
                on_progress(Phase.DENOISING, encode_share)

        def step_end(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if self.device == "cuda":
                torch.cuda.synchronize()  # or the loop runs ahead of the GPU and the progress is not true
            done = (step + 1) / call["num_inference_steps"]
            on_progress(Phase.DENOISING, encode_share + denoise_share * done)
            return values

        hook = self._pipe.transformer.register_forward_pre_hook(first_call, with_kwargs=True)
        try:
            latents_BCTHW = self._pipe(
                image=image,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative_embeds,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                callback_on_step_end=step_end,
                return_dict=False,
                **call,
            )[0]
        finally:
            hook.remove()
        marks.append(self._clock())

        # 3. Decode.
        on_progress(Phase.DECODING, encode_share + denoise_share)
        video_BCTHW = wan.decode_latents(self._pipe.vae, latents_BCTHW)
        video_BTHWC = self._pipe.video_processor.postprocess_video(video_BCTHW, output_type="np")
        frames_THWC = (video_BTHWC[0] * 255).round().astype(np.uint8)
        marks.append(self._clock())
        phases = (Phase.ENCODING, Phase.DENOISING, Phase.DECODING)
        seconds = (after - before for before, after in pairwise(marks))
        timings_s = dict(zip(phases, seconds, strict=True))
        self._shares = {phase: taken / (marks[-1] - marks[0]) for phase, taken in timings_s.items()}
        return Result(frames_THWC, timings_s)

    def _clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
