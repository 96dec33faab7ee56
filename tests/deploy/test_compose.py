"""The compose files and the Dockerfile: the rules they keep, and each of their commands started as a process.

There need not be a container engine. What a container would see at its mounts lies in a temporary folder here, one for
each volume, and `redis:6379` is a port of the loopback; arguments, environment and health checks are the files' own.
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
from redis import Redis

from deploy.stack import find_redis
from service.settings import Settings as ServiceSettings
from tests.deploy.test_image import stages
from tests.stack import ROOT, free_port, stop, wait_for
from worker.settings import Settings as WorkerSettings
from worker.settings import TrainerSettings

pytest_plugins = ["tests.s3"]

FILES = ("docker-compose.yml", "deploy/compose/s3.yml")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / FILES[0]).read_text())
BUCKET: dict[str, Any] = yaml.safe_load((ROOT / FILES[1]).read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WITH_S3 = {name: service for name, service in BUCKET["services"].items() if name in ("s3", "bucket")}
ALL = {**SERVICES, **WITH_S3}
OURS = {
    "service": ServiceSettings,
    "courier": ServiceSettings,
    "worker": WorkerSettings,
    "worker-gpu": WorkerSettings,
    "trainer": TrainerSettings,
    "trainer-gpu": TrainerSettings,
}
ONE_SHOT = ("secret", "metrics-key", "bucket")
FIXED_REDIS = {"8.2": 9, "8.4": 6, "8.6": 6, "8.8": 2, "8.10": 1}
"""Per series, the first patch release without the known holes (CVE-2026-81934 is the last of them)."""


def image_environment(target: str) -> dict[str, str]:
    pairs = [word.split("=", 1) for line in stages()[target]["ENV"] for word in line.split()]
    return {name: value for name, value in pairs if name not in ("PATH", "HOME")}


def defaults(text: str) -> str:
    """Text as compose reads it where none of its variables is set."""
    return re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", text)


def megabytes(limit: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(m|mb|g)", defaults(limit)).groups()
    return int(number) * (1024 if unit == "g" else 1)


def seconds(period: str) -> int:
    return int(defaults(period).removesuffix("s"))


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container -> the volume's name, or a path of this tree."""
    pairs = [volume.split(":") for volume in service.get("volumes", [])]
    return {target: source for source, target, *_ in pairs}


def networks(service: dict[str, Any]) -> set[str]:
    return set(service.get("networks", ()))


# --- rules -----------------------------------------------------------------------------------------------------------


def check_schema(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_files_keep_to_the_schema_of_compose(tmp_path: Path) -> None:
    broken = {**COMPOSE, "services": {**SERVICES, "redis": {**SERVICES["redis"], "memory_limit": "1g"}}}
    (tmp_path / "broken.yml").write_text(yaml.safe_dump(broken))
    assert check_schema(*(ROOT / name for name in FILES)).returncode == 0
    refused = check_schema(tmp_path / "broken.yml")
    assert refused.returncode == 1 and "memory_limit" in refused.stdout


@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["alone", "with s3"])
def test_docker_accepts_the_files(files: tuple[str, ...]) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("there is no `docker compose` to ask")
    named = [word for name in files for word in ("-f", name)]
    subprocess.run([docker, "compose", *named, "--profile", "*", "config", "--quiet"], cwd=ROOT, check=True)


