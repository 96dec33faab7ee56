"""What several tests of the distillation share: a tiny teacher, and one run over it from beginning to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.config import DistillConfig
from distill.loop import Run
from distill.run import distil
from distill.stages.given import Batch, Given
from tests.distill import tiny


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def tiny_config(tiny_teacher: Path) -> DistillConfig:
    return tiny.recipe(tiny_teacher)


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_config: DistillConfig) -> Given:
    run = Run(tmp_path_factory.mktemp("given"), seed=0)
    with run.handling_signals():
        return Given(run, tiny_config)


@pytest.fixture
def batch(given: Given) -> Batch:
    """Three clips."""
    return given.batch(given.train, torch.arange(3))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A new one, in an empty folder."""
    made = Run(tmp_path / "run", seed=0)
    with made.handling_signals():
        yield made


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: DistillConfig) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("run") / "a"
    with one_thread():
        distil(folder, tiny_config)
    return folder


class one_thread:  # noqa: N801 (reads like the context managers of torch)
    """Sums in one order: what has to be equal bit for bit is computed within."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


@pytest.fixture
def single_thread() -> Iterator[None]:
    with one_thread():
        yield
