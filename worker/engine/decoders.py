"""From latents to video: which way through the autoencoder, by what it costs here.

A decoder is called with normalised latents ``[1, C, T, H, W]`` and gives the video in [-1, 1] in pieces
``[1, 3, frames, height, width]``, so that frames can be saved while others are still decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class Decoder(Protocol):
    """See the module."""

    name: str

    def __call__(self, latents_BCTHW: Tensor) -> Iterator[Tensor]: ...


class PieceDecoder:
    """The stock way: a latent frame at a time, in the memory of one piece."""

    name = "pieces"

    def __init__(self, backbone: Any, vae: Any) -> None:
        self._backbone = backbone
        # The same weights; but what a decoding keeps on the module must not meet the next clip's encoding.
        self._vae = copy.copy(vae)

    def __call__(self, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        yield from self._backbone.decode_in_pieces(self._vae, latents_BCTHW)


class TiledDecoder:
    """diffusers' overlapping tiles, for frames whose pieces do not fit: slower, and seams are blended."""

    name = "tiles"

    def __init__(self, backbone: Any, vae: Any) -> None:
        self._backbone = backbone
        self._vae = copy.copy(vae)  # as above
        self._vae.enable_tiling()

    def __call__(self, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        yield self._backbone.decode_latents(self._vae, latents_BCTHW)


class WholeDecoder:
    """All frames in one pass, by PyTorch or by an engine."""

    def __init__(self, run: Any, name: str) -> None:
        """
        Args:
            run: called with ``latents``; gives the video, or a tuple of it.
            name: for the manifest.
        """
        self._run = run
        self.name = name

    def __call__(self, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        video = self._run(latents=latents_BCTHW)
        yield video[0] if isinstance(video, tuple) else video