def test_every_name_that_is_used_is_declared() -> None:
    volumes, nets = {*COMPOSE["volumes"], *BUCKET["volumes"]}, {*COMPOSE["networks"], *BUCKET["networks"]}
    used: set[str] = set()
    for name, service in [*SERVICES.items(), *BUCKET["services"].items()]:
        whole = name in ALL and service is ALL[name]
        assert not whole or ("network_mode" in service) != bool(networks(service)), name
        assert networks(service) <= nets, name
        for source in mounts(service).values():
            assert (ROOT / source).exists() if source.startswith("./") else source in volumes, (name, source)
            used.add(source)
        for other, needed in service.get("depends_on", {}).items():
            assert other in ALL, name
            ends = needed["condition"] == "service_completed_successfully"
            assert ends == (other in ONE_SHOT) and (ends or health_check(other)), (name, other)
            assert set(ALL[other].get("profiles", [])) <= set(service.get("profiles", [])), (name, other)
        if "build" in service:
            assert service["build"]["target"] in stages(), name
            arguments = " ".join(stages()[f"build-{service['build']['target']}"].get("ARG", []))
            assert all(f"{argument}=" in arguments for argument in service["build"].get("args", {})), name
    assert volumes <= used


@pytest.mark.parametrize("name", ALL)
def test_no_container_may_more_than_it_needs(name: str) -> None:
    service = ALL[name]
    assert (service["init"], service["read_only"]) == (True, True)
    assert service["tmpfs"] == ["/tmp:mode=1777,size=512m"]
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert "privileged" not in service and "cap_add" not in service
    if "build" in service:
        assert stages()[service["build"]["target"]]["USER"] == ["10001"]
    assert service.get("user") == {"secret": "0:0", "redis": "redis", "s3": "10001:10001"}.get(name)


@pytest.mark.parametrize("name", ALL)
def test_each_has_limits(name: str) -> None:
    service = ALL[name]
    assert 64 <= megabytes(service["mem_limit"]) <= 64 * 1024
    assert 64 <= service["pids_limit"] <= 1024
    assert float(defaults(str(service["cpus"]))) in (0, 1), "more than there are, and Docker refuses to start it"
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}


def test_redis_refuses_before_it_is_killed() -> None:
    command = SERVICES["redis"]["command"]
    assert megabytes(command[command.index("--maxmemory") + 1]) <= megabytes(SERVICES["redis"]["mem_limit"]) / 2


@pytest.mark.parametrize("name", ALL)
def test_each_runs_again_says_whether_it_is_well_and_has_time_to_stop(name: str) -> None:
    service = ALL[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert health_check(name)
    grace = seconds(service["stop_grace_period"])
    drain = service.get("environment", {}).get("DRAIN_S")
    assert grace >= (seconds(drain) + 10 if drain else 45 if "trainer" in name else 20)


def test_what_is_reached_from_outside_is_reached_from_this_machine() -> None:
    ports = {name: [defaults(port) for port in service["ports"]] for name, service in ALL.items() if "ports" in service}
    assert ports == {
        "service": ["127.0.0.1:8000:8000"],
        "grafana": ["127.0.0.1:3000:3000"],
        "board": ["127.0.0.1:9181:9181"],
        "s3": ["127.0.0.1:9000:9000"],
    }
    declared = {**COMPOSE["networks"], **BUCKET["networks"]}
    assert {name for name, network in declared.items() if not network.get("internal")} == {"edge"}
    # A port is published by way of `edge`; the courier is reached by nobody, and reaches whoever wants to be told.
    assert {name for name, service in ALL.items() if "edge" in networks(service)} == {*ports, "courier"}


def test_only_those_who_need_redis_are_in_its_network() -> None:
    others = {"secret", "prometheus", "grafana", "s3", "bucket"}
    assert {name for name, service in ALL.items() if "internal" not in networks(service)} == others


def test_every_secret_is_mounted_by_its_owner_alone_and_to_be_read() -> None:
    """`metrics-key` makes the one of Prometheus."""
    of: dict[str, set[str]] = {}
    for name, service in ALL.items():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source.endswith("-secret") and name != "secret":
                of.setdefault(source, set()).add(name)
                assert (mode == ["ro"]) == (name != "metrics-key" or target == "/secret"), (name, volume)
    assert of == {
        "redis-secret": {"redis"},
        "service-secret": {"service", "courier", "metrics-key", "board", "bucket"},
        "worker-secret": {"worker", "worker-gpu", "trainer", "trainer-gpu"},
        "prometheus-secret": {"metrics-key", "prometheus"},
        "grafana-secret": {"grafana"},
        "s3-secret": {"s3"},
    }


def test_every_image_is_of_a_full_version() -> None:
    bases = [line.split()[0] for line in re.findall(r"(?m)^FROM (.*)", (ROOT / "Dockerfile").read_text())]
    outside = [base for base in bases if base not in stages()]
    outside += [service["image"] for service in ALL.values() if "build" not in service]
    assert len(set(outside)) == 5
    for image in outside:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-[a-z-]+)?(@sha256:[0-9a-f]{64})?", image), image


