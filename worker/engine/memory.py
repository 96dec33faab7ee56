"""A pipeline in less memory, for the eager engine: by diffusers' own hooks, which this module only sets.

- *Group offload*: weights wait in the host's memory and come to the GPU when they are needed, the next ones while the
  present ones compute. The output is the same; each call moves every weight once over the bus.
- *fp8*: the transformer's matrices are kept as `float8_e4m3fn`, without a scale, and widened for each use. The output
  is another one; benchmarks/memory.md says by how much.
"""

from __future__ import annotations

import gc
from typing import Any, Literal

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from worker.engine.errors import EngineError

Offload = Literal["none", "group"]
Casting = Literal["none", "fp8"]


def place(pipe: Any, *, offload: Offload, casting: Casting, device: torch.device) -> None:
    """Bring a pipeline to where it computes: instead of ``pipe.to(device)``, and before an engine stands for a network.

    Args:
        pipe: a stock pipeline as it was loaded: on the CPU, in the precision that it computes in.
        offload: "group": on the GPU is a block at a time, and the next one on its way.
        casting: "fp8": a byte for each weight of the transformer's blocks. Not of what diffusers leaves out:
            embeddings, norms, modulation tables and the last layer.
        device: where it computes.

    Raises:
        EngineError: the settings cannot be had together.
    """
    if offload == "group" and device.type == "cpu":
        raise EngineError(
            "OFFLOAD=group moves weights between a GPU and the host's memory, and the device is cpu; "
            "set OFFLOAD=none, or use a GPU"
        )
    # In this order: streams return to the copies of the weights that they were given, so those must be the small ones.
    if casting == "fp8":
        cast(pipe.transformer)
    if offload == "group":
        offload_groups(pipe, device)
    else:
        pipe.to(device)


def cast(transformer: Any) -> None:
    """Keep the weights of the blocks in fp8 and compute in the precision they had. There is no way back."""
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)


def offload_groups(pipe: Any, device: torch.device) -> None:
    """Let the weights of all networks wait in the host's memory, pinned where ``device`` is a GPU.

    On the CPU it goes the same way with nothing to copy, which is what the tests need.
    """
    streamed = device.type != "cpu"
    # Without `record_stream` the memory of a weight that fp8 has just widened could be given away while it is read.
    settings: dict[str, Any] = {"onload_device": device, "use_stream": streamed, "record_stream": streamed}
    for network in pipe.components.values():
        if hasattr(network, "enable_group_offload"):
            network.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **settings)
        elif isinstance(network, nn.Module):
            # A text encoder of transformers: its blocks are not its children, so by blocks it would come all at once.
            apply_group_offloading(network, offload_type="leaf_level", **settings)


def weight_bytes(network: nn.Module) -> int:
    """What the weights take as they are kept, in bytes."""
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def free() -> None:
    """Give back to the GPU what nothing here uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
