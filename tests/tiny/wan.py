"""Wan's pipelines at tiny size: 32 x 32 pixels, 9 frames, three blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from distill.teach import make_tokenizer

SIZE, FRAMES, BLOCKS = 32, 9, 3
CHANNELS = 4
VARIANTS = {
    "ti2v-5b": "wan",
    "i2v-14b": "wan-i2v",
    "i2v-a14b": "wan-i2v",
    "t2v-1.3b": "wan-t2v",
    "t2v-a14b": "wan-t2v",
}
"""What is made, and its backbone."""


def call(variant: str, **changed: Any) -> dict[str, Any]:
    # With an image's tokens before them the stock attention takes the last 512 for the text.
    length = 512 if variant == "i2v-14b" else 16
    plain = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": SIZE, "width": SIZE, "num_frames": FRAMES}
    return {**plain, "max_sequence_length": length, **changed}


def pipeline(variant: str) -> Any:
    torch.manual_seed(sorted(VARIANTS).index(variant))
    experts, image = variant.endswith("a14b"), "i2v" in variant
    beside = image and variant != "ti2v-5b"
    transformers = [_transformer(beside, clip=variant == "i2v-14b") for _ in range(1 + experts)]
    tokenizer = make_tokenizer()
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1)
        ),
        "vae": _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer": transformers[0],
        "boundary_ratio": 0.9 if experts else None,
        "expand_timesteps": variant == "ti2v-5b",
    }
    if experts:
        parts["transformer_2"] = transformers[1]
    if variant == "i2v-14b":
        parts["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                patch_size=14,
            )
        )  # fmt: skip
        parts["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    pipe = (WanImageToVideoPipeline if image else WanPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def folder(variant: str, out: Path) -> Path:
    pipeline(variant).save_pretrained(out)
    return out


def _transformer(beside: bool, clip: bool) -> WanTransformer3DModel:
    made = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=2 * CHANNELS + 4 if beside else CHANNELS, out_channels=CHANNELS, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=BLOCKS, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        image_dim=16 if clip else None, added_kv_proj_dim=24 if clip else None,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():  # the head's are so small that nothing could be told from its output
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(CHANNELS)], latents_std=[1.0 + 0.1 * i for i in range(CHANNELS)],
    )  # fmt: skip