def test_redis_is_a_release_without_known_holes() -> None:
    assert SERVICES["secret"]["image"] == SERVICES["redis"]["image"]
    match = re.match(r"redis:(\d+\.\d+)\.(\d+)-alpine", SERVICES["redis"]["image"])
    assert match and int(match[2]) >= FIXED_REDIS[match[1]]


@pytest.mark.parametrize("name", OURS)
def test_each_setting_can_be_set_and_is_one(name: str) -> None:
    fixed = {
        "redis_url",
        "host",
        "port",
        "examples_dir",
        "engines",
        "students",
        "runs",
    }  # what the container knows best
    fields = set(OURS[name].model_fields)
    given = {key.lower() for key in SERVICES[name]["environment"]}
    others = {"otel_exporter_otlp_endpoint"}
    assert {key for key in given - fields - others if not key.startswith("aws_")} == set()
    assert fields - given - fixed == set()


def test_every_variable_is_told_in_the_example() -> None:
    told = set(re.findall(r"(?m)^#?([A-Z][A-Z0-9_]*)=", (ROOT / ".env.example").read_text()))
    for name in FILES:
        used = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / name).read_text()))
        assert used - told == set(), name


def test_the_gpu_worker_is_the_worker_with_another_torch_and_device() -> None:
    differ = {"profiles", "build", "image", "environment", "deploy", "mem_limit", "shm_size"}
    for name, device in {"worker": {"DEVICE": "cuda"}, "trainer": {}}.items():
        cpu, gpu = SERVICES[name], SERVICES[f"{name}-gpu"]
        assert {key: value for key, value in gpu.items() if key not in differ} == {
            key: value for key, value in cpu.items() if key not in differ
        }
        assert gpu["build"] == {**cpu["build"], "args": {"TORCH_INDEX_URL": "", "EXTRAS": "worker,s3,otel,gpu"}}
        assert gpu["environment"] == {**cpu["environment"], **device}
        devices = gpu["deploy"]["resources"]["reservations"]["devices"]
        assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_what_comes_when_asked_for() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {
        "worker-gpu": ["gpu"],
        "trainer": ["train"],
        "trainer-gpu": ["train-gpu"],
        **{name: ["monitoring"] for name in ("metrics-key", "prometheus", "grafana")},
        "board": ["board"],
    }


def test_the_bucket_is_everybodys_who_has_to_do_with_files() -> None:
    for name in ("service", "worker", "worker-gpu", "trainer", "trainer-gpu"):
        changed = BUCKET["services"][name]
        assert changed["environment"] == WITH_S3["bucket"]["environment"]
        assert networks(changed) == {"store"} and "bucket" in changed["depends_on"]
        # A null of the first file, handed through, would go before the credentials in the volume.
        handed = {key for key in SERVICES[name]["environment"] if key.startswith("AWS_")}
        assert handed <= set(changed["environment"])
    common = {key: value for key, value in COMPOSE["x-common"].items() if key != "restart"}
    assert BUCKET["x-common"] == common


# --- each command as a process ---------------------------------------------------------------------------------------


