"""A tiny teacher of the real classes with random weights, and a recipe that distils it in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from distill import autoencoder, recipes, teach
from distill.config import DistillConfig, TeachConfig, override

NUM_LAYERS = 5

TEACHER = {
    "name": "tiny-teacher",
    "vae.base_dim": 8,
    "vae.dim_mult": [1, 2, 2],
    "vae.z_dim": 16,
    "transformer.num_layers": NUM_LAYERS,
    "transformer.num_attention_heads": 2,
    "transformer.attention_head_dim": 12,
    "transformer.ffn_dim": 32,
    "transformer.text_dim": 32,
    "transformer.text_layers": 1,
    "call.num_inference_steps": 2,
    "call.guidance_scale": 2.0,
}

RECIPE = {
    "preset": "smoke",
    "name": "tiny-student",
    "num_clips": 8,
    "precision": "float32",
    "importance.rho": 0.4,
    "pruning.unimportant": 1.5,
    "pruning.drift_limit": 1e9,
    # What the recipe chooses may change; the golden curves and what else is tested here must not.
    "pruning.deployed_probability": 0.5,
    "pruning.target": "frozen_teacher",
    "pruning.fit.learning_rate": 5e-4,
    "matching.scores.source": "full",
    "matching.scores.beta_1": [0.5, 1.5],
    "matching.scores.beta_2": [0.0, 0.5],
    "matching.rollout": "euler",
    "matching.fit.learning_rate": 1e-4,
    "matching.critic.learning_rate": 1e-3,
    "matching.critic.rank": 2,
    **{f"matching.limits.{name}": [0.0, 1e9] for name in ("motion", "contrast", "saturation", "flicker")},
    "matching.limits.critic": 1e9,
}


def settings(values: dict[str, object]) -> list[str]:
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


def make_teacher(folder: Path) -> Path:
    config: TeachConfig = override(recipes.teach_shapes(), settings(TEACHER))
    torch.manual_seed(0)
    vae = autoencoder.make(config.vae)
    networks = teach.Networks(config.transformer, config.vae.z_dim, len(teach.make_tokenizer()))
    with torch.no_grad():
        for parameter in networks.transformer.parameters():
            # Stock initialisation leaves the blocks nearly silent.
            parameter.mul_(2.0) if parameter.ndim > 1 else None
    teach.save(folder, vae, networks, config)
    return folder


def recipe(teacher: Path, **more: object) -> DistillConfig:
    return recipes.load("shapes", settings({**RECIPE, "teacher": str(teacher), **more}))
