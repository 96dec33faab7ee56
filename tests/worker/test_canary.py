"""What an idle worker does: the clip of its warm-up once more, compared."""

import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from rq.exceptions import StopRequested

from tests.stack import ROOT, Stack, wait_for
from worker import canary
from worker.canary import CanaryWatch
from worker.contract import Phase
from worker.engine.errors import EngineLost, OutOfMemory
from worker.gpu_worker import LOST
from worker.records import connect, ready_workers, workers
from worker.video import tiles

CLIP = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)


def test_tiles_are_the_means_of_what_they_cover():
    found = tiles(CLIP)
    assert found.shape == (5, 8, 8, 3)
    assert found[3, 1, 2] == pytest.approx(CLIP[3, 2:5, 7:11].mean(axis=(0, 1)), abs=1e-4)
    assert found[0, 7, 7] == pytest.approx(CLIP[0, 17:, 26:].mean(axis=(0, 1)), abs=1e-4)
    wide = tiles(np.full((1, 8, 64, 3), 200, np.uint8))
    assert (wide == 200).all()


@dataclass
class Pipeline:
    """Makes clips that a test has chosen."""

    clips: list = field(default_factory=list)
    first_tiles: np.ndarray = field(default_factory=lambda: tiles(CLIP))
    card: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(sha256="0" * 64))
    model_card: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(id="grey@000"))

    def warm_up(self, on_progress):
        on_progress(Phase.DENOISING, 0.5)
        made = self.clips.pop(0)
        if isinstance(made, Exception):
            raise made
        return SimpleNamespace(frames_THWC=made)


@dataclass
class Watched:
    """A watch whose clock a test moves."""

    said: list = field(default_factory=list)
    counted: list = field(default_factory=list)
    moment: float = 0.0
    pipeline: Pipeline = field(default_factory=Pipeline)

    def __post_init__(self) -> None:
        loaded, nobody = SimpleNamespace(active=self.pipeline), SimpleNamespace(redis=None)
        counted = SimpleNamespace(count=lambda _name, result: self.counted.append(result), flush=lambda _redis: None)
        self.runtime = SimpleNamespace(loaded=loaded, is_lost=False, metrics=counted, records=nobody)

    def show(self, *, canary) -> None:
        self.said.append(canary)

    def look(self, seconds: float, *clips, wanted: bool = False) -> bool:
        """After so many seconds, with what the model makes then."""
        self.moment += seconds
        self.pipeline.clips = list(clips)
        fit = self.watch(lambda: wanted)
        assert self.pipeline.clips == [] or wanted
        return fit


@pytest.fixture
def watched(monkeypatch):
    made = Watched()
    monkeypatch.setattr(canary.time, "monotonic", lambda: made.moment)
    made.watch = CanaryWatch(made.runtime, made, 600)
    return made


def other(levels: float) -> np.ndarray:
    """The clip, with one corner lighter or darker."""
    clip = CLIP.astype(np.float32)
    clip[2, :2, :3] = np.clip(clip[2, :2, :3] * 0 + CLIP[2, :2, :3].mean(axis=(0, 1)) + levels, 0, 255)
    return clip.round().astype(np.uint8)


def test_it_is_made_when_it_is_due_and_not_before(watched):
    assert watched.look(599)
    assert not watched.said
    assert watched.look(2, CLIP)
    assert watched.said[0].ok and watched.said[0].message is None
    assert watched.look(599)
    assert watched.look(2, CLIP) and len(watched.said) == 2


def test_a_job_that_comes_is_not_kept_waiting(watched):
    assert watched.look(601, CLIP, wanted=True)
    assert not watched.said
    assert watched.look(6, CLIP) and watched.said[0].ok


def test_last_bits_may_differ_and_pictures_may_not(watched):
    assert watched.look(601, other(1.0)) and watched.said[-1].ok
    assert watched.look(601, other(4.0)) and not watched.said[-1].ok
    assert "grey levels off" in watched.said[-1].message
    assert watched.look(6, CLIP) and watched.said[-1].ok  # it was a passing thing
    assert not watched.runtime.is_lost


@pytest.mark.parametrize("fault", [other(40.0), RuntimeError("no kernel image\nis available")])
def test_twice_in_a_row_ends_the_worker(watched, fault):
    assert watched.look(601, fault)
    assert not watched.look(6, fault)
    assert watched.runtime.is_lost
    assert [one.ok for one in watched.said] == [False, False]
    assert watched.counted == ["failed", "failed"]
    assert "\n" not in watched.said[-1].message


def test_a_lost_engine_ends_it_at_once(watched):
    assert not watched.look(601, EngineLost("the GPU cannot be used any more\nCUDA error"))
    assert watched.runtime.is_lost
    assert watched.said[-1].message == "the GPU cannot be used any more"


def test_a_signal_is_no_failure(watched):
    with pytest.raises(StopRequested):
        watched.look(601, StopRequested())
    assert not watched.said and not watched.counted


def test_that_others_have_the_memory_does_not(watched):
    for _ in range(3):
        assert watched.look(601, OutOfMemory("CUDA out of memory"))
    assert not watched.said[-1].ok and "memory" in watched.said[-1].message


def test_without_a_pause_there_are_none(watched):
    watched.watch = CanaryWatch(watched.runtime, watched, 0)
    assert watched.look(10**6)
    assert not watched.said


BROKEN = """
import sys
from worker import pipeline
from worker.main import run

warm_up, calls = pipeline.VideoPipeline.warm_up, []

def now_and_then(self, *arguments):
    calls.append(self)
    result = warm_up(self, *arguments)
    if len(calls) > int(sys.argv[1]):
        result.frames_THWC[...] = 255 - result.frames_THWC
    return result

pipeline.VideoPipeline.warm_up = now_and_then
run()
"""


def test_a_worker_whose_model_has_gone_bad_ends_and_says_why(tmp_path):
    """A real worker: the heartbeat says that a canary was well, then its model makes negatives."""
    stack = Stack(tmp_path, LEASE_S="4", CANARY_S="1", MODEL="shapes-4step", ENGINE="eager")
    stack.redis.start()
    redis = connect(stack.redis.url)
    with (tmp_path / "worker.log").open("wb") as log:
        command = [sys.executable, "-c", BROKEN, "2"]
        process = subprocess.Popen(command, cwd=ROOT, env=stack.environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: ready_workers(redis), 60, "the worker to be ready")
        wait_for(lambda: any(one.canary and one.canary.ok for one in workers(redis)), 30, "a good canary")
        assert process.wait(60) == LOST
        assert "grey levels off" in (tmp_path / "worker.log").read_text()
        assert not workers(redis)
    finally:
        process.kill()
        process.wait()
        stack.redis.stop()