def health_check(name: str) -> list[str]:
    """The command that says whether a container is well: compose's, else the image's."""
    service = ALL[name]
    if "healthcheck" in service:
        kind, *words = service["healthcheck"]["test"]
        assert kind in ("CMD", "CMD-SHELL")
        return words if kind == "CMD" else ["sh", "-c", *words]
    if "build" not in service:
        return []
    _, _, command = stages()[service["build"]["target"]].get("HEALTHCHECK", ["  []"])[-1].partition("CMD ")
    return list(json.loads(command or "[]"))


class Containers:
    """Starts compose's services one by one as processes of this machine."""

    def __init__(self, folder: Path, *, with_s3: bool = False) -> None:
        self.folder = folder
        self.ports = {port: free_port() for port in ("6379", "8000", "9000", "9090", "9181")}
        self.with_s3 = with_s3
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "bin").mkdir()
        server = Path(find_redis())
        (folder / "bin" / "redis-server").symlink_to(server)
        (folder / "bin" / "redis-cli").symlink_to(server.with_name(server.name.replace("-server", "-cli")))

    def url(self, port: str = "8000") -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    def volume(self, name: str) -> Path:
        """A named volume is a folder here; a file or folder of this tree has a copy."""
        place = self.folder / "tree" / name if name.startswith("./") else self.folder / "volumes" / name
        (place.parent if name.startswith("./") else place).mkdir(parents=True, exist_ok=True)
        return place

    def lay(self, name: str) -> None:
        """Copy what a service mounts of this tree, with the mounts and addresses in it as they are here."""
        for source in mounts(ALL[name]).values():
            if source.startswith("./"):
                whole, copy = ROOT / source, self.volume(source)
                for file in [whole] if whole.is_file() else [file for file in whole.rglob("*") if file.is_file()]:
                    target = copy / file.relative_to(whole) if whole.is_dir() else copy
                    target.parent.mkdir(parents=True, exist_ok=True)
                    text = self.translate(name, file.read_text())
                    target.write_text(text.replace("_interval: 15s", "_interval: 1s"))  # no test waits for Prometheus

    def mounts(self, name: str) -> dict[str, Path]:
        found = mounts(ALL[name])
        if self.with_s3:
            found |= mounts(BUCKET["services"].get(name, {}))
        return {target: self.volume(source) for target, source in found.items()}

    def translate(self, name: str, text: str) -> str:
        """What a container sees, as it is here."""
        text = defaults(defaults(text)).replace("$$", "$")
        for port, here in self.ports.items():
            text = re.sub(rf"\b(redis|service|s3\.localhost|127\.0\.0\.1):{port}\b", f"127.0.0.1:{here}", text)
            text = re.sub(
                rf"(--port ){port}\b|(, ){port}\b", lambda found, here=here: f"{found[1] or found[2]}{here}", text
            )
        text = text.replace("redis-cli", f"redis-cli -p {self.ports['6379']}")
        for target, place in sorted(self.mounts(name).items(), reverse=True):
            text = re.sub(rf"(?<![\w./]){re.escape(target)}\b", str(place), text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """The image's, then compose's; a key without a value is handed through when it is set, which it is not here."""
        service = ALL[name]
        values = image_environment(service["build"]["target"]) if "build" in service else {}
        given = {**service.get("environment", {})}
        if self.with_s3:
            given |= BUCKET["services"].get(name, {}).get("environment", {})
        values |= {key: value for key, value in given.items() if value is not None}
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        # AUTH: a container listens on more than the loopback.
        here = {
            "PATH": path,
            "HOME": str(self.folder),
            "HOST": "127.0.0.1",
            "PORT": str(self.ports["8000"]),
            "AUTH": "on",
        }
        return {key: self.translate(name, value) for key, value in values.items()} | here

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Run a service's own command."""
        service = ALL[name]
        self.lay(name)
        command = [self.translate(name, word) for word in [*service.get("entrypoint", []), *service["command"]]]
        more = {
            "redis": ["--port", str(self.ports["6379"]), "--bind", "127.0.0.1"],
            "prometheus": [f"--web.listen-address=127.0.0.1:{self.ports['9090']}"],
        }
        command = (["prometheus"] if name == "prometheus" else []) + command + more.get(name, [])
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment(name), stdout=log, stderr=log)
        self.processes[name] = process
        return process

    def run(self, name: str) -> None:
        """Run one that ends, to its end."""
        assert self.start(name).wait(60) == 0, self.log(name)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def is_healthy(self, name: str) -> bool:
        """Ask as Docker would."""
        assert self.processes[name].poll() is None, self.log(name)
        command = [self.translate(name, word) for word in health_check(name)]
        asked = subprocess.run(command, cwd=ROOT, env=self.environment(name), capture_output=True, timeout=30)
        return asked.returncode == 0

    def start_well(self, *names: str) -> None:
        """Start them together, and wait until each is healthy by its own check."""
        for name in names:
            self.start(name)
        for name in names:
            wait_for(lambda name=name: self.is_healthy(name), 120, name)

    def stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            stop(process)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """All of them, started in the order that compose would."""
    started = Containers(tmp_path_factory.mktemp("compose"))
    try:
        started.run("secret")
        started.start_well("redis")
        started.start_well("service", "courier", "worker", "trainer", "board")
        started.run("metrics-key")
        yield started
    finally:
        started.stop()


