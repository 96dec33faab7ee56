"""What the stages ask of a network: one convention, and a module for each backbone that keeps it.

Velocity (noise - x_0) out, noise level sigma in [0, 1] in, latents ``B C T H W``. What differs between models is here
and nowhere else: their blocks, their conditions, which latent frames are given, how the stock pipeline is called. A
*network* is what is distilled: the pipeline's transformer, or its experts as one module (`distill.backbones.experts`).

Conditions come in two parts. ``image`` goes into every branch (what is made from the given frame; empty for
text-to-video), ``text`` is what the guidance swaps for the one of the negative prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, cast

from torch import Tensor, nn

from distill.backbones import (
    hunyuan15_autoencoder,
    hunyuan15_i2v,
    hunyuan15_t2v,
    hunyuan_autoencoder,
    hunyuan_i2v,
    hunyuan_i2v_concat,
    hunyuan_network,
    hunyuan_t2v,
    usual,
    wan,
    wan_i2v,
    wan_t2v,
)
from distill.backbones.conditions import Conditions, Shapes
from distill.config import ConfigError

Call = dict[str, Any]
"""Keyword arguments of the stock pipeline: a card's ``call``."""


def negative_prompt(call: Call) -> str:
    """What the guidance of a stock call leads away from: the empty prompt, if it says nothing."""
    return call.get("negative_prompt") or ""


