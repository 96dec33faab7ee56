"""The transformer as PyTorch runs it, optionally with its blocks compiled or as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from worker.engine.base import Engine
from worker.engine.errors import EngineError


class EagerEngine(Engine):
    """The module itself."""

    def __init__(self, transformer: Any, *, compile_blocks: bool = False) -> None:
        """
        Args:
            transformer: a diffusers transformer, on its device.
            compile_blocks: each kind of block through `torch.compile`, once for all of them. The first call takes
                seconds then, and another size of input takes them again.
        """
        super().__init__(transformer.config, transformer.dtype, transformer.device)
        self.transformer = transformer
        if compile_blocks:
            transformer.compile_repeated_blocks(fullgraph=True)
        self.name = f"{'compiled' if compile_blocks else 'eager'}-{self.device.type}"

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``."""
        output: Tensor = self.transformer(**inputs, return_dict=False)[0]
        return output


class GraphedEngine(Engine):
    """Another engine's call, recorded once for each size of input and played back: no launches one by one.

    A recording keeps its own copies of inputs and output, so one call at a time.
    """

    def __init__(self, engine: Engine) -> None:
        """
        Args:
            engine: on a GPU; its work must not depend on the values of its inputs, only on their sizes.

        Raises:
            EngineError: it is not on a GPU.
        """
        if engine.device.type != "cuda":
            raise EngineError(f"CUDA graphs need a GPU, and {engine.name} is not on one; set CUDA_GRAPHS=off")
        super().__init__(engine.config, engine.dtype, engine.device)
        self.name = f"{engine.name}-graphed"
        self._engine = engine
        self._recorded: dict[Any, tuple[Any, dict[str, Tensor], Tensor]] = {}

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``."""
        sizes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if sizes not in self._recorded:
            self._recorded[sizes] = self._record(inputs)
        graph, held, output = self._recorded[sizes]
        for name, value in inputs.items():
            held[name].copy_(value)
        graph.replay()
        return output.clone()

    def _record(self, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], Tensor]:
        held = {name: value.clone() for name, value in inputs.items()}
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is set up lazily must not be recorded
            for _ in range(3):
                self._engine.infer(held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be decoding: what it asks of the GPU is none of this recording's.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._engine.infer(held)
        return graph, held, output
