"""The transformers of HunyuanVideo: joint attention of video and text, in dual-stream and then single-stream blocks.

`HunyuanVideoTransformer3DModel` has both kinds; `HunyuanVideo15Transformer3DModel` has dual-stream blocks alone. Here
they are one list, the dual-stream blocks first. Text tokens belong to no frame.

Shape suffixes: B clip, N video token, L text token, J token of both (video first), H head, D width of the residual
stream or of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from distill.backbones import experts
from distill.config import ConfigError

one_expert = experts.one
_LISTS = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
"""The lists of blocks in order, by what the configuration calls their length."""


def network(pipe: Any) -> Any:
    """Of a pipeline, its transformer."""
    return pipe.transformer


def networks(transformer: Any) -> dict[str, Any]:
    """By the pipeline's component that it is."""
    return {"transformer": transformer}


def width(transformer: Any) -> int:
    """Of the residual stream."""
    width: int = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return width


# --- depth ------------------------------------------------------------------------------------------------------------


def blocks(transformer: Any) -> nn.ModuleList:
    """The residual blocks in order: what can be skipped, and what a budget of parameters counts."""
    return nn.ModuleList(itertools.chain(*_lists(transformer).values()))


def groups(transformer: Any) -> list[range]:
    """All blocks: those of either kind are ranked together."""
    return [range(len(blocks(transformer)))]


def _lists(transformer: Any) -> dict[str, nn.ModuleList]:
    return {name: getattr(transformer, name) for name in _LISTS.values() if hasattr(transformer, name)}


@contextmanager
def skipping(transformer: Any, skipped: Collection[int]) -> Iterator[None]:
    """Within it, calls of ``transformer`` bypass the blocks ``skipped``: both streams pass unchanged.

    F(.; M) of the paper. The weights are the same objects, so gradients reach the blocks that are run.
    """
    numbers = itertools.count()
    kept = {name: [b for b in of if next(numbers) not in skipped] for name, of in _lists(transformer).items()}
    with _of_blocks(transformer, kept):
        yield


@contextmanager
def tokens_after(transformer: Any, places: Collection[int]) -> Iterator[list[Tensor]]:
    """Within it, each call adds the video's residual streams after these of the blocks that it runs, ``[B, N, D]``
    each, to the list; -1 is the last one."""
    seen: list[Tensor] = []
    depth = len(blocks(transformer))
    wanted, numbers = {place % depth for place in places}, itertools.count()
    # Beside the blocks and no hook on them: a compiled block would be compiled anew.
    tapped = {
        name: [part for block in of for part in ((block, _Tap(seen)) if next(numbers) in wanted else (block,))]
        for name, of in _lists(transformer).items()
    }
    with _of_blocks(transformer, tapped):
        yield seen


class _Tap(nn.Module):
    """Stands where a block does, passes the streams on and notes the video's."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, video_BND: Tensor, text_BLD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self._seen.append(video_BND)
        return video_BND, text_BLD


@contextmanager
def _of_blocks(transformer: Any, parts: Mapping[str, Iterable[nn.Module]]) -> Iterator[None]:
    """Within it, ``transformer`` runs these in place of its lists of blocks."""
    whole = _lists(transformer)
    for name, of in parts.items():
        setattr(transformer, name, nn.ModuleList(of))
    try:
        yield
    finally:
        for name, of in whole.items():
            setattr(transformer, name, of)


def split_sequence(transformer: Any, mesh: Any, shape: tuple[int, ...]) -> None:
    """There is no plan for it in diffusers."""
    raise ConfigError(
        f"context_parallel={mesh.size()}: diffusers does not split the tokens of {type(transformer).__name__}; "
        "set context_parallel=1"
    )


def without_blocks(transformer: Any, pruned: Collection[int]) -> Any:
    """A new transformer, a copy of this one's weights with the blocks ``pruned`` gone and the rest numbered anew."""
    numbers = itertools.count()
    kept = {
        name: [i for i in range(len(of)) if next(numbers) not in pruned] for name, of in _lists(transformer).items()
    }
    # Names with an underscore say where the weights were read from.
    settings = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    counts = {setting: len(kept[name]) for setting, name in _LISTS.items() if name in kept}
    smaller = type(transformer).from_config({**settings, **counts})
    smaller.load_state_dict(_renumbered(transformer.state_dict(), kept))
    return smaller.to(transformer.device)


