"""Several clips at a time: the calls that their denoisings make are joined into one.

Each clip is denoised by the stock pipeline in a thread of its own. When all that take part wait for the transformer,
their inputs are put together, and it is called once. Each clip brings its own noise level, so one that comes later
joins those that are under way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from worker.engine.base import Engine


class _Call:
    """One thread's call, and what came of it."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        self.output: Tensor | None = None
        self.error: BaseException | None = None
        self.done = False


class BatchingEngine(Engine):
    """Another engine, for several threads at once. A clip alone is computed exactly as without this."""

    def __init__(self, engine: Engine, max_batch: int) -> None:
        """
        Args:
            engine: takes any number of clips up to ``max_batch``; is called by one thread at a time.
            max_batch: of clips in one call.
        """
        super().__init__(engine.config, engine.dtype, engine.device)
        self.engine = engine
        self.name = engine.name
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._members = 0
        self._waiting: list[_Call] = []
        self._busy = False

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Around one clip's denoising: the others wait for its calls."""
        with self._changed:
            self._members += 1
        try:
            yield
        finally:
            with self._changed:
                self._members -= 1
                self._changed.notify_all()

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``; called within ``taking_part``."""
        call = _Call(inputs)
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
            self._changed.wait_for(lambda: call.done or self._is_complete())
            if not call.done:
                calls, self._waiting, self._busy = self._waiting, [], True
        if not call.done:
            self._run(calls)
        if call.error is not None:
            raise call.error
        assert call.output is not None
        return call.output

    def _is_complete(self) -> bool:
        return not self._busy and len(self._waiting) >= self._members

    def _run(self, calls: Sequence[_Call]) -> None:
        alike: dict[tuple[tuple[str, torch.Size], ...], list[_Call]] = {}
        for call in calls:
            alike.setdefault(tuple((name, value.shape) for name, value in call.inputs.items()), []).append(call)
        try:
            for group in alike.values():
                for first in range(0, len(group), self._max_batch):
                    self._run_together(group[first : first + self._max_batch])
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _run_together(self, calls: Sequence[_Call]) -> None:
        try:
            inputs = calls[0].inputs
            if len(calls) > 1:
                inputs = {name: torch.cat([call.inputs[name] for call in calls]) for name in inputs}
            outputs = torch.chunk(self.engine.infer(inputs), len(calls))
            for call, part in zip(calls, outputs, strict=True):
                call.output = part
        except BaseException as error:  # each of the threads has to hear of it, whatever it is
            for call in calls:
                call.error = error
        for call in calls:
            call.done = True