def test_every_command_becomes_healthy_and_the_stack_ready(containers: Containers) -> None:
    assert all(containers.is_healthy(name) for name in ("redis", "service", "courier", "worker", "trainer", "board"))
    assert httpx.get(f"{containers.url()}/readyz").json()["status"] == "ready"


def test_passwords_are_made_once_and_kept_apart(containers: Containers) -> None:
    def read() -> dict[str, str]:
        root = containers.folder / "volumes"
        files = [file for folder in root.glob("*-secret") for file in folder.iterdir()]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o644}  # whoever the owner of the volume runs as
        return {str(file.relative_to(root)): file.read_text() for file in files}

    before = read()
    assert sorted(before) == [
        "grafana-secret/password",
        "prometheus-secret/metrics_key",
        "redis-secret/admin_password",
        "redis-secret/users.acl",
        "service-secret/redis_password",
        "service-secret/redis_url",
        "worker-secret/redis_password",
        "worker-secret/redis_url",
    ]
    address = f"127.0.0.1:{containers.ports['6379']}/0"
    for user in ("service", "worker"):
        password = before[f"{user}-secret/redis_password"].strip()
        assert re.fullmatch(r"[0-9a-f]{64}", password) and sum(password in text for text in before.values()) == 2
        assert before[f"{user}-secret/redis_url"] == f"redis://{user}:{password}@{address}\n"
    assert "@" not in re.sub(r"[-+]@\w+", "", before["redis-secret/users.acl"]), "a placeholder is left"
    containers.run("secret")
    containers.run("metrics-key")
    assert read() == before


def test_the_board_shows_workers_and_queues(containers: Containers) -> None:
    for page in ("queues", "workers"):
        assert httpx.get(f"{containers.url('9181')}/0/data/{page}.json").status_code == 200, page
    workers = httpx.get(f"{containers.url('9181')}/0/data/workers.json").json()["workers"]
    assert {worker["name"].split("-")[0] for worker in workers} == {"trainer", "worker"}


