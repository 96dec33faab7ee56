"""Build the Dockerfile and run docker-compose.yml for real, with no registry of images: `make image-check`.

podman builds every target that needs no GPU, and podman-compose starts every service that can be had here, one after
the other as `depends_on` says, each healthy by its own check. The images of others below ours are made of Debian's
packages, under the same names. So what is built and run is the files' own; what differs is said at the end. It has a
store, networks and volumes of its own in VAR_DIR/image-check, and removes them.

Needs root on Debian or Ubuntu (`apt-get install podman runc netavark aardvark-dns iptables catatonit mmdebstrap`) and
10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "image-check"
TOOLS = ("podman", "runc", "mmdebstrap")
HEALTHY_S = 240
NO_GPU_HERE = ("worker-gpu", "trainer-gpu")


class Failed(Exception):
    """Something does not work. The message says what."""


@dataclass(frozen=True)
class StandIn:
    """What takes the place of an image of others: Debian's packages, and what else the image has."""

    packages: tuple[str, ...]
    hook: str = "true"
    """Shell, with the new root in $1."""
    config: tuple[str, ...] = ()


STAND_INS = {
    # Its headers are what torch.compile compiles against.
    "python": StandIn(
        ("python3", "python3-venv", "python3-dev", "ca-certificates"),
        'ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
    ),
    "redis": StandIn(("redis-server", "redis-tools"), 'mkdir "$1/data" && chroot "$1" chown redis:redis /data'),
    "prom/prometheus": StandIn(
        ("prometheus", "wget"),
        'mkdir "$1/prometheus" && chroot "$1" chown nobody:nogroup /prometheus',
        ('ENTRYPOINT ["/usr/bin/prometheus"]', "USER nobody"),
    ),
}
"""Repository -> what is taken for it. What has none (Grafana) is left out."""


class Engine:
    """podman and podman-compose with everything of theirs in one folder."""

    def __init__(self, folder: Path, services: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
        self.profiles = [word for profile in sorted(profiles) for word in ("--profile", profile)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "containers.conf").write_text(
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'tmp_dir = "{folder}/state"\nvolume_path = "{folder}/volumes"\n'
            '[network]\nnetwork_backend = "netavark"\n'
            f'network_config_dir = "{folder}/networks"\n'
            # podman's own are more than root may ask for in some virtual machines.
            '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
        )
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("STORAGE_URL", "REDIS_URL")},
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "PORT": str(free_port()),
            "BOARD_PORT": str(free_port()),
            "PYTHONWARNINGS": "ignore",
        }

    def run(self, *command: str, into: str | None = None) -> str:
        """What a command prints. Raises ``Failed``."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if into:
            (self.folder / into).write_text(done.stdout + done.stderr)
        if done.returncode:
            raise Failed(f"{' '.join(command)[:200]}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    def podman(self, *words: str) -> str:
        return self.run("podman", *words)

    def compose(self, *words: str, into: str | None = None) -> str:
        program = str(Path(sys.executable).with_name("podman-compose"))
        return self.run(program, "--in-pod", "false", "-p", PROJECT, *self.profiles, *words, into=into)

    def shell(self, service: str, script: str) -> str:
        """Run something in a container."""
        return self.podman("exec", container(service), "sh", "-c", script)

    def remove(self) -> None:
        """Containers, volumes, networks, images."""
        for what in (
            "rm --all --force --volumes",
            "volume rm --all --force",
            "network prune --force",
            "rmi --all --force",
        ):
            subprocess.run(["podman", *what.split()], env=self.environment, capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def container(service: str) -> str:
    return f"{PROJECT}_{service}_1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def repository(image: str) -> str:
    return image.split(":")[0]


def can_be_had(service: dict[str, Any]) -> bool:
    return "build" in service or repository(service["image"]) in STAND_INS


# --- images ----------------------------------------------------------------------------------------------------------


def make_bases(engine: Engine, services: dict[str, dict[str, Any]]) -> None:
    """Lay every image that ours are built FROM, or that runs as it is, into the store."""
    wanted = {image for image in re.findall(r"(?m)^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text())}
    wanted |= {service["image"] for service in services.values() if "build" not in service}
    have = engine.podman("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    for image in sorted(wanted):
        path = f"docker.io/{image if '/' in image else f'library/{image}'}"
        if path in have:  # of a run before with --keep
            continue
        stand_in = STAND_INS[repository(image)]
        root = engine.folder / "root.tar"
        packages = f"--include={','.join(stand_in.packages)}"
        engine.run("mmdebstrap", "--quiet", "--variant=minbase", packages, f"--customize-hook={stand_in.hook}",
                   "bookworm", str(root))  # fmt: skip
        changes = [word for line in stand_in.config for word in ("--change", line)]
        engine.podman("import", "--quiet", *changes, str(root), path)
        root.unlink()
        print(f"  {image:32} {' '.join(stand_in.packages)}", flush=True)


def build(engine: Engine, services: dict[str, dict[str, Any]], volumes: list[str]) -> None:
    """Every target that these services are built from, through compose's own `build`."""
    by_target = {service["build"]["target"]: name for name, service in reversed(services.items()) if "build" in service}
    mounts = " ".join(f"--volume {volume}" for volume in volumes)
    arguments = f"--isolation chroot --network host --format docker --pull=never {mounts}"
    given = os.environ.get("TORCH_INDEX_URL")
    torch = [] if given is None else ["--build-arg", f"TORCH_INDEX_URL={given}"]
    for target, name in by_target.items():
        started = time.monotonic()
        engine.compose(f"--podman-build-args={arguments}", "build", *torch, name, into=f"build-{target}.log")
        size = int(engine.podman("image", "inspect", "--format", "{{.Size}}", services[name]["image"]))
        user = engine.podman("image", "inspect", "--format", "{{.Config.User}}", services[name]["image"]).strip()
        if user != "10001":
            raise Failed(f"{services[name]['image']} runs as {user!r}; wanted 10001")
        print(f"  {target:32} {size / 1e6:8.0f} MB  {time.monotonic() - started:4.0f} s", flush=True)


