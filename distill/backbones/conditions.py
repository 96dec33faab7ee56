"""Conditions: tensors by name, each with the clips as its first axis. What the names mean only the backbone knows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Conditions = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
"""Of conditions, without the clips' axis."""


def joined(parts: Iterable[Conditions]) -> Conditions:
    """Of all the clips, one part after the other."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def rows(conditions: Conditions, rows_B: Tensor | slice) -> Conditions:
    """Of some of the clips."""
    return {name: value[rows_B] for name, value in conditions.items()}


def repeated(conditions: Conditions, count: int) -> Conditions:
    """Of one clip, for ``count`` of them; no memory is copied."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in conditions.items()}


def chosen(first_B: Tensor, first: Conditions, second: Conditions) -> Conditions:
    """Clip by clip those of ``first`` where ``first_B`` is true, else those of ``second``."""
    return {
        name: torch.where(first_B.view(-1, *[1] * (value.ndim - 1)), first[name], value)
        for name, value in second.items()
    }


def moved(conditions: Conditions, device: torch.device, dtype: torch.dtype = torch.float32) -> Conditions:
    """To another device; what is not counted or masked also to this type."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in conditions.items()
    }