def test_redis_knows_its_users_and_forgets_nothing(containers: Containers) -> None:
    def redis(user: str | None, password: str | None) -> Redis:
        return Redis(port=containers.ports["6379"], username=user, password=password, decode_responses=True, protocol=2)

    assert "Authentication required" in refused(redis(None, None).ping)
    secrets = containers.folder / "volumes"
    admin = redis("admin", (secrets / "redis-secret" / "admin_password").read_text().strip())
    for name, value in {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "maxmemory": str(512 * 2**20),
        "dir": str(secrets / "redis"),
    }.items():
        assert admin.config_get(name) == {name: value}
    for user in ("service", "worker"):
        with Redis.from_url(
            (secrets / f"{user}-secret" / "redis_url").read_text().strip(), decode_responses=True
        ) as own:
            assert own.ping() and "no permissions" in refused(own.flushall)
    # redis-py tells its version with a command that only newer servers have, and takes no for an answer.
    assert {entry["object"] for entry in admin.acl_log()} <= {"flushall", "client"}, "nobody was refused anything else"


def refused(call: Any) -> str:
    with pytest.raises(Exception) as caught:
        call()
    return str(caught.value)


def test_the_first_key_is_for_everything_and_prometheus_has_one_for_metrics(containers: Containers) -> None:
    [first] = re.findall(r"fl_\w{8}_\S+", containers.log("service"))
    metrics = (containers.folder / "volumes" / "prometheus-secret" / "metrics_key").read_text().strip()
    statuses = {
        (path, key): httpx.get(f"{containers.url()}{path}", headers={"X-API-Key": key}).status_code
        for path in ("/metrics", "/admin/workers")
        for key in (first, metrics)
    }
    assert list(statuses.values()) == [200, 200, 200, 403]


def test_a_key_that_redis_has_lost_is_made_anew(containers: Containers) -> None:
    file = containers.folder / "volumes" / "prometheus-secret" / "metrics_key"
    before = file.read_text()
    environment = {**containers.environment("service")}
    environment["REDIS_URL"] = (containers.folder / "volumes" / "service-secret" / "redis_url").read_text().strip()
    revoke = [sys.executable, "-m", "service", "keys", "revoke", before.split("_")[1]]
    subprocess.run(revoke, cwd=ROOT, env=environment, check=True, capture_output=True)
    containers.run("metrics-key")
    assert file.read_text() != before


def test_prometheus_reads_the_metrics(containers: Containers) -> None:
    if not shutil.which("prometheus") or not shutil.which("wget"):
        pytest.skip("needs the packages prometheus and wget")
    containers.start_well("prometheus")

    def up() -> bool:
        found = httpx.get(f"{containers.url('9090')}/api/v1/targets").json()["data"]["activeTargets"]
        return [target["health"] for target in found] == ["up"]

    wait_for(up, 40, "a scrape")
    rules = httpx.get(f"{containers.url('9090')}/api/v1/rules").json()["data"]["groups"]
    assert rules and all(rule["health"] != "err" for group in rules for rule in group["rules"])


def test_the_bucket_is_made_and_tried(s3_server: Any, tmp_path: Path) -> None:
    """With moto for the store: its own command is the only one here that never runs."""
    containers = Containers(tmp_path, with_s3=True)
    containers.ports["9000"] = s3_server.port
    containers.run("secret")
    secret = (tmp_path / "volumes" / "s3-secret" / "secret_key").read_text().strip()
    for user in ("service", "worker"):
        told = (tmp_path / "volumes" / f"{user}-secret" / "s3_credentials").read_text()
        assert told == f"[default]\naws_access_key_id = fastlightgen\naws_secret_access_key = {secret}\n"
    containers.run("bucket")
    containers.run("bucket")
    assert "fastlightgen" in [bucket["Name"] for bucket in s3_server.client().list_buckets()["Buckets"]]
    told = WITH_S3["s3"]["command"][0]
    assert "ROOT_ACCESS_KEY=fastlightgen" in told and "/secret/secret_key" in told


def test_every_command_ends_on_sigterm(containers: Containers) -> None:
    for name in ("service", "courier", "board", "trainer", "worker", "redis"):
        process = containers.processes[name]
        process.send_signal(signal.SIGTERM)
        assert process.wait(seconds(ALL[name]["stop_grace_period"])) in (0, -signal.SIGTERM), name
