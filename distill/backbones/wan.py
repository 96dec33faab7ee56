"""Wan2.2-TI2V: `WanTransformer3DModel` with the first latent frame given and per-token timesteps.

See `WanImageToVideoPipeline(expand_timesteps=True)` in diffusers for the inference side of the same conventions. The
network, the text and the autoencoder are those of every Wan model: `wan_i2v` and `wan_t2v` hold what differs. Shape
suffixes: B clip, C channel, T latent frame, H row, W column, N token, L text token, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from distill.backbones import experts, wan_autoencoder
from distill.backbones.conditions import Conditions, Shapes
from distill.backbones.usual import NUM_TRAIN_TIMESTEPS
from distill.backbones.usual import TEXT_SEES_IMAGE as TEXT_SEES_IMAGE  # these, too, are a part of this backbone
from distill.backbones.usual import arguments as arguments
from distill.backbones.usual import frames_of as frames_of
from distill.backbones.usual import latents_to_decode as latents_to_decode
from distill.backbones.usual import starting as starting
from distill.config import ConfigError

TASKS: tuple[str, ...] = ("ti2v",)
GIVEN_FRAMES = 1
TEXT_TOKENS = 512
"""Of a context that begins with an image's tokens, where the stock attention cuts it."""


def encode_video(vae: Any, video_BCTHW: Tensor) -> Tensor:
    """Normalised latents (posterior mean) of a video in [-1, 1] with 4 n + 1 frames."""
    return normalise(vae, vae.encode(video_BCTHW.to(vae.dtype)).latent_dist.mean)


