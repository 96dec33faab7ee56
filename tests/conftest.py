"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis

from tests.stack import RedisServer, Stack, new_record
from worker.contract import Record
from worker.records import Records, connect

OUR_VARIABLES = (
    "REDIS_URL",
    "STORAGE_URL",
    "PUBLIC_URL",
    "HOST",
    "PORT",
    "MODEL",
    "DEVICE",
    "ENGINE",
    "COMPILE",
    "OVERLAP",
    "MAX_QUEUED",
    "MAX_WAIT_S",
    "AUTH",
    "ADMIN_KEY",
    "KEY_MAX_JOBS",
    "KEY_PER_MINUTE",
    "CORS_ORIGINS",
    "PRIVATE_HOSTS",
    "URL_IMAGES",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_TRACES_EXPORTER",
    "OTEL_SDK_DISABLED",
    "LEASE_S",
    "DRAIN_S",
    "RUNS",
    "STUDENTS",
    "KEEP_PREVIOUS",
    "TEACHERS",
    "GATE_AGAINST",
    "TRAIN_PROCESSES",
    "TRAIN_POLICY",
    "TRAIN_WINDOW",
    "IDLE_S",
    "GPU_NAME",
    "GPU_LOCK",
)


@pytest.fixture(scope="session")
def engines(tmp_path_factory) -> Path:
    """Where every test's engines are kept: each is built once."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def real_models(tmp_path_factory):
    """Wan and HunyuanVideo at tiny size, from a download to a student, each made once."""
    from tests.real_models import RealModels  # with torch, which most tests of the service do without

    return RealModels(tmp_path_factory.mktemp("real"))


@pytest.fixture(autouse=True, scope="session")
def _clean_environment(engines) -> Iterator[None]:
    """What a developer has set must not change what the tests see."""
    patch = pytest.MonkeyPatch()
    for name in OUR_VARIABLES:
        patch.delenv(name, raising=False)
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("ENGINES", str(engines))  # for the processes that tests start
    yield
    patch.undo()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis for tests that start no worker."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    """A client of an empty Redis, which decodes responses."""
    client = connect(redis_server.url)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def records(redis: Redis) -> Records[Record]:
    """The records of an empty Redis."""
    return Records(redis, Record)


@pytest.fixture
def record(records: Records[Record]) -> Record:
    """A job that has just been accepted."""
    made = new_record()
    records.create(made, max_queued=10)
    return made


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, _clean_environment: None) -> Iterator[Stack]:
    """Redis, worker with the bundled model, service: started once for the whole session."""
    running = Stack(tmp_path_factory.mktemp("stack"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    """An HTTP client of the running stack."""
    with httpx.Client(base_url=stack.url, timeout=90) as http:
        yield http


@pytest.fixture(scope="session")
def example_image() -> Path:
    """The picture of the README's curl."""
    return Path(__file__).resolve().parent.parent / "models" / "examples" / "red-circle.png"
