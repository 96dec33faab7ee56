"""docker-compose.yml and Dockerfile: the rules they keep, and each of their commands started as a process.

There need not be a Docker engine. What a container would see at /data, /secret, /storage and /runs lies in a temporary
folder here, and `redis:6379` is a port of the loopback; arguments, environment and health checks are the files' own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.stack import find_redis
from tests.stack import ROOT, free_port, stop, wait_for

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("service", "worker", "worker-gpu")
FIXED_REDIS = {"8.2": 9, "8.4": 6, "8.6": 6, "8.8": 2, "8.10": 1}
"""Per series, the first patch release without the known holes (CVE-2026-81934 is the last of them)."""


def stages() -> dict[str, dict[str, list[str]]]:
    """The Dockerfile: stage -> instruction -> its arguments, those of the stages it is built FROM included."""
    found: dict[str, dict[str, list[str]]] = {}
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = found[alias] = {key: list(values) for key, values in found.get(base, {}).items()}
        stage.setdefault(name, []).append(" ".join(rest.split()))
    return found


def image_environment(target: str) -> dict[str, str]:
    pairs = [word.split("=", 1) for line in stages()[target]["ENV"] for word in line.split()]
    return {name: value for name, value in pairs if name not in ("PATH", "HOME")}


# --- rules -----------------------------------------------------------------------------------------------------------


def test_docker_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("there is no `docker compose` to ask")
    subprocess.run([docker, "compose", "--profile", "*", "config", "--quiet"], cwd=ROOT, check=True)


def test_every_name_that_is_used_is_declared() -> None:
    for name, service in SERVICES.items():
        assert ("network_mode" in service) != bool(service.get("networks")), name
        assert set(service.get("networks", [])) <= set(COMPOSE["networks"]), name
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"]), name
        for other, needed in service.get("depends_on", {}).items():
            conditions = ("service_healthy", "service_completed_successfully")
            assert other in SERVICES and needed["condition"] in conditions, name
            assert needed["condition"] != "service_healthy" or health_check(other), other
        if "build" in service:
            assert service["build"]["target"] in stages(), name


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_may_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert (service["init"], service["read_only"], service["tmpfs"]) == (True, True, ["/tmp"])
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    user = service.get("user") or stages()[service["build"]["target"]]["USER"][-1]
    assert user in ("app", "redis") or name == "secret", "secret alone is root: it writes into a volume that is root's"


@pytest.mark.parametrize("name", SERVICES)
def test_each_runs_again_says_whether_it_is_well_and_has_time_to_stop(name: str) -> None:
    service = SERVICES[name]
    if name == "secret":  # it ends at once
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert health_check(name)
    assert int(service["stop_grace_period"].removesuffix("s")) >= (70 if "worker" in name else 15)


def test_only_the_service_is_reached_from_outside_and_only_from_this_machine() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "service": ["127.0.0.1:${PORT:-8000}:8000"]
    }
    assert COMPOSE["networks"]["internal"]["internal"] is True
    # The courier is reached by nobody, and reaches whoever wants to be told.
    outside = [name for name, service in SERVICES.items() if "edge" in service.get("networks", [])]
    assert outside == ["service", "courier"]


def test_redis_is_a_pinned_release_without_known_holes() -> None:
    assert SERVICES["secret"]["image"] == SERVICES["redis"]["image"]
    match = re.fullmatch(r"redis:(\d+\.\d+)\.(\d+)-alpine", SERVICES["redis"]["image"])
    assert match and int(match[2]) >= FIXED_REDIS[match[1]]


def test_the_service_image_has_no_torch() -> None:
    installs = [line for line in stages()["build-service"]["RUN"] if "pip install" in line]
    assert len(installs) == 1
    assert installs[0].endswith("pip install --constraint constraints.txt --editable '.[service,s3,otel]'")


def test_whoever_runs_may_read_the_models() -> None:
    copied = [line for name in ("service", "worker", "trainer") for line in stages()[name]["COPY"] if " models" in line]
    assert copied == ["--chown=app models/examples models/examples", *["--chown=app models models"] * 2]


def test_the_trainer_comes_when_asked_for_and_may_write_its_runs() -> None:
    assert SERVICES["trainer"]["profiles"] == ["train"]
    assert stages()["build-trainer"]["RUN"][-1].endswith("--editable '.[worker,distill]'")
    [made] = [line for line in stages()["trainer"]["RUN"] if line.endswith("/runs")]
    assert made == "install --directory --owner app --group app /runs"
    assert image_environment("trainer")["RUNS"] == "/runs"


def test_the_gpu_worker_is_the_worker_with_another_torch_and_device() -> None:
    differ = {"profiles", "build", "image", "environment", "deploy"}
    cpu, gpu = SERVICES["worker"], SERVICES["worker-gpu"]
    assert {key: value for key, value in gpu.items() if key not in differ} == {
        key: value for key, value in cpu.items() if key not in differ
    }
    assert gpu["profiles"] == ["gpu"] and "profiles" not in cpu
    assert gpu["build"] == {**cpu["build"], "args": {"TORCH_INDEX_URL": "", "EXTRAS": "worker,s3,otel,gpu"}}
    assert gpu["environment"] == {**cpu["environment"], "DEVICE": "cuda"}


# --- each command as a process ---------------------------------------------------------------------------------------


def health_check(name: str) -> list[str]:
    """The command that says whether a container is well: compose's, else the image's."""
    service = SERVICES[name]
    if "healthcheck" in service:
        kind, script = service["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        return ["sh", "-c", script]
    if "build" not in service:
        return []
    _, _, command = stages()[service["build"]["target"]].get("HEALTHCHECK", ["  []"])[-1].partition("CMD ")
    return list(json.loads(command or "[]"))


class Containers:
    """Starts compose's services one by one as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis_port, self.port = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("data", "secret", "storage", "runs", "bin"):
            (folder / name).mkdir()
        server = Path(find_redis())
        (folder / "bin" / "redis-server").symlink_to(server)
        (folder / "bin" / "redis-cli").symlink_to(server.with_name(server.name.replace("-server", "-cli")))

    def translate(self, text: str) -> str:
        """What a container sees, as it is here."""
        text = text.replace("$$", "$").replace("redis:6379", f"127.0.0.1:{self.redis_port}")
        text = text.replace("redis-cli", f"redis-cli -p {self.redis_port}").replace("8000", str(self.port))
        return re.sub(r"(?<![\w.])/(data|secret|storage|runs)\b", rf"{self.folder}/\1", text)

    def environment(self, name: str) -> dict[str, str]:
        """The image's, then compose's; a key without a value is handed through when it is set, which it is not here."""
        service = SERVICES[name]
        values = image_environment(service["build"]["target"]) if "build" in service else {}
        given = {key: value for key, value in service.get("environment", {}).items() if value is not None}
        values |= {key: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for key, value in given.items()}
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        here = {"PATH": path, "HOME": str(self.folder), "HOST": "127.0.0.1", "PORT": str(self.port)}
        return {key: self.translate(value) for key, value in values.items()} | here

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Run a service's own command."""
        service = SERVICES[name]
        command = [self.translate(word) for word in [*service.get("entrypoint", []), *service["command"]]]
        if name == "redis":
            command += ["--port", str(self.redis_port), "--bind", "127.0.0.1"]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment(name), stdout=log, stderr=log)
        self.processes[name] = process
        return process

    def is_healthy(self, name: str) -> bool:
        """Ask as Docker would."""
        process = self.processes[name]
        assert process.poll() is None, (self.folder / f"{name}.log").read_text()
        command = [self.translate(word) for word in health_check(name)]
        asked = subprocess.run(command, cwd=ROOT, env=self.environment(name), capture_output=True, timeout=30)
        return asked.returncode == 0


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """All of them, started in the order that compose would, each healthy by its own check."""
    started = Containers(tmp_path_factory.mktemp("compose"))
    try:
        assert started.start("secret").wait(20) == 0
        started.start("redis")
        wait_for(lambda: started.is_healthy("redis"), 20, "redis")
        started.start("service")
        started.start("courier")
        started.start("worker")
        started.start("trainer")
        wait_for(lambda: started.is_healthy("service"), 60, "service")
        wait_for(lambda: started.is_healthy("courier"), 60, "courier")
        wait_for(lambda: started.is_healthy("worker"), 120, "worker")
        wait_for(lambda: started.is_healthy("trainer"), 60, "trainer")
        yield started
    finally:
        for process in reversed(list(started.processes.values())):
            stop(process)


