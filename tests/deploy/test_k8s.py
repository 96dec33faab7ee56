"""deploy/k8s: each overlay is built by kustomize, every object checked against Kubernetes' own schemas, and then the
rules that no schema knows. Last, what its pods would run is started as processes.

There is no cluster. kubectl (a wheel has it) builds without one; the schemas of Kubernetes come with
`kubernetes-validate`, those of the custom resources lie in crds/, cut to what is used and without descriptions.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from torch.distributed.run import get_args_parser

from deploy.k8s.prometheus_rules import RULES, rules
from deploy.stack import find_redis
from distill import distributed, recipes
from distill.config import ConfigError, override
from distill.distributed import World
from service.settings import Settings as ServiceSettings
from tests.deploy.test_compose import SERVICES, image_environment, stages
from tests.stack import ROOT, Stack, free_port, stop, wait_for
from worker.contract import WORKERS_KEY, Heartbeat, WorkerState, worker_key
from worker.metrics import METRICS
from worker.records import connect, now
from worker.settings import Settings as WorkerSettings
from worker.settings import TrainerSettings

K8S = ROOT / "deploy" / "k8s"
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
CRDS = {
    schema["properties"]["kind"]["const"]: jsonschema.Draft202012Validator(schema)
    for schema in (json.loads(file.read_text()) for file in (Path(__file__).parent / "crds").glob("*.json"))
}
COMPONENT = "app.kubernetes.io/component"
BY_HAND = {"metrics-key": {"key"}, "s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}}
"""Secrets that docs/kubernetes.md has made with a command, and their keys."""

Object = dict[str, Any]


def kubectl() -> str:
    found = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not found:
        pytest.skip("there is no kubectl for this machine; its wheel is for Linux on x86-64")
    return found


@cache
def build(folder: Path) -> tuple[Object, ...]:
    """What `kubectl apply -k` would send."""
    built = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    return build(K8S / "overlays" / name)


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def named(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    [found] = [found for found in of_kind(objects, kind) if found["metadata"]["name"] == name]
    return found


def workloads(objects: tuple[Object, ...]) -> dict[str, Object]:
    """By name, which is also their component."""
    return {found["metadata"]["name"]: found for found in of_kind(objects, "Deployment", "StatefulSet")}


def pod_of(workload: Object) -> Object:
    return dict(workload["spec"]["template"]["spec"])


def container_of(workload: Object) -> Object:
    [container] = pod_of(workload)["containers"]
    return dict(container)


def problems(found: Object, version: str) -> list[str]:
    """What Kubernetes, or the custom resource's own schema, has against an object; unknown fields included."""
    if found["kind"] in CRDS:
        return [f"{error.json_path}: {error.message}" for error in CRDS[found["kind"]].iter_errors(found)]
    try:
        kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{list(error.path)}: {error.message}"]
    return []


