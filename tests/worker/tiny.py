"""Transformers of the real class: the bundled student's, and tiny ones that export in seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from distill.backbones import wan
from worker.engine import export
from worker.settings import MODELS_DIR


def student(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The bundled one's transformer."""
    folder = MODELS_DIR / "shapes-4step" / "transformer"
    return WanTransformer3DModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def transformer(num_layers: int = 1, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """A tiny one with random weights."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=num_layers,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=32,
        rope_max_seq_len=32,
    )
    return (model if dtype == model.dtype else model.to(dtype)).eval()


def perturbed(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """As another distillation might end: the same network, other weights, each of them."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.1 * (parameter.std() if parameter.numel() > 1 else 1) * noise)
    return other


def inputs(model: WanTransformer3DModel, frames: int = 3, rows: int = 4, columns: int = 4) -> dict[str, Tensor]:
    """Of one call: latents ``[1, C, frames, rows, columns]``, the timestep of each token, and a text of 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens_per_frame = rows * columns // 4
    timestep = torch.full((1, frames * tokens_per_frame), 937.5)
    timestep[:, :tokens_per_frame] = 0
    latents = torch.randn(1, model.config.in_channels, frames, rows, columns, generator=generator)
    text = torch.randn(1, 32, model.config.text_dim, generator=generator)
    return {
        "hidden_states": latents.to(model.dtype),
        "timestep": timestep,
        "encoder_hidden_states": text.to(model.dtype),
    }


def model(transformer: WanTransformer3DModel, name: str = "one", **dims: int) -> SimpleNamespace:
    """What of a `choice.Model` the making of an engine reads; ``name`` stands for its weights."""
    return SimpleNamespace(
        pipe=SimpleNamespace(transformer=transformer),
        transformer=transformer,
        component="transformer",
        card=SimpleNamespace(name=name, sha256=name, backbone="wan", files={"transformer/w": name, "vae/w": "same"}),
        backbone=wan,
        inputs={key: value.to(transformer.device) for key, value in inputs(transformer, **dims).items()},
    )


def shapes(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def exported(model, path: Path, given=None, axes=None) -> Path:
    """Its ONNX file at ``path``."""
    with wan.exporting(model):
        export.export(model, inputs(model) if given is None else given, path, axes or {})
    return path