# --- containers ------------------------------------------------------------------------------------------------------


def start(engine: Engine, services: dict[str, dict[str, Any]]) -> list[str]:
    """Each when those that it waits for are well; the names of those that go on running, in that order."""
    needs = {name: set(service.get("depends_on", {})) & set(services) for name, service in services.items()}
    running = []
    for name in TopologicalSorter(needs).static_order():
        engine.compose("up", "--detach", "--no-build", "--no-deps", name, into=f"up-{name}.log")
        if services[name]["restart"] == "no":
            if (code := engine.podman("wait", container(name)).strip()) != "0":
                raise Failed(f"{name} ended with {code}: {logs(engine, name)[-4000:]}")
            print(f"  {name:32} ended well", flush=True)
        else:
            print(f"  {name:32} healthy after {wait_healthy(engine, name):.0f} s", flush=True)
            running.append(name)
    return running


def wait_healthy(engine: Engine, name: str) -> float:
    """Seconds until its health check, which podman leaves to systemd, passes. Raises ``Failed``."""
    started = time.monotonic()
    while time.monotonic() - started < HEALTHY_S:
        try:
            engine.podman("healthcheck", "run", container(name))
            return time.monotonic() - started
        except Failed:
            if engine.podman("inspect", "--format", "{{.State.Running}}", container(name)).strip() != "true":
                break
            time.sleep(0.5)
    raise Failed(f"{name} does not become healthy: {logs(engine, name)[-4000:]}")


