"""The transformer as PyTorch runs it, optionally with its blocks compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from worker.engine.base import Engine


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