class Backbone(Protocol):
    """A module of this package."""

    TASKS: tuple[str, ...]
    """Of `student.Card.task`."""

    GIVEN_FRAMES: int
    """Latent frames at the start that are given clean: no output is meant there, and no loss is taken."""

    TEXT_SEES_IMAGE: bool
    """Whether a prompt is encoded together with the given frame."""

    EXPORT_AXES: Mapping[str, tuple[int, ...]]
    """Of the transformer's inputs by name, the axes that may differ from call to call."""

    def network(self, pipe: Any) -> Any:
        """What is distilled of a pipeline."""

    def blocks(self, transformer: Any) -> nn.ModuleList:
        """The residual blocks in order."""

    def groups(self, transformer: Any) -> list[range]:
        """Blocks that have a budget of their own when some go: one group, or one for each expert."""

    def one_expert(self, transformer: Any, which: str) -> Any:
        """Of two experts the ``high`` or the ``low`` one, for all noise levels.

        Raises:
            ConfigError: there are no two.
        """

    def skipping(self, transformer: Any, skipped: Collection[int]) -> AbstractContextManager[None]:
        """Within it, calls of ``transformer`` bypass these blocks."""

    def without_blocks(self, transformer: Any, pruned: Collection[int]) -> Any:
        """A new transformer with these blocks gone for good."""

    def tokens_after(self, transformer: Any, places: Collection[int]) -> AbstractContextManager[list[Tensor]]:
        """Within it, each call adds its residual streams after these of the blocks that it runs, ``[B, N, D]`` each, to
        the list; -1 is the last one."""

    def width(self, transformer: Any) -> int:
        """D of the residual stream."""

    def split_sequence(self, transformer: Any, mesh: Any, shape: tuple[int, ...]) -> None:
        """Make each process of a mesh (``ring``, ``ulysses``) work on its part of the tokens, in place.

        Args:
            shape: of one clip's latents: C, T, H, W.

        Raises:
            ConfigError: it cannot be split, or not into so many.
        """

    # --- conditions and the call ---

    def encode_text(self, pipe: Any, prompts: list[str], call: Call, first_BCHW: Tensor | None = None) -> Conditions:
        """Text conditions of prompts (of the given frames too, where the text encoder sees them), as the stock pipeline
        makes them."""

    def encode_image(self, pipe: Any, first_BCHW: Tensor | None, call: Call) -> Conditions:
        """Image conditions of given frames in [-1, 1], as the stock pipeline makes them; none for text-to-video."""

    def image_of(self, x0_BCTHW: Tensor, kept: Conditions) -> Conditions:
        """Image conditions of clean latents, from them and from what was kept beside them of ``encode_image``."""

    def to_keep(self, image: Conditions) -> Conditions:
        """What of ``encode_image`` has to be kept beside clean latents: what cannot be had from them."""

    def latent_shape(self, pipe: Any, call: Call) -> tuple[int, int, int, int]:
        """C, T, H, W of what the stock pipeline denoises."""

    def condition_shapes(self, pipe: Any, call: Call) -> tuple[Shapes, Shapes]:
        """Of one clip's image and text conditions, by name, of a pipeline whose networks need no weights."""

    def frames_of(self, call: Call) -> int:
        """Of the video that a stock call gives."""

    def latents_to_decode(self, given_BCTHW: Tensor, stepped_BCTHW: Tensor) -> Tensor:
        """What ``decode_latents`` takes, of what a stock call gives as latents and what its last step gave."""

    def guidance_at(self, transformer: Any, call: Call, sigma: float) -> float:
        """Scale of classifier-free guidance of a stock call at a noise level, standard unit: 1 is none."""

    def calling(self, call: Call, num_inference_steps: int, guidance_scale: float) -> Call:
        """The stock call with another number of steps and scale of classifier-free guidance (1: none)."""

    def arguments(self, call: Call) -> Call:
        """What of a card's call the stock pipeline takes as keywords: some say a part of it elsewhere."""

    def text_inputs(self, text: Conditions, negative: Conditions | None) -> Call:
        """Keyword arguments of the stock pipeline that stand for a prompt, and for the negative one."""

    def set_steps(self, scheduler: Any, num_inference_steps: int) -> None:
        """As the stock pipeline sets its scheduler; what levels one visits differs between pipelines."""

    def starting(self, noise_BCTHW: Tensor, image: Conditions) -> Tensor:
        """What the stock pipeline begins with, of the noise it draws."""

    def predict_velocity(
        self, transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions
    ) -> Tensor:
        """Velocity of every latent frame; what stands at the given ones has no meaning."""

    def with_given(self, x_BCTHW: Tensor, image: Conditions) -> Tensor:
        """The latents with the given frames in their place."""

    # --- the autoencoder ---

    def encode_video(self, vae: Any, video_BCTHW: Tensor) -> Tensor:
        """Normalised latents (posterior mean) of a video in [-1, 1]."""

    def in_one_pass(self, vae: Any) -> Any:
        """The autoencoder taught to take a whole clip at once, where its stock way does not and that is faster."""

    def decode_latents(self, vae: Any, latents_BCTHW: Tensor) -> Tensor:
        """Video in [-1, 1] from normalised latents."""

    def decode_in_pieces(self, vae: Any, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        """The same video, each piece as soon as it is decoded."""

    FRAMES_IN_A_PIECE: int | None
    """Video frames that it decodes at a time; None: all of them."""

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

    # --- folders ---

    def with_parts(self, pipe: Any, transformer: Any, scheduler: Any, call: Call | None = None) -> Any:
        """The stock pipeline of ``pipe``'s other parts with this network and scheduler, and of guidance as ``call``
        says, where that is a part of the pipeline."""

    def networks(self, transformer: Any) -> dict[str, Any]:
        """The network's models by the pipeline's components that they are: ``transformer``, and of two experts the
        other one's too."""


def _varied(*modules: ModuleType) -> Backbone:
    """What the modules hold, a later one in place of an earlier one's."""
    return cast(Backbone, SimpleNamespace(**{name: of for module in modules for name, of in vars(module).items()}))


_HUNYUAN = (usual, hunyuan_network, hunyuan_autoencoder, hunyuan_t2v)
_HUNYUAN15 = (*_HUNYUAN, hunyuan15_autoencoder, hunyuan15_t2v)


BACKBONES: dict[str, Backbone] = {
    "wan": wan,
    "wan-i2v": _varied(wan, usual, wan_i2v),
    "wan-t2v": _varied(wan, usual, wan_t2v),
    "hunyuan-t2v": _varied(*_HUNYUAN),
    "hunyuan-i2v": _varied(*_HUNYUAN, hunyuan_i2v),
    "hunyuan-i2v-concat": _varied(*_HUNYUAN, hunyuan_i2v, hunyuan_i2v_concat),
    "hunyuan15-t2v": _varied(*_HUNYUAN15),
    "hunyuan15-i2v": _varied(*_HUNYUAN15, hunyuan15_i2v),
}
"""By the name in a model's card."""


def load(name: str, task: str) -> Backbone:
    """The backbone that a model's card names. Raises ``ConfigError`` where its stages are not here."""
    if name not in BACKBONES or task not in BACKBONES[name].TASKS:
        known = ", ".join(f"{of} ({', '.join(backbone.TASKS)})" for of, backbone in BACKBONES.items())
        raise ConfigError(f"the model is of backbone {name}, task {task}; what is known is {known}")
    return BACKBONES[name]