def logs(engine: Engine, name: str) -> str:
    done = subprocess.run(
        ["podman", "logs", container(name)], env=engine.environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def checks(
    engine: Engine, services: dict[str, dict[str, Any]], running: list[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What has to be true of the running stack: what it is called -> what raises, or returns false, where it is not."""

    def status(name: str, field: str) -> str:
        text = engine.shell(name, "cat /proc/1/status")
        return str(re.search(rf"(?m)^{field}:\s+(\S+)", text)[1])  # type: ignore[index]

    def limit(name: str, field: str) -> int:
        return int(engine.podman("inspect", "--format", f"{{{{.HostConfig.{field}}}}}", container(name)))

    def key() -> str:
        return str(re.findall(r"fl_\w{8}_\S+", logs(engine, "service"))[0])

    def smoke() -> bool:
        engine.environment["FASTLIGHTGEN_KEY"] = key()
        said = engine.run(sys.executable, "deploy/smoke.py", "--requests", "3")
        print("    " + said.strip().replace("\n", "\n    "))
        return True

    yield "no container runs as root", lambda: all(status(name, "Uid") != "0" for name in running)
    yield "none has a capability", lambda: all(int(status(name, "CapBnd"), 16) == 0 for name in running)
    yield "none may gain one", lambda: all(status(name, "NoNewPrivs") == "1" for name in running)
    yield (
        "none can write beside its volumes",
        lambda: all(engine.shell(name, "grep '^[^ ]* / [^ ]* ro,' /proc/mounts") for name in running),
    )
    yield (
        "each has limits of memory and processes",
        lambda: all(limit(name, "Memory") > 0 and limit(name, "PidsLimit") > 0 for name in running),
    )
    yield (
        "no way out of the internal networks",
        lambda: all(
            not re.search(r"(?m)^\S+\s+00000000\s", engine.shell(name, "cat /proc/net/route"))
            for name in running
            if "edge" not in services[name]["networks"]
        ),
    )
    yield "Redis lets nobody in without a password", lambda: "NOAUTH" in engine.shell("redis", "redis-cli ping")
    yield (
        "the service's image has no torch",
        lambda: (
            not engine.shell(
                "service", "python -c \"import importlib.util as u; print('torch' if u.find_spec('torch') else '')\""
            ).strip()
        ),
    )
    yield (
        "the trainer compiles",
        lambda: engine.shell(
            "trainer",
            "python -c 'import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(64))'"
            " && ls $TORCHINDUCTOR_CACHE_DIR",
        ),
    )
    yield "three videos by way of the published port", smoke
    yield (
        "Prometheus reads the service",
        lambda: wait_until(
            lambda: '"health":"up"' in engine.shell("prometheus", "wget -q -O - http://127.0.0.1:9090/api/v1/targets"),
            60,
        ),
    )
    yield (
        "passwords are kept when `secret` runs again",
        lambda: (
            (
                engine.shell("service", "cat /secret/redis_url"),
                engine.podman("start", "--attach", container("secret")),
            )[0]
            == engine.shell("service", "cat /secret/redis_url")
        ),
    )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def stop(engine: Engine, services: dict[str, dict[str, Any]], running: list[str]) -> None:
    """The last first, as compose does; each has to end by itself within its grace."""
    for name in reversed(running):
        started = time.monotonic()
        grace = re.findall(r"\d+", services[name]["stop_grace_period"])[-1]
        engine.podman("stop", "--time", grace, container(name))
        code = engine.podman("inspect", "--format", "{{.State.ExitCode}}", container(name)).strip()
        if code not in ("0", "143"):
            raise Failed(f"{name} ended with {code}: {logs(engine, name)[-4000:]}")
        print(f"  {name:32} ended with {code} after {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Exit code 1: something does not work; 2: this machine lacks something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--volume", action="append", default=[], help="HOST:PATH:ro while building, such as certificates or a pip.conf"
    )
    parser.add_argument("--keep", action="store_true", help="leave images and containers where they are")
    options = parser.parse_args()
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        print(
            f"error: this needs root, and the packages above; missing: {', '.join(missing) or 'root'}", file=sys.stderr
        )
        return 2
    every = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    services = {name: service for name, service in every.items() if can_be_had(service) and name not in NO_GPU_HERE}
    engine = Engine(Path(os.environ.get("VAR_DIR") or ROOT / "var").absolute() / "image-check", services)
    failed = 0
    try:
        print("images of others, made of Debian's packages:")
        make_bases(engine, services)
        print("ours, each with what is below it:")
        build(engine, services, options.volume)
        print("containers:")
        running = start(engine, services)
        for what, holds in checks(engine, services, running):
            try:
                good = bool(holds())
                reason = ""
            except Failed as error:
                good, reason = False, f": {error}"
            failed += not good
            print(f"  {'ok  ' if good else 'FAIL'} {what}{reason}", flush=True)
        stop(engine, services, running)
        version = json.loads(engine.podman("version", "--format", "json"))["Client"]["Version"]
        print(f"podman {version}; not run: {', '.join(name for name in every if name not in services)}")
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            engine.remove()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