def _renumbered(weights: Mapping[str, Tensor], kept: Mapping[str, list[int]]) -> dict[str, Tensor]:
    after: dict[str, Tensor] = {}
    for name, weight in weights.items():
        head, *tail = name.split(".")
        if head not in kept:
            after[name] = weight
        elif (number := int(tail[0])) in kept[head]:
            after[".".join([head, str(kept[head].index(number)), *tail[1:]])] = weight
    return after


# --- attention --------------------------------------------------------------------------------------------------------


@contextmanager
def attention_between_frames(
    transformer: Any, num_frames: int, queries: int, generator: torch.Generator
) -> Iterator[dict[int, list[float]]]:
    """Within it, each call adds to each block's list the share of the video's attention that crosses frames.

    The mean over heads and ``queries`` random video rows a clip of ``sum_{j: frame(j) != frame(i)} A_ij``, j a video
    token; what goes to the text crosses none.
    """
    shares: dict[int, list[float]] = {i: [] for i in range(len(blocks(transformer)))}
    with _processors(
        transformer, {i: _MeasuringAttnProcessor(num_frames, queries, generator, shares[i]) for i in shares}
    ):
        yield shares


@contextmanager
def within_frames(transformer: Any, limited: Collection[int], num_frames: int) -> Iterator[None]:
    """Within it, in the blocks ``limited`` a video token sees its own frame and the text; the text sees all."""
    with _processors(transformer, {i: _WithinFrameAttnProcessor(num_frames) for i in limited}):
        yield


@contextmanager
def without_self_attention(transformer: Any, left_out: Collection[int]) -> Iterator[None]:
    """Within it, attention of these blocks is not computed and adds nothing. It is all the attention they have: video
    and text are in one."""
    with _processors(transformer, {i: _NoAttnProcessor() for i in left_out}):
        yield


@torch.no_grad()
def silence_self_attention(transformer: Any, silenced: Collection[int]) -> None:
    """Attention of these blocks adds nothing from now on: the weights that it leaves through are 0."""
    every: Any = blocks(transformer)
    for i in silenced:
        if _is_single(every[i]):
            last = every[i].proj_out  # of attention and of what stands beside it
            last.weight[:, : last.out_features].zero_()
        else:
            for last in (every[i].attn.to_out[0], every[i].attn.to_add_out):
                last.weight.zero_()
                last.bias.zero_()


def self_attention_share(transformer: Any) -> float:
    """Of the blocks' parameters those of their attention. It is another one in either kind: this is of all of them."""
    every: Any = blocks(transformer)
    own = sum(p.numel() for block in every for p in block.attn.parameters())
    own += sum(block.proj_out.out_features**2 for block in every if _is_single(block))
    return own / sum(p.numel() for p in every.parameters())


def _is_single(block: Any) -> bool:
    """Attention and feed-forward beside each other, which leave through one layer."""
    return hasattr(block, "proj_out")


@contextmanager
def _processors(transformer: Any, by_block: Mapping[int, JointAttnProcessor]) -> Iterator[None]:
    """Within it, attention of these blocks is computed by other processors."""
    every: Any = blocks(transformer)
    before = {i: every[i].attn.processor for i in by_block}
    for i, processor in by_block.items():
        every[i].attn.set_processor(processor)
    try:
        yield
    finally:
        for i, processor in before.items():
            every[i].attn.set_processor(processor)


