"""The engine's side of the bargain: it is called exactly like the transformer it stands for.

So the stock pipeline runs with ``pipe.transformer = engine``, and a parity test is one loop over engines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Made = Literal["build", "refit", "loaded"]
"""How an engine came to be: built, other weights put into one that was there, or there as it is."""


class Engine(ABC):
    """Base of every engine. It has what diffusers' pipelines read of a transformer, and ``infer`` to fill in."""

    name: str
    """What runs, and where, for the manifest: "ort-cpu"."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            config: of the transformer it stands for.
            dtype: that the pipeline gives its inputs in.
            device: where they have to be.
        """
        self.config = config
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """The transformer's output for its inputs by name."""

    def __call__(self, *, return_dict: bool = True, **inputs: Any) -> tuple[Tensor]:
        """As diffusers calls it. An argument that is None is not given.

        Raises:
            TypeError: an output other than a tuple is asked for, or an input that is no tensor.
        """
        if return_dict:
            raise TypeError("an engine returns a tuple; call it with return_dict=False, as the pipelines do")
        given = {name: value for name, value in inputs.items() if value is not None}
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"an engine takes tensors; {name} is {type(value).__name__}")
        return (self.infer(given),)

    def cache_context(self, _name: str, **_about: Any) -> AbstractContextManager[None]:
        """For diffusers' feature caches, which engines have none of."""
        return nullcontext()


class Observed(Engine):
    """An engine that somebody listens to."""

    def __init__(self, engine: Engine, before: Callable[[dict[str, Tensor]], None]) -> None:
        """
        Args:
            engine: does the work.
            before: is told the inputs of each call before it is made.
        """
        super().__init__(engine.config, engine.dtype, engine.device)
        self.name = engine.name
        self._engine = engine
        self._before = before

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``."""
        self._before(inputs)
        return self._engine.infer(inputs)
