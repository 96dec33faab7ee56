"""What the stages ask of a network: one convention, and a module for each backbone that keeps it.

Velocity (noise - x_0) out, noise level sigma in [0, 1] in, latents ``B C T H W``, the first latent frame given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from distill.backbones import wan
from distill.config import ConfigError


class Backbone(Protocol):
    """A module of this package."""

    EXPORT_AXES: Mapping[str, tuple[int, ...]]
    """Of the transformer's inputs by name, the axes that may differ from call to call."""

    def blocks(self, transformer: Any) -> nn.ModuleList:
        """The residual blocks in order."""

    def skipping(self, transformer: Any, skipped: Collection[int]) -> AbstractContextManager[None]:
        """Within it, calls of ``transformer`` bypass these blocks."""

    def without_blocks(self, transformer: Any, pruned: Collection[int]) -> Any:
        """A new transformer with these blocks gone for good."""

    def tokens_after(self, transformer: Any, places: Collection[int]) -> AbstractContextManager[list[Tensor]]:
        """Within it, each call adds its residual streams after these of the blocks that it runs, ``[B, N, D]`` each, to
        the list; -1 is the last one."""

    def width(self, transformer: Any) -> int:
        """D of the residual stream."""

    def encode_text(self, tokenizer: Any, text_encoder: Any, prompts: list[str], max_sequence_length: int) -> Tensor:
        """``text_BLD`` of sentences."""

    def predict_velocity(
        self, transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, first_BC1HW: Tensor, text_BLD: Tensor
    ) -> Tensor:
        """Velocity of every latent frame; what stands at the first one has no meaning."""

    def decode_latents(self, vae: Any, latents_BCTHW: Tensor) -> Tensor:
        """Video in [-1, 1] from normalised latents."""

    def decode_in_pieces(self, vae: Any, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        """The same video, each piece as soon as it is decoded."""

    def decode_bytes(self, vae: Any, num_frames: int, height: int, width: int) -> int:
        """About what it takes to decode so many frames at a time."""

    def WholeDecoder(self, vae: Any) -> nn.Module:
        """The same video in one pass: called with ``latents``, gives a tuple of it."""

    def exporting(self, transformer: Any) -> AbstractContextManager[None]:
        """Within it, ``transformer`` computes the same by operators that an engine's compiler can fuse."""

    def attention_between_frames(
        self, transformer: Any, num_frames: int, queries: int, generator: Any
    ) -> AbstractContextManager[dict[int, list[float]]]:
        """Within it, each call adds to each block's list the share of self-attention that crosses frames."""

    def within_frames(
        self, transformer: Any, limited: Collection[int], num_frames: int
    ) -> AbstractContextManager[None]:
        """Within it, self-attention of these blocks sees no other frame."""

    def without_self_attention(self, transformer: Any, left_out: Collection[int]) -> AbstractContextManager[None]:
        """Within it, self-attention of these blocks is not computed and adds nothing."""

    def silence_self_attention(self, transformer: Any, silenced: Collection[int]) -> None:
        """Self-attention of these blocks adds nothing from now on."""

    def self_attention_share(self, transformer: Any) -> float:
        """Of a block's parameters those of its self-attention."""

    def with_parts(self, pipe: Any, transformer: Any, scheduler: Any) -> Any:
        """The stock pipeline of ``pipe``'s other parts with these two."""


BACKBONES: dict[str, Backbone] = {"wan": wan}


def load(name: str, task: str) -> Backbone:
    """The backbone that a model's card names. Raises ``ConfigError`` where its stages are not here."""
    if name not in BACKBONES or task != "ti2v":
        known = ", ".join(BACKBONES)
        raise ConfigError(
            f"the teacher is of backbone {name}, task {task}; what can be distilled is {known}, task ti2v"
        )
    return BACKBONES[name]
