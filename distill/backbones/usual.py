"""What most stock pipelines do, and what all do that are given no frame. A backbone names what it does otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.backbones.conditions import Conditions

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps are noise levels times this, in all of them."""
GIVEN_FRAMES = 0
TEXT_SEES_IMAGE = False


def encode_image(pipe: Any, first_BCHW: Tensor | None, call: Mapping[str, Any]) -> Conditions:
    """No frame is given: there are none."""
    return {}


def image_of(x0_BCTHW: Tensor, kept: Conditions) -> Conditions:
    """None."""
    return {}


def to_keep(image: Conditions) -> Conditions:
    """Nothing."""
    return {}


def with_given(x_BCTHW: Tensor, image: Conditions) -> Tensor:
    """As they are."""
    return x_BCTHW


def starting(noise_BCTHW: Tensor, image: Conditions) -> Tensor:
    """The noise."""
    return noise_BCTHW


def arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """All of it."""
    return dict(call)


def frames_of(call: Mapping[str, Any]) -> int:
    """As asked."""
    return int(call["num_frames"])


def latents_to_decode(given_BCTHW: Tensor, stepped_BCTHW: Tensor) -> Tensor:
    """What the stock call gives."""
    return given_BCTHW