class JointAttnProcessor(HunyuanVideoAttnProcessor2_0):
    """The stock attention of either generation, in parts.

    Padding is masked as what is attended to alone. The stock processor of 1.5 masks the padding's own rows as well:
    that changes nothing but them, and leaves them without anything to attend to, which not every engine takes.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        query, key, value = _projected(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        count = hidden_states.shape[1]
        if attention_mask.ndim == 2:  # 1.5: of the text alone
            attention_mask = F.pad(attention_mask.bool(), (count, 0), value=True)[:, None, None]
        heads_BJHD = self.attend(query, key, value, attention_mask, count)
        joined_BJD = heads_BJHD.flatten(2, 3).type_as(query)
        video_BND, text_BLD = joined_BJD[:, :count], joined_BJD[:, count:]
        if attn.add_q_proj is None:  # a single stream: the block has the layer that it leaves through
            return video_BND, text_BLD
        return attn.to_out[1](attn.to_out[0](video_BND)), attn.to_add_out(text_BLD)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask_B11J: Tensor, count: int) -> Tensor:  # noqa: ARG002
        """``[B, J, H, D]`` from queries, keys and values of ``count`` video tokens and the text."""
        return _attention(query, key, value, mask_B11J)


def _projected(
    attn: Any, video_BND: Tensor, text_BLD: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, J, H, D]`` as the stock processors have them."""

    def heads(x: Tensor, norm: Any = None) -> Tensor:
        x_BJHD = x.unflatten(2, (attn.heads, -1))
        return x_BJHD if norm is None else norm(x_BJHD)

    if attn.add_q_proj is None:
        both = torch.cat([video_BND, text_BLD], dim=1)
        query, key = heads(attn.to_q(both), attn.norm_q), heads(attn.to_k(both), attn.norm_k)
        value = heads(attn.to_v(both))
    else:
        of_query = heads(attn.to_q(video_BND), attn.norm_q), heads(attn.add_q_proj(text_BLD), attn.norm_added_q)
        of_key = heads(attn.to_k(video_BND), attn.norm_k), heads(attn.add_k_proj(text_BLD), attn.norm_added_k)
        query, key = torch.cat(of_query, dim=1), torch.cat(of_key, dim=1)
        value = torch.cat([heads(attn.to_v(video_BND)), heads(attn.add_v_proj(text_BLD))], dim=1)
    count = video_BND.shape[1]

    def rotated(x_BJHD: Tensor) -> Tensor:
        video = apply_rotary_emb(x_BJHD[:, :count], rotary_emb, sequence_dim=1)
        return torch.cat([video, x_BJHD[:, count:]], dim=1)

    return rotated(query), rotated(key), value


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    heads = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return heads.transpose(1, 2)


class _MeasuringAttnProcessor(JointAttnProcessor):
    """It notes how much of the video's attention goes to other frames."""

    def __init__(self, num_frames: int, queries: int, generator: torch.Generator, shares: list[float]) -> None:
        super().__init__()
        self._num_frames, self._queries, self._generator, self._shares = num_frames, queries, generator, shares

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask_B11J: Tensor, count: int) -> Tensor:
        frame_N = torch.arange(count) // (count // self._num_frames)
        row_Q = torch.randint(count, (self._queries,), generator=self._generator)
        scores_BHQJ = torch.einsum("bqhd,bjhd->bhqj", query[:, row_Q].float(), key.float()) / query.shape[-1] ** 0.5
        attention_BHQJ = scores_BHQJ.masked_fill(~mask_B11J, -torch.inf).softmax(-1)
        elsewhere_QN = (frame_N[row_Q, None] != frame_N).to(attention_BHQJ)
        self._shares.append((attention_BHQJ[..., :count] * elsewhere_QN).sum(-1).mean().item())
        return super().attend(query, key, value, mask_B11J, count)


