"""A real S3 server for tests: moto, as a process on a free loopback port.

It keeps objects, content types, ranges, lists and lifecycle rules as S3 does. Who sends a request it looks at where it
is told to (`guarded_s3_server`), and then in the `Authorization` header alone: it never checks a link's signature.

A module of tests has these fixtures with ``pytest_plugins = ["tests.s3"]``.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stack import free_port, stop, wait_for

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@dataclass
class S3Server:
    """One moto process."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For programs that are to use it."""
        return {
            **KEYS,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, **environment: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "s3.log").open("ab") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            # Its own data must not go to a server that the tests' environment names.
            clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
            self.process = subprocess.Popen(command, env={**clean, **environment}, stdout=log, stderr=log)
        wait_for(self._answers, 20, "moto to answer")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/moto-api/", timeout=1).is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        stop(self.process, 5)

    def client(self, service: str = "s3", **credentials: str) -> Any:
        """boto3's client of it."""
        import boto3

        known = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", **credentials}
        return boto3.client(service, endpoint_url=self.url, region_name="us-east-1", **known)

    def make_bucket(self, name: str) -> str:
        """A new bucket's `s3://` URL."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def add_user(self, policy: dict[str, Any]) -> dict[str, str]:
        """Make a user who may do what this policy says; the variables with their credentials. Three calls."""
        iam = self.client("iam")
        iam.create_user(UserName="fastlightgen")
        iam.put_user_policy(UserName="fastlightgen", PolicyName="storage", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName="fastlightgen")["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One for all tests; each makes its own bucket. It gives 20 names at a time."""
    yield from _running(S3Server(tmp_path_factory.mktemp("s3")), MOTO_S3_DEFAULT_MAX_KEYS="20")


@pytest.fixture(scope="session")
def guarded_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One that looks at who asks, from the fifth call on: before, there is a bucket and a user to be made."""
    yield from _running(S3Server(tmp_path_factory.mktemp("guarded-s3")), INITIAL_NO_AUTH_ACTION_COUNT="4")


def _running(server: S3Server, **environment: str) -> Iterator[S3Server]:
    try:
        server.start(**environment)
        yield server
    finally:
        server.stop()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket that is new and empty, on a server that this process uses."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.make_bucket(f"bucket-{secrets.token_hex(4)}")
