"""HunyuanVideo text-to-video: `HunyuanVideoPipeline`.

Timesteps are noise levels times 1000, and the output is the velocity (noise - x_0). There are two guidances: the scale
that is an input of the network (``guidance_scale`` of the call; a constant of it, so it is kept with the text), and
classifier-free guidance (``true_cfg_scale``, with a negative prompt).

What is not here is in `distill.backbones.hunyuan_network`, `hunyuan_autoencoder` and `usual`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.backbones import hunyuan_network
from distill.backbones.conditions import Conditions, Shapes
from distill.backbones.usual import NUM_TRAIN_TIMESTEPS

TASKS = ("t2v",)
EXPORT_AXES: Mapping[str, tuple[int, ...]] = {
    "hidden_states": (0, 2, 3, 4),
    "timestep": (0,),
    "encoder_hidden_states": (0, 1),
    "encoder_attention_mask": (0, 1),
    "pooled_projections": (0,),
    "guidance": (0,),
}
"""Of the transformer's inputs, the axes that may differ from call to call: clips, frames, rows, columns, tokens."""
ENCODING = ("max_sequence_length", "prompt_template")
"""Of a call, what its text encoders are given."""
_TEXT = {"prompt_embeds": "text", "prompt_attention_mask": "mask", "pooled_prompt_embeds": "pooled"}
"""Arguments of the stock call, and conditions."""


def encode_text(pipe: Any, prompts: list[str], call: Mapping[str, Any], first_BCHW: Tensor | None = None) -> Conditions:
    """``text``, embeddings ``[B, L, D]``, their ``mask``, ``pooled`` ones, and ``guidance``, the network's input."""
    asked = {name: call[name] for name in ENCODING if name in call}
    return conditions(pipe, call, pipe.encode_prompt(prompt=prompts, device=pipe.text_encoder.device, **asked))


def conditions(pipe: Any, call: Mapping[str, Any], encoded: tuple[Tensor, Tensor, Tensor]) -> Conditions:
    """Of what a stock ``encode_prompt`` made."""
    text_BLD, pooled_BD, mask_BL = encoded
    made = {"text": text_BLD, "mask": mask_BL, "pooled": pooled_BD}
    if pipe.transformer.config.guidance_embeds:
        made["guidance"] = pooled_BD.new_full((len(pooled_BD),), call["guidance_scale"]) * NUM_TRAIN_TIMESTEPS
    return made


def text_inputs(text: Conditions, negative: Conditions | None = None) -> dict[str, Any]:
    """Arguments of the stock call in place of the prompt, and of the negative one."""
    return arguments_of(text, negative, _TEXT)


def arguments_of(text: Conditions, negative: Conditions | None, names: Mapping[str, str]) -> dict[str, Any]:
    """Text conditions as arguments that are called so, and no negative prompt, which would be encoded beside."""
    inputs: dict[str, Any] = {argument: text[name] for argument, name in names.items()}
    if negative is not None:
        inputs |= {f"negative_{argument}": negative[name] for argument, name in names.items()}
    return {**inputs, "negative_prompt": None}


def set_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Equal steps before the shift, the first one at 1: the pipelines give the levels and do not leave them to the
    scheduler, which would end at another one."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1])


def latent_shape(pipe: Any, call: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """C, T, H, W."""
    return (
        pipe.vae.config.latent_channels,
        1 + (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal,
        call["height"] // pipe.vae_scale_factor_spatial,
        call["width"] // pipe.vae_scale_factor_spatial,
    )


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """No image; ``text``, ``mask``, ``pooled`` and ``guidance``."""
    return {}, text_shapes(pipe, call["max_sequence_length"])


def text_shapes(pipe: Any, tokens: int) -> Shapes:
    """Of so many tokens."""
    config = pipe.transformer.config
    text: Shapes = {
        "text": (tokens, config.text_embed_dim),
        "mask": (tokens,),
        "pooled": (config.pooled_projection_dim,),
    }
    return {**text, "guidance": ()} if config.guidance_embeds else text


def guidance_at(transformer: Any, call: Mapping[str, Any], sigma: float) -> float:
    """Scale of classifier-free guidance, standard unit. Without a negative prompt the stock pipeline has none."""
    return float(call.get("true_cfg_scale", 1.0)) if call.get("negative_prompt") is not None else 1.0


def calling(call: Mapping[str, Any], num_inference_steps: int, guidance_scale: float) -> dict[str, Any]:
    """The call with other steps and classifier-free guidance. The network's own guidance stays."""
    negative = {"negative_prompt": call.get("negative_prompt") or ""} if guidance_scale > 1 else {}
    return {**call, "num_inference_steps": num_inference_steps, "true_cfg_scale": guidance_scale, **negative}


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame."""
    output: Tensor = transformer(
        hidden_states=x_BCTHW,
        timestep=sigma_B * NUM_TRAIN_TIMESTEPS,
        encoder_hidden_states=text["text"],
        encoder_attention_mask=text["mask"].to(x_BCTHW.dtype),
        pooled_projections=text["pooled"],
        guidance=text.get("guidance"),
        return_dict=False,
    )[0]
    return output


def with_parts(pipe: Any, transformer: Any, scheduler: Any, call: Mapping[str, Any] | None = None) -> Any:
    """The stock pipeline of another one's other parts with this transformer and scheduler."""
    return type(pipe)(**{**pipe.components, "transformer": transformer, "scheduler": scheduler})


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
    pooled_projections: Tensor,
    guidance: Tensor | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """The stock forward with the mask of the text alone."""
    temb, given_temb = self.time_text_embed(timestep, pooled_projections, guidance)
    text_BLD = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    mask_BL = torch.arange(text_BLD.shape[1], device=text_BLD.device) < encoder_attention_mask.sum(dim=1, keepdim=True)
    patch = self.config.patch_size
    tokens_per_frame = (hidden_states.shape[3] // patch) * (hidden_states.shape[4] // patch)
    return hunyuan_network.run(self, hidden_states, temb, text_BLD, mask_BL, given_temb, tokens_per_frame)