# --- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str) -> None:
    everything = {json.dumps(found, sort_keys=True) for name in OVERLAYS for found in overlay(name)}
    for found in map(json.loads, sorted(everything)):
        assert not problems(found, version), (found["kind"], found["metadata"]["name"])


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinessprobe"), {}),
        ("Deployment", ("spec", "replicas"), "two"),
        ("NetworkPolicy", ("spec", "egres"), []),
        ("ScaledObject", ("spec", "advanced", "horizontalPodAutoscalerConfig", "behaviour"), {}),
        ("ScaledObject", ("spec", "fallback", "behavior"), "as it is"),
        ("ScrapeConfig", ("spec", "staticConfigs", 0, "target"), ["a:1"]),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "expression"), "up"),
        ("HTTPRoute", ("spec", "rules", 0, "timeouts", "idle"), "1s"),
    ],
)
def test_what_is_wrong_would_be_seen(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    found = json.loads(json.dumps(of_kind(overlay("s3"), kind)[0]))
    assert not problems(found, VERSIONS[-1])
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert problems(found, VERSIONS[-1])


@pytest.mark.parametrize("name", COMPONENTS)
def test_each_component_goes_with_the_base_alone(name: str, tmp_path: Path) -> None:
    def path(*parts: str) -> str:
        return os.path.relpath(K8S.joinpath(*parts), tmp_path.resolve())

    kustomization = {"resources": [path("base")], "components": [path("components", name)]}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization))
    built = build(tmp_path)
    assert built != build(K8S / "base"), "it changes nothing"
    for found in built:
        assert not problems(found, VERSIONS[-1]), found["kind"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_in_the_namespace_and_no_name_comes_twice(name: str) -> None:
    objects = overlay(name)
    assert len({(found["kind"], found["metadata"]["name"]) for found in objects}) == len(objects)
    for found in objects:
        space = found["metadata"]["name"] if found["kind"] == "Namespace" else found["metadata"]["namespace"]
        assert space == "fastlightgen", found


# --- what refers to what ---------------------------------------------------------------------------------------------


def variables(workload: Object, objects: tuple[Object, ...]) -> dict[str, str]:
    """A container's environment as far as the manifests say it; `?` stands for a secret's value."""
    container = container_of(workload)
    values: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            values |= named(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container["env"]:
        if "resourceFieldRef" in entry.get("valueFrom", {}):
            assert entry["valueFrom"]["resourceFieldRef"] == {"resource": "limits.cpu"}
            values[entry["name"]] = container["resources"]["limits"]["cpu"]
        else:
            values[entry["name"]] = entry.get("value", "?")
    return values


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_variable_is_a_setting(name: str) -> None:
    objects = overlay(name)
    settings = {
        "service": ServiceSettings,
        "courier": ServiceSettings,
        "worker": WorkerSettings,
        "trainer": TrainerSettings,
    }
    foreign = {"AWS_DEFAULT_REGION", "OMP_NUM_THREADS"}
    for component, workload in workloads(objects).items():
        if component == "redis":
            continue
        values = variables(workload, objects)
        known = {field.upper() for field in settings[component].model_fields} | foreign
        assert set(values) <= known, component
        assert values["STORAGE_URL"] and values["REDIS_URL"] == "?"
    for program, kind in {"service": ServiceSettings, "worker": WorkerSettings}.items():
        values = {key.lower(): text for key, text in variables(workloads(objects)[program], objects).items()}
        kind.model_validate({**values, "redis_url": "redis://redis:6379/0", "host": "0.0.0.0"})


def secrets_of(objects: tuple[Object, ...]) -> Iterator[tuple[str, str]]:
    """Every key of every Secret that something here reads."""
    for workload in workloads(objects).values():
        for entry in container_of(workload).get("env", []):
            if reference := entry.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"]
        for volume in pod_of(workload)["volumes"]:
            for item in volume.get("secret", {}).get("items", []):
                yield volume["secret"]["secretName"], item["key"]
    for found in of_kind(objects, "TriggerAuthentication"):
        for target in found["spec"]["secretTargetRef"]:
            yield target["name"], target["key"]
    for found in of_kind(objects, "ScrapeConfig"):
        credentials = found["spec"]["authorization"]["credentials"]
        yield credentials["name"], credentials["key"]


@pytest.fixture(scope="module")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deploy/k8s/secrets as docs/kubernetes.md has it filled."""
    folder = tmp_path_factory.mktemp("secrets") / "deploy"
    shutil.copytree(ROOT / "deploy", folder)
    command = [sys.executable, folder / "redis" / "users.py", folder / "k8s" / "secrets", "--redis", "redis:6379"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "k8s" / "secrets"


@pytest.fixture(scope="module")
def secrets(secrets_folder: Path) -> dict[str, dict[str, str]]:
    """The Secrets that this makes: name -> key -> text."""
    objects = build(secrets_folder)
    for found in objects:
        assert not problems(found, VERSIONS[-1])
    assert named(objects, "Namespace", "fastlightgen") == named(overlay("cpu"), "Namespace", "fastlightgen")
    return {
        found["metadata"]["name"]: {key: base64.b64decode(text).decode() for key, text in found["data"].items()}
        for found in of_kind(objects, "Secret")
    }


def test_git_takes_no_secret(secrets_folder: Path) -> None:
    made = {file.name for file in secrets_folder.iterdir()} - {"kustomization.yaml", ".gitignore"}
    assert made == {"users.acl", "service.url", "worker.url", "admin.url"}
    assert (secrets_folder / ".gitignore").read_text().splitlines() == ["*", "!.gitignore", "!kustomization.yaml"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_name_that_is_used_is_there(name: str, secrets: dict[str, dict[str, str]]) -> None:
    objects = overlay(name)
    assert not of_kind(objects, "Secret"), "nothing secret is in git"
    known = {secret: set(values) for secret, values in secrets.items()} | BY_HAND
    for secret, key in secrets_of(objects):
        assert key in known[secret], (secret, key)
    for component, workload in workloads(objects).items():
        pod = pod_of(workload)
        named(objects, "ServiceAccount", pod["serviceAccountName"])
        for source in container_of(workload).get("envFrom", []):
            if "secretRef" in source:  # the bucket's: absent where a role gives the credentials
                assert source["secretRef"] == {"name": "s3", "optional": True}
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod["volumes"]} | claims
        mounts = {mount["name"]: mount["mountPath"] for mount in container_of(workload)["volumeMounts"]}
        assert volumes == set(mounts), component
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                named(objects, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            elif "configMap" in volume:
                assert named(objects, "ConfigMap", volume["configMap"]["name"])["data"]
    mounted = {component for component, one in workloads(objects).items() if "/storage" in str(container_of(one))}
    url = variables(workloads(objects)["worker"], objects)["STORAGE_URL"]
    files = {"service", "worker", "trainer"} & set(workloads(objects))
    assert mounted == (set() if url.startswith("s3://") else files)


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_find_what_they_mean(name: str) -> None:
    objects = overlay(name)
    labels = {component: one["spec"]["template"]["metadata"]["labels"] for component, one in workloads(objects).items()}
    assert all(found[COMPONENT] == component for component, found in labels.items())
    for component, workload in workloads(objects).items():
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels[component].items()
    for found in of_kind(objects, "Service", "PodDisruptionBudget"):
        selector = found["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        chosen = [component for component, given in labels.items() if wanted.items() <= given.items()]
        assert chosen == [found["metadata"]["name"]]
        ports = {port["name"] for port in container_of(workloads(objects)[chosen[0]]).get("ports", [])}
        assert {port["targetPort"] for port in found["spec"].get("ports", [])} <= ports
    for found in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        workload = workloads(objects)[found["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in workload["spec"], "each apply would undo what the scaler did"
    for found in of_kind(objects, "HTTPRoute"):
        [backend] = found["spec"]["rules"][0]["backendRefs"]
        service = named(objects, "Service", backend["name"])
        assert backend["port"] in [port["port"] for port in service["spec"]["ports"]]


# --- what a pod may, and how long it has -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_pod_may_more_than_it_needs(name: str) -> None:
    objects = overlay(name)
    assert named(objects, "Namespace", "fastlightgen")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == (
        "restricted"
    )
    for component, workload in workloads(objects).items():
        pod, container = pod_of(workload), container_of(workload)
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        assert named(objects, "ServiceAccount", component)["automountServiceAccountToken"] is False
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert security["runAsUser"] == (999 if component == "redis" else 10001)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        # A process 1 that is ours could not be killed by its own pacemaker, and would have to reap children.
        assert component == "redis" or pod["shareProcessNamespace"] is True


def grace_in_compose_s(component: str) -> int:
    """With the default, where it can be set."""
    return int(re.findall(r"(\d+)s", SERVICES[component]["stop_grace_period"])[0])


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_pod_has_the_time_that_its_end_takes(name: str) -> None:
    objects = overlay(name)
    for component, workload in workloads(objects).items():
        grace_s = pod_of(workload)["terminationGracePeriodSeconds"]
        assert grace_s >= grace_in_compose_s(component)
        before = container_of(workload).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if component == "service":
            program, pause = before
            answering = re.findall(r"timeout_graceful_shutdown=(\d+)", (ROOT / "service" / "__main__.py").read_text())
            assert program == "sleep" and int(pause) + sum(map(int, answering)) + 10 <= grace_s
        else:
            assert not before, "nobody sends anything to the others"
        if component == "worker":
            assert int(variables(workload, objects)["DRAIN_S"]) + 10 <= grace_s


def test_a_rolling_update_never_waits_for_a_gpu_that_is_taken() -> None:
    for name in OVERLAYS:
        worker = workloads(overlay(name))["worker"]
        update = worker["spec"]["strategy"]["rollingUpdate"]
        is_gpu = "nvidia.com/gpu" in container_of(worker)["resources"]["limits"]
        assert update == ({"maxSurge": 0, "maxUnavailable": 1} if is_gpu else {"maxSurge": 1, "maxUnavailable": 0})
        assert is_gpu == (variables(worker, overlay(name))["DEVICE"] == "cuda")
        assert is_gpu == ("fastlightgen-worker-gpu" in container_of(worker)["image"])
        probe = container_of(worker)["startupProbe"]
        assert worker["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


# --- who reaches whom ------------------------------------------------------------------------------------------------

OUTSIDE: dict[str, Any] = {
    "names": ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}),
    "keda": ({"kubernetes.io/metadata.name": "keda"}, {"app": "keda-operator"}),
    "prometheus": ({"kubernetes.io/metadata.name": "monitoring"}, {"app.kubernetes.io/name": "prometheus"}),
    "grafana": ({"kubernetes.io/metadata.name": "monitoring"}, {"app.kubernetes.io/name": "grafana"}),
    "gateway": ({"kubernetes.io/metadata.name": "gateway"}, {"app": "envoy"}),
    "stranger": ({"kubernetes.io/metadata.name": "default"}, {COMPONENT: "service"}),
    "world": ipaddress.ip_address("8.8.8.8"),
    "world6": ipaddress.ip_address("2606:4700::1111"),
    "private": ipaddress.ip_address("10.1.2.3"),
    "private6": ipaddress.ip_address("fd00::1"),
    "cloud": ipaddress.ip_address("169.254.169.254"),  # where a cloud hands out credentials
}
"""Pods of other namespaces (the namespace's labels, the pod's) and addresses."""
PORTS = (("UDP", 53), ("TCP", 53), ("TCP", 80), ("TCP", 443), ("TCP", 6379), ("TCP", 8000), ("TCP", 26379))


def matches(selector: Object, labels: dict[str, str]) -> bool:
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def peer_matches(peer: Object, other: Any) -> bool:
    """Whether a rule's peer means ``other``: an address, or labels of a namespace and of a pod in it."""
    if "ipBlock" in peer:
        if isinstance(other, tuple):
            return False  # pods are not to be named by address
        block = peer["ipBlock"]
        networks = [ipaddress.ip_network(text) for text in [block["cidr"], *block.get("except", [])]]
        inside = [other.version == network.version and other in network for network in networks]
        return inside[0] and not any(inside[1:])
    if not isinstance(other, tuple):
        return False
    space, labels = other
    ours = {"kubernetes.io/metadata.name": "fastlightgen"}
    is_space = matches(peer["namespaceSelector"], space) if "namespaceSelector" in peer else space == ours
    return is_space and matches(peer.get("podSelector", {}), labels)


def lets(policies: list[Object], direction: str, labels: dict[str, str], other: Any, port: tuple[str, int]) -> bool:
    """Whether a pod of ours with these labels may have this traffic."""
    mine = [
        policy["spec"]
        for policy in policies
        if matches(policy["spec"]["podSelector"], labels) and direction in policy["spec"]["policyTypes"]
    ]
    side = "from" if direction == "Ingress" else "to"
    return not mine or any(
        any(peer_matches(peer, other) for peer in rule[side])
        and port in [(entry["protocol"], entry["port"]) for entry in rule["ports"]]
        for spec in mine
        for rule in spec.get(direction.lower(), [])
    )


def reachable(objects: tuple[Object, ...]) -> set[str]:
    """`who -> whom port` of everything that gets through."""
    policies = of_kind(objects, "NetworkPolicy")
    space = {"kubernetes.io/metadata.name": "fastlightgen"}
    ours = {
        component: (space, one["spec"]["template"]["metadata"]["labels"])
        for component, one in workloads(objects).items()
    }
    everybody = {**ours, **OUTSIDE}
    found = set()
    for who, whom in ((who, whom) for who in everybody for whom in everybody if who != whom):
        for port in PORTS:
            out = who not in ours or lets(policies, "Egress", ours[who][1], everybody[whom], port)
            into = whom not in ours or lets(policies, "Ingress", ours[whom][1], everybody[who], port)
            if out and into and (who in ours or whom in ours):
                found.add(f"{who} -> {whom} {port[0]} {port[1]}")
    return found


def expected(*lines: str) -> set[str]:
    """Written short: `service, worker -> redis TCP 6379`."""
    found = set()
    for line in lines:
        who, whom, port = re.fullmatch(r"(.+) -> (.+) (\w+ \d+)", line).groups()  # type: ignore[union-attr]
        found |= {f"{one} -> {other} {port}" for one in who.split(", ") for other in whom.split(", ")}
    return found


IN_CLUSTER = (
    "service, courier, worker, redis -> names UDP 53",
    "service, courier, worker, redis -> names TCP 53",
    "service, courier, worker -> redis TCP 6379",
    "courier -> world, world6 TCP 443",
)
REACHABLE = {
    "cpu": expected(*IN_CLUSTER),
    "gpu": expected(*IN_CLUSTER, "keda -> service TCP 8000"),
    "s3": expected(
        "service, courier, worker, trainer -> names UDP 53",
        "service, courier, worker, trainer -> names TCP 53",
        "service, courier, worker, trainer -> private TCP 6379",
        "service, courier, worker, trainer -> private TCP 26379",
        "courier -> world, world6 TCP 443",
        "service, worker, trainer -> world, world6, private, private6 TCP 443",
        "keda, prometheus, gateway -> service TCP 8000",
    ),
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_who_reaches_whom(name: str) -> None:
    assert reachable(overlay(name)) == REACHABLE[name]


def test_without_the_rule_of_all_everybody_would_be_let_in() -> None:
    objects = tuple(found for found in overlay("cpu") if found["metadata"]["name"] != "nobody")
    assert "stranger -> service TCP 8000" in reachable(objects)


# --- scaling and monitoring ------------------------------------------------------------------------------------------


def triggers() -> list[dict[str, str]]:
    scaled = named(overlay("gpu"), "ScaledObject", "worker")
    return [trigger["metadata"] for trigger in scaled["spec"]["triggers"]]


def test_keda_asks_the_service(stack: Stack) -> None:
    service = named(overlay("gpu"), "Service", "service")
    text = httpx.get(f"{stack.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for trigger in triggers():
        assert trigger["url"] == f"http://service.fastlightgen.svc:{service['spec']['ports'][0]['port']}/metrics"
        name, labels = re.fullmatch(r'(\w+)(?:\{queue="(\w+)"\})?', trigger["valueLocation"]).groups()  # type: ignore[union-attr]
        assert METRICS[name.removeprefix("flg_")].labels == (("queue",) if labels else ())
        found = [sample for sample in families[name].samples if sample.labels.get("queue") == labels]
        assert len(found) == 1, "KEDA takes the first that fits"
        assert float(trigger["targetValue"]) > 0


def test_workers_come_before_requests_are_refused_and_go_slowly() -> None:
    spec = named(overlay("gpu"), "ScaledObject", "worker")["spec"]
    assert spec["minReplicaCount"] >= 1, "a student that is promoted is tried by workers"
    backlog, waiting = (float(trigger["targetValue"]) for trigger in triggers())
    assert backlog < ServiceSettings().max_wait_s
    assert waiting * spec["maxReplicaCount"] < ServiceSettings().max_queued
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] > behavior["scaleUp"]["stabilizationWindowSeconds"]


def test_the_alerts_are_those_of_prometheus() -> None:
    assert yaml.safe_load(RULES.read_text()) == rules(), "run `python deploy/k8s/prometheus_rules.py`"


def test_prometheus_scrapes_one_address_under_the_name_that_the_alerts_know() -> None:
    spec = named(overlay("s3"), "ScrapeConfig", "fastlightgen")["spec"]
    example = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert spec["jobName"] == example["job_name"]
    [targets] = spec["staticConfigs"]
    assert targets == {"targets": ["service.fastlightgen.svc:8000"]}


def test_the_dashboards_are_grafanas() -> None:
    found = named(overlay("s3"), "ConfigMap", "grafana-dashboards")
    files = (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")
    assert found["data"] == {file.name: file.read_text() for file in files}
    assert len(json.dumps(found)) < 2**18, "`kubectl apply` keeps a copy in an annotation, which holds no more"


# --- as docker-compose.yml has it ------------------------------------------------------------------------------------


def script_of(health: list[str]) -> str:
    """The Python that compose's health check runs, its words apart."""
    [script] = re.findall(r'python -c "(.+)"', " ".join(health[-1].split()))
    return str(script)


def test_it_is_the_stack_of_docker_compose() -> None:
    found = workloads(overlay("s3"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    same = {"service": "service", "courier": "courier", "worker": "worker-gpu", "trainer": "trainer"}
    for component, service in same.items():
        container = container_of(found[component])
        assert container["image"] == f"{SERVICES[service]['image']}:{version}"
        command = " ".join(container.get("command") or image_command(component))
        assert SERVICES[service]["command"][-1].endswith(f"exec {command}")
    for component in ("courier", "trainer"):
        program, flag, script = container_of(found[component])["readinessProbe"]["exec"]["command"]
        assert (program, flag, script) == ("python", "-c", script_of(SERVICES[component]["healthcheck"]["test"]))
    probe = container_of(found["worker"])["readinessProbe"]["exec"]["command"]
    assert SERVICES["worker"]["healthcheck"]["test"][-1].endswith(" ".join(probe))
    assert variables(found["worker"], overlay("s3"))["MODEL"] in SERVICES["worker"]["environment"]["MODEL"]


def test_redis_is_that_of_docker_compose() -> None:
    redis = workloads(overlay("cpu"))["redis"]
    assert container_of(redis)["image"] == SERVICES["redis"]["image"]
    words = SERVICES["redis"]["command"]
    flags = {word.removeprefix("--"): words[index + 1] for index, word in enumerate(words) if word.startswith("--")}
    lines = [line for line in redis_conf(overlay("cpu")).splitlines() if not line.startswith("#")]
    directives = {name: value.strip('"') for name, _, value in (line.partition(" ") for line in lines)}
    assert set(directives) == set(flags)
    differ = {"aclfile", "maxmemory"}
    assert {name: directives[name] for name in set(flags) - differ} == {
        name: flags[name] for name in set(flags) - differ
    }


def redis_conf(objects: tuple[Object, ...]) -> str:
    [text] = [one["data"]["redis.conf"] for one in of_kind(objects, "ConfigMap") if "redis.conf" in one["data"]]
    return str(text)


def image_command(target: str) -> list[str]:
    return list(json.loads(stages()[target]["CMD"][-1]))


# --- a training on several machines ---------------------------------------------------------------------------------


def test_the_training_job_starts_what_torchrun_and_distill_know() -> None:
    found = list(yaml.safe_load_all((K8S / "components" / "training-job" / "job.yaml").read_text()))
    [job], [service] = ([one for one in found if one["kind"] == kind] for kind in ("Job", "Service"))
    pod, spec = job["spec"]["template"]["spec"], job["spec"]
    [container] = pod["containers"]
    assert container["command"][0] == "torchrun"
    options = get_args_parser().parse_args([*container["command"][1:], *container["args"]])
    assert options.nnodes == str(spec["completions"]) == str(spec["parallelism"])
    assert options.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert pod["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert options.rdzv_endpoint == f"{job['metadata']['name']}-0.{pod['subdomain']}:{port}"
    assert (options.module, options.training_script, options.training_script_args[0]) == (True, "distill", "run")
    recipe = recipes.load(options.training_script_args[1], [])
    processes = int(options.nnodes) * int(options.nproc_per_node)
    with pytest.raises(ConfigError, match=r"pruning\.fit\.batch=16 and pruning\.fit\.accumulate=1"):
        distributed.check(recipe, World(0, processes))
    distributed.check(override(recipe, options.training_script_args[4::2]), World(0, processes))


# --- docs/kubernetes.md ----------------------------------------------------------------------------------------------

DOC = (ROOT / "docs" / "kubernetes.md").read_text()


def test_the_docs_name_each_overlays_components_and_each_object() -> None:
    for name in OVERLAYS:
        [row] = re.findall(rf"^\| `{name}` \|.*\| base, (.+) \|$", DOC, re.MULTILINE)
        used = yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text())["components"]
        assert set(re.findall(r"`([\w-]+)`", row)) == {Path(path).name for path in used}
    everything = {f"{one['kind'].lower()}/{one['metadata']['name']}" for name in OVERLAYS for one in overlay(name)}
    assert set(re.findall(r"\b(?:deployment|statefulset|service)/[a-z]+", DOC)) <= everything
    for path in re.findall(r"deploy/k8s[\w/-]*(?![\w.])", DOC):
        assert (ROOT / path).exists(), path
    assert all(f"`{secret}`" in DOC for secret in BY_HAND)


# --- as processes ----------------------------------------------------------------------------------------------------


class Pods:
    """Starts what the pods of the overlay `cpu` would run, as processes of this machine: their own commands, variables,
    Secrets and probes. What a container sees at /data, /settings, /users, /storage, /runs, /engines lies in a folder.
    """

    def __init__(self, folder: Path, secrets: dict[str, dict[str, str]]) -> None:
        self.folder = folder
        self.secrets = secrets
        self.port, self.redis_port = free_port(), free_port()
        self.objects = (*overlay("cpu"), workloads(overlay("s3"))["trainer"])
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("data", "settings", "users", "storage", "runs", "engines", "bin"):
            (folder / name).mkdir()
        text = self.translate(redis_conf(self.objects))
        (folder / "settings" / "redis.conf").write_text(f"{text}\nport {self.redis_port}\nbind 127.0.0.1\n")
        (folder / "users" / "users.acl").write_text(secrets["redis-users"]["users.acl"])
        (folder / "bin" / "redis-server").symlink_to(find_redis())

    def translate(self, text: str) -> str:
        text = text.replace("@redis:6379", f"@127.0.0.1:{self.redis_port}")
        return re.sub(r"(?<![\w.])/(data|settings|users|storage|runs|engines)\b", rf"{self.folder}/\1", text)

    def workload(self, name: str) -> Object:
        return workloads(self.objects)[name]

    def environment(self, name: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        here = {
            "PATH": path,
            "HOME": str(self.folder),
            "PORT": str(self.port),
            "HOST": "127.0.0.1",
            "MIN_FREE_BYTES": "0",
        }
        if name == "redis":
            return here
        target = "service" if name == "courier" else name
        objects = overlay("s3") if name == "trainer" else self.objects
        values = image_environment(target) | variables(self.workload(name), objects) | {"STORAGE_URL": "/storage"}
        for entry in container_of(self.workload(name))["env"]:
            if "secretKeyRef" in entry.get("valueFrom", {}):
                reference = entry["valueFrom"]["secretKeyRef"]
                values[entry["name"]] = self.secrets[reference["name"]][reference["key"]]
        return {key: self.translate(value) for key, value in values.items()} | here | {"LEASE_S": "8"}

    def start(self, name: str) -> None:
        command = container_of(self.workload(name)).get("command") or image_command(name)
        command = [self.translate(word) for word in command]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment(name), stdout=log, stderr=log)
        self.processes[name] = process

    def is_well(self, name: str, probe: str) -> bool:
        """Ask as the kubelet would."""
        assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()
        asked = container_of(self.workload(name))[probe]
        if "tcpSocket" in asked:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.1", self.redis_port)) == 0
        if "httpGet" in asked:
            try:
                return httpx.get(f"http://127.0.0.1:{self.port}{asked['httpGet']['path']}").status_code < 400
            except httpx.TransportError:
                return False
        command = asked["exec"]["command"]
        limit_s = 3 * asked["timeoutSeconds"]  # this machine is busier
        done = subprocess.run(command, cwd=ROOT, env=self.environment(name), capture_output=True, timeout=limit_s)
        return done.returncode == 0

    def stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            stop(process)


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory, secrets: dict[str, dict[str, str]]) -> Iterator[Pods]:
    """Redis, service and courier."""
    running = Pods(tmp_path_factory.mktemp("pods"), secrets)
    try:
        running.start("redis")
        wait_for(lambda: running.is_well("redis", "startupProbe"), 20, "redis")
        for name in ("service", "courier"):
            running.start(name)
        wait_for(lambda: running.is_well("service", "startupProbe"), 60, "service")
        wait_for(lambda: running.is_well("courier", "readinessProbe"), 60, "courier")
        yield running
    finally:
        running.stop()


def test_pods_become_well_by_their_own_probes(pods: Pods) -> None:
    for name, probe in (("redis", "livenessProbe"), ("service", "readinessProbe"), ("service", "livenessProbe")):
        assert pods.is_well(name, probe)
    answer = httpx.post(f"http://127.0.0.1:{pods.port}/generate")
    assert answer.status_code == 401, "AUTH is on"


def test_redis_lets_nobody_in_without_a_password_and_forgets_nothing(pods: Pods) -> None:
    with socket.create_connection(("127.0.0.1", pods.redis_port), timeout=10) as nobody:
        nobody.sendall(b"PING\r\n")
        assert nobody.recv(100).startswith(b"-NOAUTH")
    url = pods.environment("worker")["REDIS_URL"]
    with connect(url) as worker:
        info = worker.info()
    assert (info["aof_enabled"], info["maxmemory_policy"]) == (1, "noeviction")
    assert info["maxmemory"] == 2**30


def test_the_docs_back_up_is_one(pods: Pods, secrets_folder: Path, tmp_path: Path) -> None:
    [script] = re.findall(r"sh -c '(.+?)' < deploy/k8s/secrets/admin.url", DOC.replace("\\\n", ""), re.DOTALL)
    script = script.replace("/tmp/backup", f"{tmp_path}/backup").replace("-C /tmp ", f"-C {tmp_path} ")
    url = pods.translate((secrets_folder / "admin.url").read_text())
    command, environment = ["sh", "-euc", script], pods.environment("service")
    done = subprocess.run(command, cwd=ROOT, env=environment, input=url.encode(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "backup/redis.jsonl.gz" in archive.getnames()
    assert not (tmp_path / "backup").exists()


def ask(what: str, url: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "REDIS_URL": url}
    command = [sys.executable, "-m", "worker.probe", what]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)


def test_the_workers_probe_means_the_worker_of_its_own_pod(redis: Redis, redis_server: Any) -> None:
    def beat(name: str, state: WorkerState, host: str, started_at: float) -> None:
        known = {"model": "m", "model_sha256": "", "engine": "", "seen_at": now()}
        heartbeat = Heartbeat(name=name, state=state, host=host, started_at=started_at, **known)
        redis.set(worker_key(name), heartbeat.model_dump_json())
        redis.sadd(WORKERS_KEY, name)

    here = socket.gethostname()
    beat("other", WorkerState.READY, "another-pod", 5)
    answer = ask("ready", redis_server.url)
    assert (answer.returncode, answer.stderr) == (1, f"no worker of {here} is known\n")
    beat("before", WorkerState.READY, here, 1)  # was killed; its heartbeat lasts for a lease yet
    beat("now", WorkerState.LOADING, here, 2)
    assert ask("started", redis_server.url).stderr == f"the worker of {here} is loading\n"
    beat("now", WorkerState.WAITING, here, 2)  # for a GPU that trains: it is not to be started again for that
    assert ask("started", redis_server.url).returncode == 0
    assert ask("ready", redis_server.url).returncode == 1
    beat("now", WorkerState.BUSY, here, 2)
    assert ask("ready", redis_server.url).returncode == 0


def test_the_probe_asks_a_real_worker(stack: Stack) -> None:
    container = container_of(workloads(overlay("cpu"))["worker"])
    for probe in ("startupProbe", "readinessProbe"):
        program, *arguments = container[probe]["exec"]["command"]
        assert program == "python"
        command, environment = [sys.executable, *arguments], stack.environment
        asked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
        assert asked.returncode == 0, asked.stderr


def test_a_redis_that_does_not_answer_is_said_in_one_line() -> None:
    answer = ask("ready", f"redis://127.0.0.1:{free_port()}/0")
    assert answer.returncode == 1
    assert re.fullmatch(r"Redis does not answer \(.+\)\n", answer.stderr)


@pytest.mark.slow
def test_the_whole_stack_makes_a_video_and_every_pod_ends_in_time(pods: Pods, example_image: Path) -> None:
    for name in ("worker", "trainer"):
        pods.start(name)
    wait_for(lambda: pods.is_well("worker", "startupProbe"), 180, "the worker's start")
    wait_for(lambda: pods.is_well("worker", "readinessProbe"), 30, "the worker")
    wait_for(lambda: pods.is_well("trainer", "readinessProbe"), 60, "the trainer")
    keys = [sys.executable, "-m", "service", "keys", "add", "somebody", "--scopes", "generate,read,metrics"]
    environment = pods.environment("service")
    key = subprocess.run(keys, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    address = {"base_url": f"http://127.0.0.1:{pods.port}", "headers": {"Authorization": f"Bearer {key}"}}
    with httpx.Client(timeout=90, **address) as http:  # type: ignore[arg-type]
        files = {"image": example_image.read_bytes()}
        asked = {"prompt": "a red circle grows", "seed": "1"}
        job = http.post("/generate", files=files, data=asked, headers={"Prefer": "wait=60"}).json()
        wait_for(lambda: http.get(f"/generate/{job['id']}").json()["status"] == "succeeded", 90, "a video")
        assert http.get(f"/videos/{job['id']}.mp4").content[4:8] == b"ftyp"
        assert "flg_backlog_seconds" in http.get("/metrics").text
    for name in ("service", "courier", "trainer", "worker", "redis"):
        process = pods.processes[name]
        process.terminate()
        assert process.wait(pod_of(pods.workload(name))["terminationGracePeriodSeconds"]) in (0, -15), name
