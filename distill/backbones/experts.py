"""Two experts as one network: which one is asked depends on the noise level (Wan2.2-A14B).

The stock pipelines ask the first at timesteps from ``boundary`` up and the second below. Within a batch of clips at
different levels each clip goes to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import ConfigError


class Experts(nn.Module):
    """Called as either of its models is."""

    def __init__(self, high: Any, low: Any, boundary: float) -> None:
        """
        Args:
            high: the model for noise levels from ``boundary`` up.
            low: the one for those below.
            boundary: noise level, in [0, 1].
        """
        super().__init__()
        self.high = high
        self.low = low
        self.boundary = boundary
        self.both_asked: Callable[[list[bool]], list[bool]] = lambda asked: asked
        """Told of which models this call asks something; which of them are to be run, be it for nothing. Networks that
        lie in parts on several processes have to be run by all of them."""
        self._noted: tuple[list[list[Tensor]], list[Tensor]] | None = None

    @property
    def models(self) -> tuple[Any, Any]:
        """High first."""
        return self.high, self.low

    @property
    def config(self) -> Any:
        """Of either: they differ in weights alone, or in the number of their blocks."""
        return self.high.config

    @property
    def device(self) -> torch.device:
        """Of both."""
        device: torch.device = self.high.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of both."""
        dtype: torch.dtype = self.high.dtype
        return dtype

    def is_high(self, sigma: Tensor) -> Tensor:
        """Whether a noise level is the first one's."""
        return sigma >= self.boundary

    def routed(self, sigma_B: Tensor, call: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """Outputs of ``call(model, rows)`` for the rows of each model, put together in the clips' order."""
        high_B = self.is_high(sigma_B)
        rows = [mask_B.nonzero()[:, 0] for mask_B in (high_B, ~high_B)]
        order_B = torch.cat(rows).argsort()
        parts = []
        asked = self.both_asked([len(rows_B) > 0 for rows_B in rows])
        for number, (model, rows_B, wanted) in enumerate(zip(self.models, rows, asked, strict=True)):
            if len(rows_B):
                parts.append(call(model, rows_B))
            elif wanted:
                parts.append(call(model, order_B[:1])[:0])
                if self._noted:
                    self._noted[0][number].clear()
        if self._noted:
            of_models, seen = self._noted
            noted = [of for of in of_models if of]
            seen.extend(torch.cat(same)[order_B] for same in zip(*noted, strict=True))
            for of in of_models:
                of.clear()
        return torch.cat(parts)[order_B]

    @contextmanager
    def noting(self, of_models: list[list[Tensor]], seen: list[Tensor]) -> Iterator[None]:
        """Within it what is noted in either model's list during a call is added to ``seen``, in the clips' order."""
        self._noted = of_models, seen
        try:
            yield
        finally:
            self._noted = None


def models(network: Any) -> tuple[Any, ...]:
    """The models that a network is of: itself, or its experts."""
    return network.models if isinstance(network, Experts) else (network,)


def one(network: Any, which: str) -> Any:
    """The ``high`` or the ``low`` expert, for all noise levels. Raises ``ConfigError`` where there are no two."""
    if not isinstance(network, Experts):
        raise ConfigError(f"experts={which}: the teacher is of one network; leave it out")
    return getattr(network, which)


def of_pipeline(pipe: Any) -> Any:
    """The transformer of a pipeline, or both of them as one network where it has two."""
    if getattr(pipe, "transformer_2", None) is None:
        return pipe.transformer
    return Experts(pipe.transformer, pipe.transformer_2, pipe.config.boundary_ratio)


def by_component(network: Any) -> dict[str, Any]:
    """The models by the pipeline's components that they are."""
    return dict(zip(("transformer", "transformer_2"), models(network), strict=False))
