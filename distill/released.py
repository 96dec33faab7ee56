"""Shapes of the released models that recipes are for, so that a run can be planned before anything is downloaded.

As their `config.json` files have them, quoted from public code: Wan2.1's from `scripts/convert_wan_to_diffusers.py` of
diffusers (commit 0122271), which has those of Wan2.2 in its later versions; HunyuanVideo's from
`scripts/convert_hunyuan_video_to_diffusers.py` there (04614753: the class's own defaults are the released model's, and
so are those of both models' autoencoders, Wan2.2-TI2V-5B's excepted). Sizes are what the publishers sample at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Part = tuple[Literal["diffusers", "transformers"], str, Mapping[str, Any]]
"""Library, class and configuration; what that does not say is as the class has it."""


@dataclass(frozen=True)
class Released:
    """A pipeline, without what encodes texts: data is prepared with that before a run."""

    source: str
    backbone: str
    task: str
    pipeline: str
    parts: Mapping[str, Part]
    call: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the pipeline itself."""


def _wan(heads: int, ffn_dim: int, num_layers: int, channels: int = 16, **more: Any) -> Part:
    config = {
        "num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn_dim, "num_layers": num_layers,
        "in_channels": channels, "out_channels": channels, "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "patch_size": [1, 2, 2],
    }  # fmt: skip
    return "diffusers", "WanTransformer3DModel", {**config, **more}


def _call(width: int, height: int, num_frames: int, **more: Any) -> dict[str, Any]:
    size = {"width": width, "height": height, "num_frames": num_frames}
    return {"num_inference_steps": 50, "guidance_scale": 5.0, "max_sequence_length": 512, **size, **more}


_WAN_VAE: Part = ("diffusers", "AutoencoderKLWan", {})
_WAN22_VAE: Part = (
    "diffusers",
    "AutoencoderKLWan",
    {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
        "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
)  # fmt: skip
_CLIP: Part = (
    "transformers",
    "CLIPVisionModel",
    {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
)  # fmt: skip
_A14B = _wan(40, 13824, 40, in_channels=36)


def _hunyuan(task: str, **config: Any) -> Released:
    pipeline = "HunyuanVideoPipeline" if task == "t2v" else "HunyuanVideoImageToVideoPipeline"
    return Released(
        f"released HunyuanVideo, {task}",
        "hunyuan-t2v" if task == "t2v" else "hunyuan-i2v",
        task,
        pipeline,
        {
            "transformer": ("diffusers", "HunyuanVideoTransformer3DModel", config),
            "vae": ("diffusers", "AutoencoderKLHunyuanVideo", {}),
        },
        _call(1280, 720, 129, guidance_scale=6.0, true_cfg_scale=1.0, max_sequence_length=256),
    )


RELEASED = {
    "wan2.1-i2v-14b": Released(
        "released Wan2.1-I2V-14B-480P",
        "wan-i2v",
        "ti2v",
        "WanImageToVideoPipeline",
        {
            "transformer": _wan(40, 13824, 40, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
            "vae": _WAN_VAE,
            "image_encoder": _CLIP,
        },
        _call(832, 480, 81),
    ),
    "wan2.1-t2v-1.3b": Released(
        "released Wan2.1-T2V-1.3B",
        "wan-t2v",
        "t2v",
        "WanPipeline",
        {"transformer": _wan(12, 8960, 30), "vae": _WAN_VAE},
        _call(832, 480, 81),
    ),
    "wan2.2-ti2v-5b": Released(
        "released Wan2.2-TI2V-5B",
        "wan",
        "ti2v",
        "WanImageToVideoPipeline",
        {"transformer": _wan(24, 14336, 30, channels=48), "vae": _WAN22_VAE},
        _call(1280, 704, 121),
        {"expand_timesteps": True},
    ),
    "wan2.2-i2v-a14b": Released(
        "released Wan2.2-I2V-A14B",
        "wan-i2v",
        "ti2v",
        "WanImageToVideoPipeline",
        {"transformer": _A14B, "transformer_2": _A14B, "vae": _WAN_VAE},
        _call(832, 480, 81, guidance_scale=3.5),
        {"boundary_ratio": 0.9},
    ),
    "hunyuanvideo-i2v": _hunyuan("ti2v", image_condition_type="token_replace"),
    "hunyuanvideo-t2v": _hunyuan("t2v"),
}
"""By the name of the teacher's folder in the recipe."""