def normalise(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Latents as the transformer sees them, from latents as the autoencoder gives them."""
    mean_C, std_C = _statistics(vae, latents_BCTHW)
    return (latents_BCTHW - mean_C) / std_C


def decode_latents(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Video in [-1, 1] from normalised latents."""
    return vae.decode(_raw(vae, latents_BCTHW), return_dict=False)[0]


def decode_in_pieces(vae: Any, latents_BCTHW: Tensor) -> Iterator[Tensor]:
    """The same video, each piece as soon as it is decoded."""
    return wan_autoencoder.decode_in_pieces(vae, _raw(vae, latents_BCTHW))


FRAMES_IN_A_PIECE: int | None = 4
decode_bytes = wan_autoencoder.decode_bytes


class WholeDecoder(nn.Module):
    """The same video in one pass: faster where a clip is small, and one graph for an engine."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        wan_autoencoder.in_one_pass(vae)
        self.config, self.dtype = vae.config, vae.dtype
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder  # not the encoder: it is no part of this

    def forward(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # noqa: ARG002 (as of every model)
        """Video in [-1, 1] from normalised latents ``[B, C, T, H, W]``, in a tuple."""
        return (wan_autoencoder.decode(self, _raw(self, latents)).clamp(-1, 1),)


in_one_pass = wan_autoencoder.in_one_pass


def _raw(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    mean_C, std_C = _statistics(vae, latents_BCTHW)
    return (latents_BCTHW * std_C + mean_C).to(vae.dtype)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(vae.config.latents_mean, dtype=like.dtype, device=like.device)
    std = torch.tensor(vae.config.latents_std, dtype=like.dtype, device=like.device)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def tokenize(tokenizer: Any, prompts: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``[B, L]`` each."""
    tokens = tokenizer(
        prompts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask


def embed_tokens(text_encoder: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """``text_BLD``: embeddings, zero after each prompt's end, as the stock pipeline makes them."""
    text_BLD = text_encoder(ids_BL, mask_BL).last_hidden_state
    return text_BLD * mask_BL[..., None].to(text_BLD.dtype)


def encode_text(pipe: Any, prompts: list[str], call: Mapping[str, Any], first_BCHW: Tensor | None = None) -> Conditions:
    """``text``, the embeddings ``[B, L, D]`` of sentences. The given frames do not matter to it."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # see ``with_parts``

    ids_BL, mask_BL = tokenize(
        pipe.tokenizer, [prompt_clean(prompt) for prompt in prompts], call["max_sequence_length"]
    )
    device = pipe._execution_device  # where weights come to that wait elsewhere
    return {"text": embed_tokens(pipe.text_encoder, ids_BL.to(device), mask_BL.to(device))}


def encode_image(pipe: Any, first_BCHW: Tensor | None, call: Mapping[str, Any]) -> Conditions:
    """``first``, the clean latent ``[B, C, 1, H, W]`` of the given image."""
    assert first_BCHW is not None
    return {"first": encode_video(pipe.vae, first_BCHW[:, :, None].to(pipe.vae.device))}


def image_of(x0_BCTHW: Tensor, kept: Conditions) -> Conditions:
    """The first latent frame is all there is."""
    return {"first": x0_BCTHW[:, :, :1]}


def to_keep(image: Conditions) -> Conditions:
    """Nothing."""
    return {}


def with_given(x_BCTHW: Tensor, image: Conditions) -> Tensor:
    """The latents with the given first one in its place."""
    return torch.cat([image["first"], x_BCTHW[:, :, 1:]], dim=2)


def latent_shape(pipe: Any, call: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """C, T, H, W."""
    return (
        pipe.vae.config.z_dim,
        1 + (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal,
        call["height"] // pipe.vae_scale_factor_spatial,
        call["width"] // pipe.vae_scale_factor_spatial,
    )


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """``first``; ``text``."""
    channels, _, height, width = latent_shape(pipe, call)
    return {"first": (channels, 1, height, width)}, text_shapes(pipe, call)


def text_shapes(pipe: Any, call: Mapping[str, Any]) -> Shapes:
    """``text``."""
    return {"text": (call["max_sequence_length"], pipe.transformer.config.text_dim)}


def guidance_at(transformer: Any, call: Mapping[str, Any], sigma: float) -> float:
    """Scale of classifier-free guidance at a noise level, standard unit: the low-noise expert may have its own."""
    scale: float = call["guidance_scale"]
    if isinstance(transformer, experts.Experts) and not bool(transformer.is_high(torch.tensor(sigma))):
        scale = call.get("guidance_scale_2") or scale
    return scale


def calling(call: Mapping[str, Any], num_inference_steps: int, guidance_scale: float) -> dict[str, Any]:
    """The call with other steps and guidance, of both experts where there are two."""
    rest = {name: value for name, value in call.items() if name != "guidance_scale_2"}
    return {**rest, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}


def text_inputs(text: Conditions, negative: Conditions | None) -> dict[str, Any]:
    """The embeddings."""
    return {
        "prompt_embeds": text["text"],
        "negative_prompt": None,  # or it would be encoded beside its embeddings
        "negative_prompt_embeds": None if negative is None else negative["text"],
    }


def set_steps(scheduler: Any, num_inference_steps: int) -> None:
    """The scheduler says which levels."""
    scheduler.set_timesteps(num_inference_steps)


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Predicted velocity (noise - x_0) of every latent frame; what stands at the first one has no meaning.

    Args:
        transformer: the network, or anything called like it.
        x_BCTHW: noisy latents; their first frame is replaced by the given one.
        sigma_B: noise level of frames 1 and on, in [0, 1]. The first frame's tokens are always told 0.
        image: see ``encode_image``.
        text: see ``encode_text``.
    """
    x_BCTHW = with_given(x_BCTHW, image)
    _, patch_height, patch_width = transformer.config.patch_size
    num_frames, height, width = x_BCTHW.shape[2:]
    tokens_per_frame = (height // patch_height) * (width // patch_width)
    timestep_BN = (sigma_B * NUM_TRAIN_TIMESTEPS)[:, None].repeat(1, num_frames * tokens_per_frame)
    timestep_BN[:, :tokens_per_frame] = 0
    output = transformer(
        hidden_states=x_BCTHW, timestep=timestep_BN, encoder_hidden_states=text["text"], return_dict=False
    )
    return output[0]


def with_parts(pipe: Any, transformer: Any, scheduler: Any, call: Mapping[str, Any] | None = None) -> Any:
    """The stock pipeline of another one's text encoder and autoencoder with this network and scheduler."""
    parts = {**pipe.components, "scheduler": scheduler, "transformer_2": None, **networks(transformer)}
    boundary = transformer.boundary if isinstance(transformer, experts.Experts) else None
    return type(pipe)(**parts, boundary_ratio=boundary, expand_timesteps=pipe.config.expand_timesteps)


# --- engines ---------------------------------------------------------------------------------------------------------

EXPORT_AXES: Mapping[str, tuple[int, ...]] = {
    "hidden_states": (0, 2, 3, 4),
    "timestep": (0, 1),
    "encoder_hidden_states": (0,),
}
"""Of the transformer's inputs, the axes that may differ from call to call: clips, frames, rows, columns, tokens."""


@contextmanager
def exporting(transformer: Any) -> Iterator[None]:
    """Within it, ``transformer`` computes the same by operators that an engine's compiler can fuse."""
    before = transformer.attn_processors
    transformer.set_attn_processor(_ExportAttnProcessor())
    try:
        yield
    finally:
        transformer.set_attn_processor(before)


class _ExportAttnProcessor(WanAttnProcessor):
    """The stock attention, but that rotated pairs are put side by side and not written into an empty tensor: such
    writes become ScatterND, four to a block, which keeps neighbours from being fused. Bit-identical."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        image_BND, text_BND = _contexts(attn, encoder_hidden_states)
        query, key, value = _projected(attn, hidden_states, text_BND, rotary_emb)
        heads = _attended(query, key, value, attention_mask)
        if image_BND is not None:
            image_key = attn.norm_added_k(attn.add_k_proj(image_BND)).unflatten(2, (attn.heads, -1))
            image_value = attn.add_v_proj(image_BND).unflatten(2, (attn.heads, -1))
            heads = heads + _attended(query, image_key, image_value)
        return attn.to_out[1](attn.to_out[0](heads))


def _contexts(attn: Any, context_BND: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of the image and of the text. The stock processor takes the last 512 for the text."""
    if attn.add_k_proj is None or context_BND is None:
        return None, context_BND
    return context_BND[:, :-TEXT_TOKENS], context_BND[:, -TEXT_TOKENS:]


def _attended(query_BNHD: Tensor, key_BNHD: Tensor, value_BNHD: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = F.scaled_dot_product_attention(
        query_BNHD.transpose(1, 2), key_BNHD.transpose(1, 2), value_BNHD.transpose(1, 2), attn_mask=mask
    )
    return heads.transpose(1, 2).flatten(2, 3).type_as(query_BNHD)


def _projected(
    attn: Any, hidden_BND: Tensor, context_BND: Tensor | None, rotary_emb: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, N, H, D]`` as the stock processor has them."""
    context_BND = hidden_BND if context_BND is None else context_BND
    query = attn.norm_q(attn.to_q(hidden_BND)).unflatten(2, (attn.heads, -1))
    key = attn.norm_k(attn.to_k(context_BND)).unflatten(2, (attn.heads, -1))
    value = attn.to_v(context_BND).unflatten(2, (attn.heads, -1))
    if rotary_emb is not None:
        query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
    return query, key, value


def rotated(x_BNHD: Tensor, cos_D: Tensor, sin_D: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, as the stock processor's ``apply_rotary_emb``."""
    left, right = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_D[..., 0::2], sin_D[..., 1::2]
    pairs = torch.stack((left * cos - right * sin, left * sin + right * cos), dim=-1)
    return pairs.flatten(-2).type_as(x_BNHD)


# --- depth ----------------------------------------------------------------------------------------------------------


network = experts.of_pipeline
networks = experts.by_component
one_expert = experts.one


def blocks(transformer: Any) -> nn.ModuleList:
    """The residual blocks in order, of one expert after those of the other: what can be skipped, and what a budget of
    parameters counts."""
    return nn.ModuleList(block for model in experts.models(transformer) for block in model.blocks)


def groups(transformer: Any) -> list[range]:
    """All blocks, or those of each expert."""
    ends = [0]
    for model in experts.models(transformer):
        ends.append(ends[-1] + len(model.blocks))
    return [range(*pair) for pair in pairwise(ends)]


@contextmanager
def skipping(transformer: Any, skipped: Collection[int]) -> Iterator[None]:
    """Within it, calls of ``transformer`` bypass the blocks ``skipped``: the residual stream passes unchanged.

    F(.; M) of the paper. The weights are the same objects, so gradients reach the blocks that are run.
    """
    with ExitStack() as stack:
        for model, group in zip(experts.models(transformer), groups(transformer), strict=True):
            kept = [block for i, block in zip(group, model.blocks, strict=True) if i not in skipped]
            stack.enter_context(_of_blocks(model, kept))
        yield


@contextmanager
def _of_blocks(model: Any, parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, a model runs these in place of its blocks."""
    whole = model.blocks
    model.blocks = nn.ModuleList(parts)
    try:
        yield
    finally:
        model.blocks = whole


def width(transformer: Any) -> int:
    """Of the residual stream."""
    return transformer.config.num_attention_heads * transformer.config.attention_head_dim


@contextmanager
def tokens_after(transformer: Any, places: Collection[int]) -> Iterator[list[Tensor]]:
    """Within it, each call adds the residual streams after these of the blocks that it runs, ``[B, N, D]`` each, to the
    list; -1 is the last one. Of experts a place is one in each of them."""
    seen: list[Tensor] = []
    of_models = [[] for _ in transformer.models] if isinstance(transformer, experts.Experts) else [seen]
    with ExitStack() as stack:
        if isinstance(transformer, experts.Experts):
            stack.enter_context(transformer.noting(of_models, seen))
        for model, noted in zip(experts.models(transformer), of_models, strict=True):
            wanted = {place % len(model.blocks) for place in places}
            # Beside the blocks and no hook on them: a compiled block would be compiled anew.
            tapped = (
                part
                for i, block in enumerate(model.blocks)
                for part in ((block, _Tap(noted)) if i in wanted else (block,))
            )
            stack.enter_context(_of_blocks(model, tapped))
        yield seen


class _Tap(nn.Module):
    """Stands where a block does, passes the stream on and notes it."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, hidden_BND: Tensor, *_: Any) -> Tensor:
        self._seen.append(hidden_BND)
        return hidden_BND


def split_sequence(transformer: Any, mesh: Any, shape: tuple[int, ...]) -> None:
    """Each process of the mesh gets its part of the tokens before the first block that is run, by diffusers' plan.

    The plan names the first block of all, which may be the one that is skipped: here whichever comes first splits.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import EquipartitionSharder, apply_context_parallel

    parts, patch = mesh.size(), transformer.config.patch_size
    tokens = math.prod(length // step for length, step in zip(shape[1:], patch, strict=True))
    heads = transformer.config.num_attention_heads
    if tokens % parts or heads % parts:
        raise ConfigError(
            f"context_parallel={parts} has to divide the {tokens} tokens of a clip and the {heads} heads of attention"
        )
    degrees = ContextParallelConfig(ring_degree=1, ulysses_degree=parts)
    config = ParallelConfig(context_parallel_config=degrees)
    config.setup(mesh.get_rank(), parts, torch.device(mesh.device_type), mesh=mesh)

    def split(_block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BND, text, timestep, rotary = arguments
        if hidden_BND.shape[1] != rotary[0].shape[1]:
            hidden_BND = EquipartitionSharder.shard(hidden_BND, 1, degrees._flattened_mesh)
        return hidden_BND, text, timestep, rotary

    for model in experts.models(transformer):
        for module in model.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = config
        plan = {name: part for name, part in model._cp_plan.items() if name != "blocks.0"}
        apply_context_parallel(model, degrees, plan)
        for block in model.blocks:
            block.register_forward_pre_hook(split)


def without_blocks(transformer: Any, pruned: Collection[int]) -> Any:
    """A new network, a copy of this one's weights with the blocks ``pruned`` gone and the rest numbered anew."""
    smaller = [
        _smaller(model, [i - group.start for i in group if i not in pruned])
        for model, group in zip(experts.models(transformer), groups(transformer), strict=True)
    ]
    if isinstance(transformer, experts.Experts):
        high, low = smaller
        return experts.Experts(high, low, transformer.boundary)
    return smaller[0]


def _smaller(model: Any, kept: list[int]) -> WanTransformer3DModel:
    # Names with an underscore say where the weights were read from.
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    smaller = WanTransformer3DModel.from_config({**settings, "num_layers": len(kept)})
    smaller.load_state_dict(_renumbered(model.state_dict(), kept))
    return smaller.to(model.device)


def _renumbered(weights: dict[str, Tensor], kept: list[int]) -> dict[str, Tensor]:
    after: dict[str, Tensor] = {}
    for name, weight in weights.items():
        head, *tail = name.split(".")
        if head != "blocks":
            after[name] = weight
        elif (number := int(tail[0])) in kept:
            after[".".join(["blocks", str(kept.index(number)), *tail[1:]])] = weight
    return after


# --- attention between frames -----------------------------------------------------------------------------------------


@contextmanager
def attention_between_frames(
    transformer: Any, num_frames: int, queries: int, generator: torch.Generator
) -> Iterator[dict[int, list[float]]]:
    """Within it, each call adds to each block's list the share of self-attention that crosses frames.

    The mean over heads and ``queries`` random rows a clip of ``sum_{j: frame(j) != frame(i)} A_ij``.
    """
    shares: dict[int, list[float]] = {i: [] for i in range(len(blocks(transformer)))}
    with _processors(
        transformer, {i: _MeasuringAttnProcessor(num_frames, queries, generator, shares[i]) for i in shares}
    ):
        yield shares


@contextmanager
def within_frames(transformer: Any, limited: Collection[int], num_frames: int) -> Iterator[None]:
    """Within it, self-attention of the blocks ``limited`` sees no other frame."""
    with _processors(transformer, {i: _WithinFrameAttnProcessor(num_frames) for i in limited}):
        yield


@contextmanager
def without_self_attention(transformer: Any, left_out: Collection[int]) -> Iterator[None]:
    """Within it, self-attention of these blocks is not computed and adds nothing."""
    with _processors(transformer, {i: _NoAttnProcessor() for i in left_out}):
        yield


def silence_self_attention(transformer: Any, silenced: Collection[int]) -> None:
    """Self-attention of these blocks adds nothing from now on: what its last layer gives is 0."""
    every: Any = blocks(transformer)
    for i in silenced:
        last = every[i].attn1.to_out[0]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()


def self_attention_share(transformer: Any) -> float:
    """Of a block's parameters those of its self-attention."""
    block: Any = blocks(transformer)[0]
    return sum(p.numel() for p in block.attn1.parameters()) / sum(p.numel() for p in block.parameters())


@contextmanager
def _processors(transformer: Any, by_block: Mapping[int, WanAttnProcessor]) -> Iterator[None]:
    """Within it, self-attention of these blocks is computed by other processors."""
    every: Any = blocks(transformer)
    before = {i: every[i].attn1.processor for i in by_block}
    for i, processor in by_block.items():
        every[i].attn1.set_processor(processor)
    try:
        yield
    finally:
        for i, processor in before.items():
            every[i].attn1.set_processor(processor)


class _MeasuringAttnProcessor(WanAttnProcessor):
    """The stock attention, which notes how much of it goes to other frames."""

    def __init__(self, num_frames: int, queries: int, generator: torch.Generator, shares: list[float]) -> None:
        super().__init__()
        self._num_frames, self._queries, self._generator, self._shares = num_frames, queries, generator, shares

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        query_BNHD, key_BNHD, _ = _projected(attn, hidden_states, encoder_hidden_states, rotary_emb)
        count = key_BNHD.shape[1]
        frame_N = torch.arange(count) // (count // self._num_frames)
        row_Q = torch.randint(count, (self._queries,), generator=self._generator)
        scores_BHQN = torch.einsum("bqhd,bnhd->bhqn", query_BNHD[:, row_Q].float(), key_BNHD.float())
        attention_BHQN = (scores_BHQN / query_BNHD.shape[-1] ** 0.5).softmax(-1)
        elsewhere_QN = (frame_N[row_Q, None] != frame_N).to(attention_BHQN)
        self._shares.append((attention_BHQN * elsewhere_QN).sum(-1).mean().item())
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class _NoAttnProcessor(WanAttnProcessor):
    """None at all."""

    def __call__(self, _attn: Any, hidden_states: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class _WithinFrameAttnProcessor(WanAttnProcessor):
    """Attention that is block-diagonal over frames: each frame is a clip of its own."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self._num_frames = num_frames

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        def by_frame(x_BNHD: Tensor) -> Tensor:
            return x_BNHD.unflatten(1, (self._num_frames, -1)).flatten(0, 1).transpose(1, 2)

        query, key, value = _projected(attn, hidden_states, encoder_hidden_states, rotary_emb)
        query, key, value = by_frame(query), by_frame(key), by_frame(value)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        joined = heads.transpose(1, 2).flatten(2, 3).unflatten(0, (-1, self._num_frames)).flatten(1, 2)
        return attn.to_out[1](attn.to_out[0](joined.type_as(query)))
