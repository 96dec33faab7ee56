"""Calls of several threads joined into one: who waits for whom, and who hears of what."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from worker.engine.base import Engine
from worker.engine.batching import BatchingEngine


class Doubler(Engine):
    """Notes the sizes of its batches."""

    name = "doubler"

    def __init__(self):
        super().__init__(None, torch.float32, torch.device("cpu"))
        self.batches = []

    def infer(self, inputs):
        self.batches.append(len(inputs["x"]))
        if inputs["x"].isnan().any():
            raise FloatingPointError("not a number")
        return 2 * inputs["x"]


@pytest.fixture
def doubler():
    return Doubler()


def run(engine, values, calls=3, start=None):
    """A clip of each value in a thread of its own: the outputs of each."""
    start = start or threading.Barrier(len(values))

    def clip(value):
        with engine.taking_part():
            start.wait(10)
            return [engine(x=torch.full((1, 2), float(value)), return_dict=False)[0] for _ in range(calls)]

    with ThreadPoolExecutor(len(values)) as pool:
        return [future.result(20) for future in [pool.submit(clip, value) for value in values]]


def test_calls_are_joined_and_each_gets_its_own(doubler):
    outputs = run(BatchingEngine(doubler, 4), [1, 2, 3])
    assert doubler.batches == [3, 3, 3]
    for value, outs in zip([1, 2, 3], outputs, strict=True):
        assert all(torch.equal(out, torch.full((1, 2), 2.0 * value)) for out in outs)


def test_a_batch_is_no_larger_than_it_may_be(doubler):
    run(BatchingEngine(doubler, 2), [1, 2, 3], calls=1)
    assert sorted(doubler.batches) == [1, 2]


def test_a_clip_alone_waits_for_nobody(doubler):
    run(BatchingEngine(doubler, 4), [1])
    assert doubler.batches == [1, 1, 1]


def test_the_others_go_on_when_one_leaves(doubler):
    engine = BatchingEngine(doubler, 4)
    start = threading.Barrier(2)

    def leaves():
        with engine.taking_part():
            start.wait(10)
            engine(x=torch.ones(1, 2), return_dict=False)
            raise InterruptedError

    def stays():
        with engine.taking_part():
            start.wait(10)
            for _ in range(4):
                engine(x=torch.ones(1, 2), return_dict=False)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(leaves), pool.submit(stays)
        with pytest.raises(InterruptedError):
            one.result(10)
        two.result(10)
    assert doubler.batches == [2, 1, 1, 1]


def test_other_sizes_are_not_put_together(doubler):
    engine = BatchingEngine(doubler, 4)
    start = threading.Barrier(2)

    def clip(size):
        with engine.taking_part():
            start.wait(10)
            return engine(x=torch.ones(1, size), return_dict=False)[0].shape

    with ThreadPoolExecutor(2) as pool:
        shapes = list(pool.map(clip, [2, 3], timeout=20))
    assert shapes == [(1, 2), (1, 3)]
    assert doubler.batches == [1, 1]


def test_everyone_in_a_batch_hears_of_its_error(doubler):
    engine = BatchingEngine(doubler, 4)
    start = threading.Barrier(2)

    def clip(value):
        with engine.taking_part():
            start.wait(10)
            engine(x=torch.full((1, 2), value), return_dict=False)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(clip, value) for value in (1.0, float("nan"))]
        for future in futures:
            with pytest.raises(FloatingPointError):
                future.result(10)
    assert run(engine, [5], calls=1)[0][0].tolist() == [[10.0, 10.0]]  # and the next batch is another matter