class _WithinFrameAttnProcessor(JointAttnProcessor):
    """Each frame of the video is a clip of its own, with all of the text."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self._num_frames = num_frames

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask_B11J: Tensor, count: int) -> Tensor:
        def by_frame(x_BNHD: Tensor) -> Tensor:
            return x_BNHD.unflatten(1, (self._num_frames, -1)).flatten(0, 1)

        def with_text(x_BJHD: Tensor) -> Tensor:
            text = x_BJHD[:, count:].repeat_interleave(self._num_frames, 0)
            return torch.cat([by_frame(x_BJHD[:, :count]), text], dim=1)

        mask = mask_B11J[..., count - count // self._num_frames :].repeat_interleave(self._num_frames, 0)
        frames = _attention(by_frame(query[:, :count]), with_text(key), with_text(value), mask)
        video = frames.unflatten(0, (-1, self._num_frames)).flatten(1, 2)
        return torch.cat([video, _attention(query[:, count:], key, value, mask_B11J)], dim=1)


class _NoAttnProcessor(JointAttnProcessor):
    """None at all."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,  # noqa: ARG002 (as of every processor)
        attention_mask: Tensor, image_rotary_emb: tuple[Tensor, Tensor],  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return torch.zeros_like(hidden_states), torch.zeros_like(encoder_hidden_states)


# --- engines ----------------------------------------------------------------------------------------------------------


@contextmanager
def computing_by(transformer: Any, forward: Callable[..., tuple[Tensor]]) -> Iterator[None]:
    """Within it, ``transformer`` computes the same by this function, and its attention by `JointAttnProcessor`.

    A graph has nothing that depends on the values of its inputs, and onnxruntime neither a choice between booleans nor
    attention of rows that have nothing to attend to.
    """
    refiner = transformer.context_embedder.token_refiner
    transformer.forward, refiner.forward = MethodType(forward, transformer), MethodType(_refine, refiner)
    try:
        with _processors(transformer, {i: JointAttnProcessor() for i in range(len(blocks(transformer)))}):
            yield
    finally:
        del transformer.forward, refiner.forward


def _refine(self: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor) -> Tensor:
    """The text's own blocks, padding masked as what is attended to alone."""
    mask_B1LL = _of_rows(attention_mask.bool())
    for block in self.refiner_blocks:
        hidden_states = block(hidden_states, temb, mask_B1LL)
    return hidden_states


def _of_rows(mask_BJ: Tensor) -> Tensor:
    """What is attended to, for each row: onnxruntime takes no row for all of them."""
    return mask_BJ[:, None, None].expand(-1, -1, mask_BJ.shape[1], -1)


def run(
    transformer: Any, input_BCTHW: Tensor, temb: Tensor, text_BLD: Tensor, mask_BL: Tensor, *given: Any
) -> tuple[Tensor]:
    """From the embedded text to the output: the stock forward's second half.

    Args:
        transformer: of either generation.
        input_BCTHW: what is embedded in patches.
        temb: embedding of the noise level.
        text_BLD: text, of whatever kinds.
        mask_BL: what of it is attended to.
        given: what the blocks are told of the given frame.
    """
    video_BND, rotary_emb = transformer.x_embedder(input_BCTHW), transformer.rope(input_BCTHW)
    mask_B1JJ = _of_rows(torch.cat([mask_BL.new_ones(video_BND.shape[:2]), mask_BL], dim=1))
    for block in itertools.chain(*_lists(transformer).values()):
        video_BND, text_BLD = block(video_BND, text_BLD, temb, mask_B1JJ, rotary_emb, *given)
    # Nothing reads the text after the last block. Where that has two streams its weights would not be in the graph, and
    # could not be replaced there by name.
    video_BND = video_BND + 0 * text_BLD[:, :1]
    patches_BND = transformer.proj_out(transformer.norm_out(video_BND, temb))
    patch = transformer.config.patch_size_t, transformer.config.patch_size, transformer.config.patch_size
    sizes = [size // of for size, of in zip(input_BCTHW.shape[2:], patch, strict=True)]
    parts = patches_BND.unflatten(1, sizes).unflatten(4, (-1, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return (parts.flatten(6, 7).flatten(4, 5).flatten(2, 3),)
