"""HunyuanVideo 1.5 text-to-video: `HunyuanVideo15Pipeline`.

One network for both tasks: beside the noisy latents it sees those of an image and a mask, which are zeros here. Text is
read by Qwen2.5-VL, what stands in quotes in it by ByT5 too. Classifier-free guidance is not an argument of the stock
call but a part of the pipeline, its guider; ``guidance_scale`` of a card's call is what the guider is made with. No
argument either is ``max_sequence_length``: of the 1000 and 256 tokens that the pipeline pads to, so many are kept.

What is not here is as in `distill.backbones.hunyuan_t2v`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor

from distill.backbones import hunyuan_network, hunyuan_t2v
from distill.backbones.conditions import Conditions, Shapes
from distill.backbones.usual import NUM_TRAIN_TIMESTEPS

EXPORT_AXES: Mapping[str, tuple[int, ...]] = {
    "hidden_states": (0, 2, 3, 4),
    "timestep": (0,),
    "encoder_hidden_states": (0,),
    "encoder_attention_mask": (0,),
    "encoder_hidden_states_2": (0,),
    "encoder_attention_mask_2": (0,),
    "image_embeds": (0,),
}
"""Of the transformer's inputs, the axes that may differ from call to call: clips, frames, rows, columns."""
_NOT_ASKED = ("guidance_scale", "max_sequence_length")
_TEXT = {
    "prompt_embeds": "text",
    "prompt_embeds_mask": "mask",
    "prompt_embeds_2": "glyphs",
    "prompt_embeds_mask_2": "glyph_mask",
}


def encode_text(pipe: Any, prompts: list[str], call: Mapping[str, Any], first_BCHW: Tensor | None = None) -> Conditions:
    """``text``, Qwen's embeddings, ``glyphs``, those of quoted words, ``[B, L, D]`` each, and their masks."""
    encoded = pipe.encode_prompt(prompts, device=pipe.text_encoder.device, batch_size=len(prompts))
    kept = slice(call.get("max_sequence_length"))
    return {name: value[:, kept] for name, value in zip(_TEXT.values(), encoded, strict=True)}


def text_inputs(text: Conditions, negative: Conditions | None = None) -> dict[str, Any]:
    """Arguments of the stock call in place of the prompt, and of the negative one."""
    return hunyuan_t2v.arguments_of(text, negative, _TEXT)


def arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the pipeline cannot be asked for."""
    return {name: value for name, value in call.items() if name not in _NOT_ASKED}


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """No image; ``text``, ``glyphs`` and their masks."""
    config = pipe.transformer.config
    most = call.get("max_sequence_length", pipe.tokenizer_max_length)
    tokens, glyphs = min(most, pipe.tokenizer_max_length), min(most, pipe.tokenizer_2_max_length)
    return {}, {
        "text": (tokens, config.text_embed_dim), "mask": (tokens,),
        "glyphs": (glyphs, config.text_embed_2_dim), "glyph_mask": (glyphs,),
    }  # fmt: skip


def guidance_at(transformer: Any, call: Mapping[str, Any], sigma: float) -> float:
    """Scale of classifier-free guidance, standard unit."""
    return float(call["guidance_scale"])


def calling(call: Mapping[str, Any], num_inference_steps: int, guidance_scale: float) -> dict[str, Any]:
    """The call with other steps and guidance."""
    return {**call, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame."""
    batch, _, frames, height, width = x_BCTHW.shape
    none_BCTHW = torch.cat([torch.zeros_like(x_BCTHW), x_BCTHW.new_zeros(batch, 1, frames, height, width)], dim=1)
    # Tokens of zeros are not attended to: one says as much as the stock pipeline's 729.
    embeds_B1D = x_BCTHW.new_zeros(batch, 1, transformer.config.image_embed_dim)
    return called(transformer, torch.cat([x_BCTHW, none_BCTHW], dim=1), sigma_B, embeds_B1D, text)


def called(transformer: Any, input_BCTHW: Tensor, sigma_B: Tensor, embeds_BLD: Tensor, text: Conditions) -> Tensor:
    """The transformer's output."""
    output: Tensor = transformer(
        hidden_states=input_BCTHW,
        timestep=sigma_B * NUM_TRAIN_TIMESTEPS,
        encoder_hidden_states=text["text"],
        encoder_attention_mask=text["mask"],
        encoder_hidden_states_2=text["glyphs"],
        encoder_attention_mask_2=text["glyph_mask"],
        image_embeds=embeds_BLD,
        return_dict=False,
    )[0]
    return output


def with_parts(pipe: Any, transformer: Any, scheduler: Any, call: Mapping[str, Any] | None = None) -> Any:
    """The stock pipeline of another one's other parts with these; with a call, of the guidance that it names."""
    guider = pipe.guider if call is None else ClassifierFreeGuidance(guidance_scale=call["guidance_scale"])
    return type(pipe)(**{**pipe.components, "transformer": transformer, "scheduler": scheduler, "guider": guider})


# --- engines ----------------------------------------------------------------------------------------------------------


@contextmanager
def exporting(transformer: Any) -> Iterator[None]:
    """Within it, ``transformer`` computes the same by operators that an engine's compiler can fuse."""
    with hunyuan_network.computing_by(transformer, _forward):
        yield


def _forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    encoder_hidden_states_2: Tensor,
    encoder_attention_mask_2: Tensor,
    image_embeds: Tensor,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """The stock forward, but that text and image tokens stay where they are, and not all valid ones first: they have no
    position, and no other token sees those that are masked."""
    image_BLD = self.image_embedder(image_embeds)
    has_image_B1 = (image_embeds != 0).flatten(1).any(dim=1, keepdim=True)
    texts = (
        self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask),
        self.context_embedder_2(encoder_hidden_states_2),
        image_BLD,
    )
    masks = (encoder_attention_mask.bool(), encoder_attention_mask_2.bool(), has_image_B1.expand(image_BLD.shape[:2]))
    kinds = self.cond_type_embed.weight.unbind()
    text_BLD = torch.cat([text + kind for text, kind in zip(texts, kinds, strict=True)], dim=1)
    return hunyuan_network.run(self, hidden_states, self.time_embed(timestep), text_BLD, torch.cat(masks, dim=1))
