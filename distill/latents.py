"""Latents of drawn clips, encoded once and read in an order that depends on the seed and the step alone."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.backbones import wan, wan_autoencoder
from distill.data import prepared, shapes
from distill.loop import Run, compiled

CHUNK = 16


@torch.no_grad()
def encode(run: Run, vae: Any, indices: Sequence[int], compile: bool) -> Tensor:
    """Latents ``[N, C, T, H, W]`` of clips of the world as the autoencoder gives them, not normalised."""

    @torch.no_grad()
    def encode_chunk(video_BCTHW: Tensor) -> Tensor:
        # Three times as fast as full precision, at an error of 1e-5 of the latents' variance.
        with torch.autocast(video_BCTHW.device.type, torch.bfloat16):
            return wan_autoencoder.encode(vae, video_BCTHW)[0].float()

    run_encode = compiled(run, encode_chunk) if compile else encode_chunk
    started, rows = time.monotonic(), []
    for first in range(0, len(indices), CHUNK):
        run.check_stop()
        _, scene = shapes.sample(run.seed, indices[first : first + CHUNK])
        rows.append(run_encode(shapes.render(scene.to(vae.device))).cpu())
        if first // CHUNK % 100 == 0:
            done = min(first + CHUNK, len(indices))
            rate = done / (time.monotonic() - started)
            left_min = (len(indices) - done) / rate / 60
            run.event("latents", done, steps=len(indices), clips_per_s=rate)
            run.say(f"latents {first}/{len(indices)}  {rate:.1f} clips/s  {left_min:.1f} min left")
    return torch.cat(rows)


@dataclass(frozen=True)
class Latents:
    """Normalised latents of clips with their captions."""

    x0_NCTHW: Tensor
    """fp16, on the CPU."""
    captions: list[str]

    @classmethod
    def of_split(cls, run: Run, vae: Any, split: str, count: int, compile: bool) -> Latents:
        """Of the first ``count`` clips of a split, normalised as ``vae`` says; kept in the run's folder."""
        path = run.folder / f"latents-{split}.safetensors"
        indices = shapes.SPLITS[split][:count]
        captions = [str(caption) for caption in shapes.sample(run.seed, indices)[0]]
        if not path.exists():
            x0_NCTHW = wan.normalise(vae, encode(run, vae, indices, compile))
            store(path, x0_NCTHW)
        return cls(load_file(path)["latents"], captions)

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, rows_B: Tensor) -> prepared.Clips:
        """The clips of these rows. Their captions are encoded when they are used: they cost little."""
        return prepared.Clips([self.captions[row] for row in rows_B.tolist()], self.x0_NCTHW[rows_B], {}, {}, {})

    def rows(self, run: Run, batch_number: int, batch: int) -> Tensor:
        """Which clips the batch of that number holds: every clip once an epoch, in an order drawn for each epoch."""
        return prepared.rows_of(run, len(self), batch_number, batch)


def store(path: Path, latents_NCTHW: Tensor, **beside: Tensor) -> None:
    """Write latents (as fp16) and what belongs to them, aside and renamed."""
    aside = path.with_suffix(".tmp")
    # The convolutions leave the memory in an order of their own.
    save_file({"latents": latents_NCTHW.contiguous().half(), **beside}, aside)
    os.replace(aside, path)
