"""Fixtures of the tests that break a stack."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.clock import Clock
from tests.chaos.stack import Chaos, chaos_in


@pytest.fixture(scope="session")
def picture(example_image) -> bytes:
    """What every job is asked for with."""
    return example_image.read_bytes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, picture) -> Iterator[Chaos]:
    """Redis and a service, for all tests of a file."""
    with chaos_in(tmp_path_factory.mktemp("chaos"), picture) as made:
        made.start_service()
        yield made


@pytest.fixture
def chaos(shared) -> Iterator[Chaos]:
    """The same, with nothing left of the test before."""
    yield shared
    for gate in shared.gates.iterdir():
        gate.unlink()
    shared.stop_workers()


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: install the package `gcc`")
    built = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", built, source], check=True)
    return built


@pytest.fixture
def clock(tmp_path, library):
    return Clock(tmp_path, library)