def test_every_command_becomes_healthy_and_the_stack_ready(containers: Containers) -> None:
    assert all(containers.is_healthy(name) for name in ("redis", "service", "courier", "worker", "trainer"))
    assert httpx.get(f"http://127.0.0.1:{containers.port}/readyz").json()["status"] == "ready"


def test_the_password_is_made_once(containers: Containers) -> None:
    file = containers.folder / "secret" / "redis_url"
    before = file.read_text()
    assert re.fullmatch(rf"redis://:[0-9a-f]{{64}}@127\.0\.0\.1:{containers.redis_port}/0\n", before)
    assert containers.start("secret").wait(20) == 0
    assert file.read_text() == before


def test_redis_asks_for_the_password_and_forgets_nothing(containers: Containers) -> None:
    def ask(*words: str) -> str:
        cli = [str(containers.folder / "bin" / "redis-cli"), "-p", str(containers.redis_port), *words]
        password = (containers.folder / "secret" / "redis.conf").read_text().split()[1]
        environment = {"REDISCLI_AUTH": password} if words else {}
        return subprocess.run(cli, env=environment, input="PING\n", capture_output=True, text=True).stdout

    assert "NOAUTH" in ask()
    for name, value in {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}.items():
        assert ask("CONFIG", "GET", name).split() == [name, value]
    assert ask("CONFIG", "GET", "dir").split() == ["dir", str(containers.folder / "data")]


def test_every_command_ends_on_sigterm(containers: Containers) -> None:
    for name in ("service", "courier", "trainer", "worker", "redis"):
        process = containers.processes[name]
        process.send_signal(signal.SIGTERM)
        assert process.wait(int(SERVICES[name]["stop_grace_period"].removesuffix("s"))) in (0, -signal.SIGTERM), name
