"""Tiny pipeline folders of the real classes, with random weights, of every model that can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import hunyuan, wan

BACKBONES = {**wan.VARIANTS, **{name: name for name in hunyuan.VARIANTS}}
"""By variant."""


def folder(variant: str, out: Path) -> Path:
    """A stock pipeline folder."""
    if variant in wan.VARIANTS:
        return wan.folder(variant, out)
    hunyuan.make(out, variant)
    return out


def call(variant: str, **changed: Any) -> dict[str, Any]:
    """Of a card, with classifier-free guidance."""
    if variant in wan.VARIANTS:
        return wan.call(variant, **changed)
    name = "true_cfg_scale" if "15" not in variant else "guidance_scale"
    guided = {"num_inference_steps": 3, name: 3.0, "negative_prompt": "a blue dog"}
    return {**hunyuan.CALLS[variant], **guided, **changed}


def takes_an_image(variant: str) -> bool:
    """Its task is ti2v."""
    return "t2v" not in variant or "ti2v" in variant


def networks(variant: str) -> int:
    """How many transformers it has."""
    return 1 + variant.endswith("a14b")
