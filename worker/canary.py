"""A worker that has nothing to do makes the clip of its warm-up again, and compares.

A GPU whose memory has gone bad, an engine that was refitted with wrong weights, a driver that is half dead: the next
job would be the first to find out, and nobody looks at its video. So an idle worker finds out by itself, and one that
makes another clip than it made at first, twice in a row, ends; whoever supervises it starts it anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from rq.exceptions import StopRequested

from worker.contract import Canary, Phase
from worker.engine.errors import EngineLost, OutOfMemory
from worker.gpu_worker import Pulse
from worker.jobs import Runtime
from worker.records import now
from worker.video import tiles

if TYPE_CHECKING:
    from worker.pipeline import VideoPipeline

log = logging.getLogger(__name__)

_TOLERANCE = 2.0
"""Grey levels. The last bits of a sum may differ from run to run on a GPU; a tile's mean moves by hundredths then."""
_AGAIN_S = 5.0
"""After one that failed, or was given up because a job came."""


class _Wanted(Exception):
    """A job has come."""


class CanaryWatch:
    """Looks after the active model of one worker. For the thread that takes jobs."""

    def __init__(self, runtime: Runtime, pulse: Pulse, every_s: float) -> None:
        """``every_s``: pause between one canary and the next; 0: there are none."""
        self._runtime = runtime
        self._pulse = pulse
        self._every_s = every_s
        self._due_at = time.monotonic() + every_s
        self._first_s: dict[str, float] = {}
        """By sha256 of the model: what its first canary took."""
        self._failures = 0

    def __call__(self, is_wanted: Callable[[], bool]) -> bool:
        """Make a clip if it is time to; false: this worker is not fit to make any more.

        Args:
            is_wanted: whether a job has come; it is not kept waiting for longer than a step.
        """
        if not self._every_s or time.monotonic() < self._due_at:
            return True
        pipeline = self._runtime.loaded.active

        def look(_phase: Phase, _share: float) -> None:
            if is_wanted():
                raise _Wanted

        started = time.monotonic()
        try:
            frames_THWC = pipeline.warm_up(look).frames_THWC
        except _Wanted:
            self._due_at = time.monotonic() + _AGAIN_S
            return True
        except OutOfMemory:  # somebody else has it: a new process would not have more
            self._due_at = time.monotonic() + self._every_s
            self._say(pipeline, "there is not enough memory to make the clip of the warm-up", started)
            return True
        except StopRequested:  # a signal: rq throws it into whatever its thread is at
            raise
        except EngineLost as error:  # no later call can succeed, nor should a job have to find out
            self._say(pipeline, str(error).partition("\n")[0], started)
            self._runtime.is_lost = True
            return False
        except Exception as error:
            return self._judge(pipeline, f"{type(error).__name__}: {error}".partition("\n")[0], started)
        assert pipeline.first_tiles is not None  # nothing serves that has not been warmed up
        off = float(np.abs(tiles(frames_THWC) - pipeline.first_tiles).max())
        fault = None
        if not off <= _TOLERANCE:  # a NaN neither
            fault = f"the clip of the warm-up is {off:.1f} grey levels off what it was (tolerance {_TOLERANCE:g})"
        return self._judge(pipeline, fault, started)

    def _say(self, pipeline: VideoPipeline, fault: str | None, started: float) -> None:
        seconds = round(time.monotonic() - started, 3)
        first_s = self._first_s.setdefault(pipeline.card.sha256, seconds)
        said = Canary(at=now(), ok=fault is None, seconds=seconds, first_seconds=first_s, message=fault)
        self._pulse.show(canary=said)
        # A worker that ends for it is gone before anybody has read its heartbeat.
        self._runtime.metrics.count("canaries_total", result="ok" if said.ok else "failed")
        self._runtime.metrics.flush(self._runtime.records.redis)

    def _judge(self, pipeline: VideoPipeline, fault: str | None, started: float) -> bool:
        self._say(pipeline, fault, started)
        if fault is None:
            self._failures = 0
            self._due_at = time.monotonic() + self._every_s
            return True
        self._failures += 1
        self._due_at = time.monotonic() + _AGAIN_S
        log.error("canary of %s, time %d in a row: %s", pipeline.model_card.id, self._failures, fault)
        if self._failures < 2:
            return True
        self._runtime.is_lost = True
        return False
