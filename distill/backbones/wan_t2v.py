"""Wan text-to-video, 2.1 and 2.2: `WanPipeline`. No frame is given, so the loss is taken of all of them.

What is not here is as in `distill.backbones.wan` and `usual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.backbones import experts, wan
from distill.backbones.conditions import Conditions, Shapes
from distill.backbones.usual import NUM_TRAIN_TIMESTEPS

TASKS: tuple[str, ...] = ("t2v",)
EXPORT_AXES: Mapping[str, tuple[int, ...]] = {**wan.EXPORT_AXES, "timestep": (0,)}


def condition_shapes(pipe: Any, call: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """``text`` alone."""
    return {}, wan.text_shapes(pipe, call)


def predict_velocity(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, image: Conditions, text: Conditions) -> Tensor:
    """Velocity of every frame; of two experts each clip's is by the one that its noise level belongs to."""
    return called(transformer, x_BCTHW, sigma_B, {"encoder_hidden_states": text["text"]})


def called(transformer: Any, x_BCTHW: Tensor, sigma_B: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of the network, or of its experts, each clip's of its own."""

    def call(model: Any, rows_B: Tensor | slice) -> Tensor:
        rest = {name: value[rows_B] for name, value in inputs.items()}
        timestep_B = (sigma_B * NUM_TRAIN_TIMESTEPS)[rows_B]
        output: Tensor = model(hidden_states=x_BCTHW[rows_B], timestep=timestep_B, return_dict=False, **rest)[0]
        return output

    if isinstance(transformer, experts.Experts):
        return transformer.routed(sigma_B, call)
    return call(transformer, slice(None))
