"""What deploy/prometheus and deploy/grafana ask for exists, and alerts fire when they should and only then.

Rules run in promtool's simulation, against series of two services that say the same; dashboard and rules also in a real
Prometheus that asks a real service. Both programs are in Debian's package `prometheus`.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service.auth import Keys, new_key
from tests.stack import ROOT, Stack, free_port, is_alive, new_record, stop, wait_for
from worker.contract import MAX_DEATHS, WORKERS_KEY, Canary, Heartbeat, Staging, WorkerState, worker_key
from worker.metrics import METRICS, Metric, Metrics
from worker.records import connect, now
from worker.training import _reason

PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
DOCS = (ROOT / "docs/observability.md").read_text()

GROUPS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
DASHBOARD = json.loads((GRAFANA / "dashboards/fastlightgen.json").read_text())
PANELS = {panel["id"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed: apt-get install --no-install-recommends prometheus",
)


def asked(expr: str) -> str:
    """A panel's query as Grafana sends it."""
    return expr.replace("$__rate_interval", "1m").replace("$instance", ".*")


def queries() -> dict[str, str]:
    """Everything that is asked anywhere, by who asks it."""
    found = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in RULES}
    for panel in PANELS.values():
        for target in panel["targets"]:
            found[f"panel {panel['title']}, {target['refId']}"] = asked(target["expr"])
    for note in DASHBOARD["annotations"]["list"]:
        found[f"annotation {note['name']}"] = asked(note["expr"])
    return found


QUERIES = queries()


# --- what is asked for exists ----------------------------------------------------------------------------------------


def parts(tree: Any) -> list[Any]:
    """What an expression is made of."""
    match tree:
        case promql.Call():
            return list(tree.args)
        case promql.AggregateExpr():
            return [tree.expr]
        case promql.BinaryExpr():
            return [tree.lhs, tree.rhs]
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            return [tree.expr]
        case promql.MatrixSelector():
            return [tree.vector_selector]
    return []


def nodes(tree: Any) -> Iterator[Any]:
    """An expression, and all below it."""
    yield tree
    for below in parts(tree):
        yield from nodes(below)


def labels_of(name: str) -> Mapping[str, tuple[str, ...] | None]:
    """The labels that a series has beside those of its target, with what each may say; None: anything."""
    if name in RECORDED:
        tree = promql.parse(RECORDED[name])
        return dict.fromkeys(tree.modifier.labels if isinstance(tree, promql.AggregateExpr) and tree.modifier else ())
    if name in ("up", "ALERTS"):
        return {"up": {}, "ALERTS": {"alertname": tuple(ALERTS), "alertstate": ("pending", "firing")}}[name]
    metric, part = metric_of(name)
    known = {label: metric.values.get(label) for label in metric.labels}
    return {**known, "le": tuple(map(str, metric.bounds))} if part == "bucket" else known


def metric_of(name: str) -> tuple[Metric, str | None]:
    """What a series belongs to, and which part of a histogram it is."""
    for metric in METRICS.values():
        if name == metric.exposed and metric.kind != "histogram":
            return metric, None
        if metric.kind == "histogram" and name in (f"{metric.exposed}_{part}" for part in ("bucket", "sum", "count")):
            return metric, name.rpartition("_")[2]
    raise AssertionError(f"nobody exports {name}")


TARGET = {"job": ("fastlightgen",), "instance": None}


def fits(matcher: Any, known: tuple[str, ...] | None) -> bool:
    """Whether a matcher is about something that a label may say."""
    is_pattern = "Re" in str(matcher.op)
    for wanted in matcher.value.split("|") if is_pattern else [matcher.value]:
        if known is None:  # of HTTP, or a model's name, or a target's
            continue
        if not any(re.fullmatch(wanted, value) if is_pattern else wanted == value for value in known):
            return False
    return True


@pytest.mark.parametrize("who", QUERIES)
def test_every_metric_label_and_value_that_is_asked_for_is_exported(who: str) -> None:
    tree = promql.parse(QUERIES[who])
    said: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, promql.VectorSelector):
            known = {**TARGET, **labels_of(node.name)}
            said |= set(known)
            for matcher in node.matchers.matchers:
                assert matcher.name in known, f"{node.name} has no label {matcher.name}; it has {sorted(known)}"
                assert fits(matcher, known[matcher.name]), f"{matcher.name} of {node.name} never says {matcher.value}"
    for node in nodes(tree):
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= said, f"nothing in {node} has these labels"


def test_no_label_can_say_endless_many_things() -> None:
    # Routes are patterns, methods and statuses few; models and engines come and go with releases and machines.
    free = {label for metric in METRICS.values() for label in metric.labels if label not in metric.values}
    assert free == {"engine", "method", "model", "route", "status"}


@pytest.mark.parametrize("who", QUERIES)
def test_every_number_of_the_fleet_is_taken_once_however_many_services_say_it(who: str) -> None:
    """Only their event streams are each service's own."""
    alone = {node.name for node in not_aggregated(promql.parse(QUERIES[who])) if node.name.startswith(("flg_", "rq_"))}
    assert alone <= {"flg_sse_streams"}


def not_aggregated(tree: Any) -> Iterator[Any]:
    """The selectors that stand in no `max` or `min`."""
    if isinstance(tree, promql.VectorSelector):
        yield tree
    elif not (isinstance(tree, promql.AggregateExpr) and str(tree).startswith(("max", "min"))):
        for below in parts(tree):
            yield from not_aggregated(below)


# --- the dashboard, and what alerts point to -------------------------------------------------------------------------


def test_the_dashboard_is_in_order() -> None:
    places: dict[tuple[int, int], str] = {}
    assert len(PANELS) + sum(panel["type"] == "row" for panel in DASHBOARD["panels"]) == len(
        {panel["id"] for panel in DASHBOARD["panels"]}
    )
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for place in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert places.setdefault(place, panel["title"]) == panel["title"]
    for panel in PANELS.values():
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert {one["datasource"]["uid"] for one in (panel, *panel["targets"])} == {"${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/fastlightgen.yml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_is_wrong_where_to_look_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    notes = alert["annotations"]
    assert set(notes) == {"summary", "runbook_url", "dashboard_url"}
    assert alert["labels"]["severity"] in ("page", "ticket")

    assert notes["runbook_url"] == f"docs/observability.md#{name.lower()}"
    section = DOCS.partition(f"\n### {name}\n")[2].partition("\n#")[0]
    assert all(f"**{part}**" in section for part in ("Means", "Causes", "Look", "Do")), f"no runbook for {name}"

    page, _, number = notes["dashboard_url"].partition("?viewPanel=")
    panel = PANELS[int(number)]
    assert page == f"/d/{DASHBOARD['uid']}"
    assert name in panel["description"], f"{panel['title']} does not say that it belongs to {name}"
    shown = {name for target in panel["targets"] for name in asks(promql.parse(asked(target["expr"])))}
    assert shown & asks(promql.parse(alert["expr"])), f"{panel['title']} shows nothing that {name} looks at"


def asks(tree: Any) -> set[str]:
    """The series behind an expression, through what is recorded."""
    names = {node.name for node in nodes(tree) if isinstance(node, promql.VectorSelector)}
    return names | {one for name in names & set(RECORDED) for one in asks(promql.parse(RECORDED[name]))}


def test_a_panel_turns_red_where_its_alert_fires() -> None:
    checked = []
    for name, alert in ALERTS.items():
        panel = PANELS[int(alert["annotations"]["dashboard_url"].partition("=")[2])]
        limits = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"] if step["value"]]
        numbers = re.findall(r"[<>=]=? ([\d.][\d.*^ ]*)", alert["expr"])
        compared = {eval(number.replace("^", "**")) or 1 for number in numbers}  # where there must be some, red below 1
        if limits:
            assert limits[-1] in compared, name
            checked.append(name)
    assert len(checked) >= 10


@pytest.mark.parametrize("title", [panel["title"] for panel in PANELS.values()])
def test_the_documentation_has_every_panel(title: str) -> None:
    assert f"| {title} |" in DOCS


def test_the_documentation_has_every_metric_and_no_other() -> None:
    exposed = {metric.exposed for metric in METRICS.values()}
    assert {name for name in exposed if f"`{name}`" not in DOCS} == set()
    written = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\b(?:flg|rq)_\w+", DOCS)}
    assert written - exposed == set()
    assert {name for name in re.findall(r"\bflg:[\w:]+", DOCS)} == set(RECORDED)
    assert set(re.findall(r"\bFastLightGen[A-Z]\w+", DOCS)) == set(ALERTS)


def test_every_error_code_that_a_job_may_fail_with_is_known_to_the_metrics() -> None:
    found = set()
    for path in (ROOT / "worker").glob("*.py"):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            place = {"fail": 2, "RunFailed": 0}.get(call.func.id, 99)
            if len(call.args) > place and isinstance(call.args[place], ast.Constant):
                found.add(call.args[place].value)
    found |= {_reason(code, "")[0] for code in (1, 2)}
    causes = METRICS["requeues_total"].values["cause"]
    gave_up = {
        new_record().model_copy(update={"deaths": deaths}).given_up(cause)[0]
        for cause, deaths in itertools.product(causes, (0, MAX_DEATHS))
    }
    generation, distillation = (
        set(METRICS[f"{noun}_failures_total"].values["code"]) for noun in ("generation", "distillation")
    )
    assert found | gave_up == generation | distillation
    assert generation & distillation == gave_up


def test_every_cause_of_a_return_to_the_queue_is_known_to_the_metrics() -> None:
    text = "".join(path.read_text() for path in [*(ROOT / "worker").glob("*.py"), *(ROOT / "service").glob("*.py")])
    said = set(re.findall(r'\bcause(?:: str)? ?=\s*"(\w+)"', text)) | set(
        re.findall(r'cause="\w+" if \w+ else "(\w+)"', text)
    )
    causes = re.search(r"_CAUSES: .*?\n}", (ROOT / "worker/attempts.py").read_text(), re.S)
    assert causes
    said |= set(re.findall(r': "(\w+)"', causes[0]))
    assert said == set(METRICS["requeues_total"].values["cause"])


# --- Prometheus' own checks ------------------------------------------------------------------------------------------


def promtool(*arguments: str, folder: Path) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.compose.yml"])
def test_promtool_accepts_configuration_and_rules(name: str, tmp_path: Path) -> None:
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    key = tmp_path / "key"
    key.touch()
    text = (PROMETHEUS / name).read_text()
    (tmp_path / name).write_text(re.sub("(?<=credentials_file: ).*", str(key), text))
    promtool("check", "config", name, folder=tmp_path)
    promtool("check", "rules", "--lint-fatal", "alerts.yml", folder=tmp_path)


def test_containers_are_asked_like_a_machine() -> None:
    ours, compose = (yaml.safe_load((PROMETHEUS / f"prometheus{kind}.yml").read_text()) for kind in ("", ".compose"))
    for config in (ours, compose):
        [scrape] = config["scrape_configs"]
        assert len(scrape.pop("static_configs")[0]["targets"]) == 1
        del scrape["authorization"]["credentials_file"]
    assert ours == compose


# --- when each alert fires -------------------------------------------------------------------------------------------

SAMPLES = 90
"""One every 30 s."""


def series(name: str, **labels: str) -> str:
    """As promtool's input has it, but for the target's labels."""
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in sorted(labels.items())) + "}"


def histogram(name: str, upper: float, each: float = 1, **labels: str) -> dict[str, str]:
    """A histogram whose every value lies below ``upper`` and not below the bound before it, ``each`` in 30 s."""
    bounds = [*METRICS[name.removeprefix("flg_")].bounds, float("inf")]
    found = {
        series(f"{name}_bucket", le="+Inf" if bound == float("inf") else str(bound), **labels): f"0+{each}x"
        if bound >= upper
        else "0"
        for bound in bounds
    }
    return {**found, series(f"{name}_count", **labels): f"0+{each}x"}


LOOKED_AT = {name for rule in RULES for name in asks(promql.parse(rule["expr"]))}


def healthy() -> dict[str, str]:
    """A stack that is well. A number stays as it is; `0+1x` grows by 1 every 30 s."""
    found = {series("up", job="fastlightgen"): "1"}
    for metric in METRICS.values():
        if metric.kind == "counter" and "model" not in metric.labels:
            for values in itertools.product(*metric.values.values()):
                found[series(metric.exposed, **dict(zip(metric.values, values, strict=True)))] = "0"
        elif metric.kind == "gauge" and set(metric.labels) == set(metric.values):
            for values in itertools.product(*(metric.values[label] for label in metric.labels)):
                found[series(metric.exposed, **dict(zip(metric.labels, values, strict=True)))] = "0"
    found = {
        **found,
        series("flg_worker_up", state="ready"): "1",
        series("flg_worker_up", state="busy"): "1",
        series("flg_worker_release", state="loaded"): "2",
        series("flg_jobs_total", model="m", status="succeeded"): "0+1x",
        series("flg_jobs_total", model="m", status="failed"): "0",
        series("flg_http_requests_total", method="POST", route="/generate", status="202"): "0+10x",
        series("rq_workers", queues="gpu", state="busy"): "2",
        series("rq_workers", queues="train", state="idle"): "1",
        series("flg_canary_slowdown_ratio"): "1.1",
        series("flg_courier_up"): "1",
        series("flg_disk_free_bytes"): "1e12",
        series("flg_redis_memory_bytes"): "1e8",
        series("flg_redis_memory_limit_bytes"): "1e9",
        series("flg_redis_uptime_seconds"): "0+30x",
        **{series("flg_redis_ok", check=check): "1" for check in METRICS["redis_ok"].values["check"]},
        **histogram("flg_event_loop_lag_seconds", 0.005, 30),
        **histogram("flg_thread_wait_seconds", 0.005, 30),
        **histogram("flg_eta_error_seconds", 5.0, side="early"),
        **histogram("flg_eta_error_seconds", 5.0, 0, side="late"),
    }
    return {name: values for name, values in found.items() if name.partition("{")[0] in LOOKED_AT}


@dataclass(frozen=True)
class Case:
    """What makes one alert fire, when, and what is just not enough."""

    alert: str
    breaks: Mapping[str, str]
    """Series of a healthy stack that are other than they are."""
    fires_at: float
    """In minutes; half a minute before that nothing has fired yet."""
    spares: Mapping[str, str] = field(default_factory=dict)
    """Likewise; nothing fires."""
    also: frozenset[str] = frozenset()
    """What else fires by then, and rightly."""


def once(value: float) -> str:
    """A counter that jumps from 0 to ``value`` after 5 minutes."""
    return f"0+0x9 {value}+0x{SAMPLES - 10}"


FAILED = series("flg_jobs_total", model="m", status="failed")
MADE = series("flg_jobs_total", model="m", status="succeeded")


def failures(code: str) -> str:
    return series("flg_generation_failures_total", code=code)


STATE = {state: series("flg_worker_up", state=state) for state in WorkerState}
NO_WORKERS = dict.fromkeys(STATE.values(), "0")
WAITS = {queue: series("flg_oldest_queued_seconds", queue=queue) for queue in ("gpu", "train")}
RELEASE = {state: series("flg_worker_release", state=state) for state in ("failed", "staging")}
OK = {check: series("flg_redis_ok", check=check) for check in METRICS["redis_ok"].values["check"]}
UPTIME = series("flg_redis_uptime_seconds")
HTTP = "flg_http_requests_total"

UP = series("up", job="fastlightgen")
PAUSED = series("flg_queue_paused")
STARTS = series("flg_worker_starts_total")
DISK = series("flg_disk_free_bytes")
USED = series("flg_redis_memory_bytes")
SLOWER = series("flg_canary_slowdown_ratio")
CANARIES = {result: series("flg_canaries_total", result=result) for result in ("failed", "ok")}
NO_TRAINER = {series("rq_workers", queues="train", state="idle"): "0"}
ERRORS = series(HTTP, method="POST", route="/generate", status="500")
LATE = series("flg_webhooks_late_seconds")


def requeues(cause: str) -> str:
    return series("flg_requeues_total", cause=cause)


def refusals(reason: str) -> str:
    return series("flg_admission_rejected_total", reason=reason)


CASES = [
    Case("FastLightGenDown", {UP: "0"}, 2, {UP: "0+0x3 1+0x80"}),
    Case("FastLightGenNoWorker", NO_WORKERS, 2, {**NO_WORKERS, STATE["ready"]: "1"}),
    Case("FastLightGenNoWorker", {**NO_WORKERS, STATE["loading"]: "5"}, 2, {**NO_WORKERS, STATE["waiting"]: "1"}),
    Case("FastLightGenQueueStands", {WAITS["gpu"]: "601"}, 5, {WAITS["gpu"]: "600"}),
    Case("FastLightGenQueueStands", {WAITS["gpu"]: "9000"}, 5, {WAITS["gpu"]: "9000", PAUSED: "1"}),
    Case("FastLightGenQueueStands", {WAITS["gpu"]: "9000"}, 5, {WAITS["train"]: "9000"}),
    Case(  # one in nine; not one in eleven
        "FastLightGenJobsFail",
        {failures("generation_failed"): "0+1x", FAILED: "0+1x", MADE: "0+8x"},
        6.5,
        {failures("generation_failed"): "0+1x", FAILED: "0+1x", MADE: "0+10x"},
    ),
    Case(  # deadlines are not ours
        "FastLightGenJobsFail",
        {failures("timed_out"): "0+1x", FAILED: "0+1x"},
        6.5,
        {failures("deadline"): "0+1x", failures("deadline_start"): "0+1x", FAILED: "0+2x"},
    ),
    Case(  # where few videos are made, two that fail wake nobody
        "FastLightGenJobsFail",
        {failures("generation_failed"): once(4), FAILED: once(4)},
        10,
        {failures("generation_failed"): once(2), FAILED: once(2), "flg_jobs_total": "0"},
    ),
    Case("FastLightGenTooFewWorkers", {"flg_backlog_seconds": "1802"}, 10, {"flg_backlog_seconds": "1800"}),
    Case("FastLightGenTooFewWorkers", {"flg_backlog_seconds": "902", STATE["busy"]: "0"}, 10),
    Case("FastLightGenRefusing", {refusals("disk"): "0+1x"}, 10.5, {refusals("wait"): once(99)}),
    Case(
        "FastLightGenRefusing",
        {refusals("full"): "0+0.1x"},
        10.5,
        {refusals(reason): "0+9x" for reason in ("rate", "jobs", "conflict")},
    ),
    Case("FastLightGenPaused", {PAUSED: "1"}, 30, {PAUSED: "1+0x58 0+0x30"}),
    Case(
        "FastLightGenEtaWrong",
        {
            **histogram("flg_eta_error_seconds", 5.0, 2, side="early"),
            **histogram("flg_eta_error_seconds", 120.0, side="late"),
        },
        32,
        {
            **histogram("flg_eta_error_seconds", 5.0, 4, side="early"),
            **histogram("flg_eta_error_seconds", 120.0, side="late"),
        },
    ),
    Case(
        "FastLightGenEtaWrong",
        histogram("flg_eta_error_seconds", 300.0, side="late"),
        33,
        histogram("flg_eta_error_seconds", 60.0, 9, side="late"),
    ),
    Case("FastLightGenWorkersDie", {requeues("storage"): once(4)}, 5, {requeues("storage"): once(3)}),
    Case(
        "FastLightGenWorkersDie",
        {requeues("lease"): once(4)},
        5,
        {requeues(cause): "0+9x" for cause in ("handed_back", "resumed")},
    ),
    Case("FastLightGenPoisonJob", {failures("worker_crashed"): once(1)}, 5, {failures("attempts_lost"): once(1)}),
    Case("FastLightGenWorkersRestart", {STARTS: "0+1x"}, 14, {STARTS: once(6)}),
    Case(  # with a back-off of minutes
        "FastLightGenWorkersRestart",
        {**NO_WORKERS, STARTS: "0+0x4 1+0x4 2+0x8 3+0x10 4+0x60"},
        25,
        also=frozenset({"FastLightGenNoWorker"}),
    ),
    Case("FastLightGenCanaryFails", {CANARIES["failed"]: once(2)}, 5, {CANARIES["failed"]: once(1)}),
    Case("FastLightGenCanaryFails", {CANARIES["failed"]: once(2)}, 5, {CANARIES["ok"]: "0+9x"}),
    Case("FastLightGenCanarySlow", {SLOWER: "2.1"}, 30, {SLOWER: "2"}),
    Case("FastLightGenOutOfMemory", {failures("out_of_memory"): once(1)}, 5, {failures("timed_out"): once(1)}),
    Case("FastLightGenReleaseFails", {RELEASE["failed"]: "1"}, 2, {RELEASE["failed"]: "1+0x3 0+0x80"}),
    Case("FastLightGenReleaseStuck", {RELEASE["staging"]: "1"}, 30, {RELEASE["staging"]: "1+0x58 0+0x30"}),
    Case("FastLightGenNoTrainer", {WAITS["train"]: "901", **NO_TRAINER}, 5, {WAITS["train"]: "900", **NO_TRAINER}),
    Case("FastLightGenNoTrainer", {WAITS["train"]: "901", **NO_TRAINER}, 5, {WAITS["train"]: "90000"}),
    Case(
        "FastLightGenNoTrainer",
        {WAITS["train"]: "901", **NO_TRAINER},
        5,
        {WAITS["gpu"]: "9000", PAUSED: "1", **NO_TRAINER},
    ),
    Case(
        "FastLightGenDistillationFails",
        {series("flg_distillation_failures_total", code="run_crashed"): once(1)},
        5,
        {series("flg_distillations_total", status="succeeded"): "0+1x"},
    ),
    Case(  # probes do not thin it out
        "FastLightGenServerErrors",
        {ERRORS: "0+0.12x", series(HTTP, method="GET", route="/metrics", status="200"): "0+9000x"},
        5.5,
        {ERRORS: "0+0.1x"},
    ),
    Case(
        "FastLightGenServerErrors",
        {series(HTTP, method="GET", route="/videos/{job_id}.mp4", status="502"): "0+1x"},
        5.5,
        {
            series(HTTP, method="POST", route="/generate", status="503"): "0+9x",
            series(HTTP, method="GET", route="/readyz", status="503"): "0+9x",
            series(HTTP, method="GET", route="/generate", status="404"): "0+9x",
        },
    ),
    *(
        Case("FastLightGenServiceSlow", histogram(name, 0.5, 30), 10.5, histogram(name, 0.25, 30))
        for name in ("flg_event_loop_lag_seconds", "flg_thread_wait_seconds")
    ),
    Case("FastLightGenNoCourier", {LATE: "301"}, 2, {LATE: "300", series("flg_courier_up"): "0"}),
    Case(
        "FastLightGenWebhooksDie",
        {series("flg_webhook_deliveries_total", result="dead"): once(1)},
        5,
        {series("flg_webhook_deliveries_total", result="failed"): "0+1x", series("flg_webhooks_dead"): "7"},
    ),
    Case("FastLightGenRedisFull", {USED: "8.6e8"}, 5, {USED: "8.5e8"}),
    *(
        Case("FastLightGenRedisCannotSave", {OK[check]: "0"}, 1, {OK[check]: "0+0x1 1+0x80"})
        for check in ("aof_write", "aof_rewrite")
    ),
    Case("FastLightGenRedisCannotSave", {OK["aof_write"]: "0"}, 1, {OK["aof_enabled"]: "0+0x9 1+0x80"}),
    *(
        Case("FastLightGenRedisUnsafe", {OK[check]: "0"}, 10, {OK[check]: "0+0x19 1+0x70"})
        for check in ("aof_enabled", "noeviction")
    ),
    Case(
        "FastLightGenRedisRestarts",
        {UPTIME: "0+30x10 0+30x10 0+30x10 0+30x60"},
        16.5,
        {UPTIME: "0+30x10 0+30x10 0+30x70"},
    ),
    Case("FastLightGenDiskFull", {DISK: "2e9"}, 30, {DISK: "2.2e9"}),
    Case("FastLightGenDiskFull", {DISK: "1e12-4e8x"}, 30.5, {DISK: "1e12-2e8x"}),  # within 21 hours; not within a day
]
BARE: Mapping[str, tuple[Mapping[str, str], set[str]]] = {
    "no target is known": ({}, {"FastLightGenDown"}),
    "nobody answers": ({UP: "0"}, {"FastLightGenDown"}),
    "somebody answers and says nothing": ({UP: "1"}, {"FastLightGenNoWorker"}),
}
"""Where there are no series, an alert for each that must, and only these."""


def unrolled(given: Mapping[str, str], samples: int = SAMPLES) -> list[dict[str, str]]:
    """As promtool wants them; each as two services say it."""
    found = []
    for name, values in given.items():
        if values.endswith("x"):
            values = f"{values}{samples}"
        elif "x" not in values:
            values = f"{values}+0x{samples}"
        for instance in ("a:8000", "b:8000"):
            labels = name[name.index("{") + 1 : -1]
            with_target = ",".join(filter(None, [labels, f'instance="{instance}"']))
            found.append({"series": f"{name[: name.index('{')]}{{{with_target}}}", "values": values})
    return found


def fired_by(minutes: float, names: Iterable[str]) -> dict[str, Any]:
    """That these have fired by then, and nothing else, each once and not for each service."""
    each = "alertname, cause, check, code, reason, instance"
    return {
        "expr": f'count by (alertname) (count by ({each}) (count_over_time(ALERTS{{alertstate="firing"}}[2h])))',
        "eval_time": f"{minutes * 60:.0f}s",
        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)],
    }


def trial(name: str, given: Mapping[str, str], minutes: float = SAMPLES / 2, **checks: Any) -> dict[str, Any]:
    """One of promtool's tests, which has series for so long."""
    return {"name": name, "interval": "30s", "input_series": unrolled(given, int(2 * minutes)), **checks}


def simulate(folder: Path, trials: list[dict[str, Any]]) -> None:
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    file = {"rule_files": ["alerts.yml"], "evaluation_interval": "30s", "tests": trials}
    (folder / "test.yml").write_text(yaml.safe_dump(file, sort_keys=False, width=1000))
    promtool("test", "rules", "test.yml", folder=folder)


def changed(by: Mapping[str, str]) -> dict[str, str]:
    """A healthy stack but for some series; a name without labels stands for all that are called so."""
    found = healthy()
    for name, values in by.items():
        called = [name] if "{" in name else [one for one in found if one.startswith(name + "{") and one not in by]
        assert called, name
        found.update(dict.fromkeys(called, values))
    return found


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_before_and_not_just_below(tmp_path: Path) -> None:
    trials = [trial("healthy", healthy(), promql_expr_test=[fired_by(45, set())])]
    for name, (given, expected) in BARE.items():
        trials.append(trial(name, given, 10, promql_expr_test=[fired_by(10, expected)]))
    for case in CASES:
        at = case.fires_at
        fires = [fired_by(at - 0.5, case.also), fired_by(at, {*case.also, case.alert})]
        trials.append(trial(f"{case.alert} {case.breaks}", changed(case.breaks), at, promql_expr_test=fires))
        if case.spares:
            quiet = [fired_by(at + 5, set())]
            trials.append(
                trial(f"{case.alert}, spared {case.spares}", changed(case.spares), at + 5, promql_expr_test=quiet)
            )
    simulate(tmp_path, trials)


def test_every_alert_is_tried_from_both_sides() -> None:
    assert {case.alert for case in CASES} == set(ALERTS)
    assert {case.alert for case in CASES if case.spares} == set(ALERTS)


@needs_prometheus
def test_what_is_recorded_is_what_it_says(tmp_path: Path) -> None:
    expected = {
        "flg:workers_taking:sum": 2,
        "flg:start_wait:seconds": 15,
        "flg:failed:ratio15m": 0.2,
        "flg:late:ratio30m": 0.25,
        "flg:http_errors:ratio5m": 0.5,
        "flg:loop_lag:p95_10m": 0.0975,
        "flg:thread_wait:p95_10m": 0.00475,
        "flg:redis_memory:ratio": 0.1,
    }
    given = {
        "flg_backlog_seconds{}": "30",
        FAILED: "0+1x",
        series("flg_jobs_total", model="m", status="succeeded"): "0+4x",
        failures("generation_failed"): "0+1x",
        failures("deadline"): "0+1x",
        **histogram("flg_eta_error_seconds", 5.0, 3, side="early"),
        **histogram("flg_eta_error_seconds", 120.0, 1, side="late"),
        series(HTTP, method="POST", route="/generate", status="500"): "0+10x",
        **histogram("flg_event_loop_lag_seconds", 0.1, 30),
    }
    checks = [
        {
            "expr": f"floor(1e6 * {name} + 0.5)",  # as a whole number, which can be compared
            "eval_time": "40m",
            "exp_samples": [{"labels": "{}", "value": round(1e6 * value)}],
        }
        for name, value in expected.items()
    ]
    rates = [
        {"labels": f'{{model="m",status="{status}"}}', "value": value}
        for status, value in (("failed", 1), ("succeeded", 4))
    ]
    checks.append({"expr": "floor(30 * flg:jobs:rate15m + 0.5)", "eval_time": "40m", "exp_samples": rates})
    assert {*expected, "flg:jobs:rate15m"} == set(RECORDED)
    simulate(tmp_path, [trial("recorded", changed(given), promql_expr_test=checks)])


@needs_prometheus
def test_what_a_person_reads_has_its_numbers(tmp_path: Path) -> None:
    """One of each form: a duration, a share, labels."""
    wanted = {
        "FastLightGenQueueStands": ({WAITS["gpu"]: "754"}, {}, "the oldest video in the queue has waited 12m 34s"),
        "FastLightGenRedisFull": (
            {series("flg_redis_memory_bytes"): "9e8"},
            {},
            "Redis uses 90% of its memory; when it is full nothing can be accepted",
        ),
        "FastLightGenRedisUnsafe": (
            {OK["noeviction"]: "0"},
            {"check": "noeviction"},
            "Redis may lose accepted jobs: noeviction is not so",
        ),
    }
    trials = []
    for name, (given, labels, summary) in wanted.items():
        alert = ALERTS[name]
        said = {
            "exp_labels": {"severity": alert["labels"]["severity"], **labels},
            "exp_annotations": {**alert["annotations"], "summary": summary},
        }
        one = {"eval_time": "11m", "alertname": name, "exp_alerts": [said]}
        trials.append(trial(name, changed(given), alert_rule_test=[one]))
    simulate(tmp_path, trials)


# --- a real Prometheus asks a real service ---------------------------------------------------------------------------

ANY = {"engine": "trt", "method": "GET", "model": "grey", "route": "/generate", "status": "500"}
"""For labels that may say anything."""


def happen(redis: Redis) -> None:
    """Everything that is counted happens once more, and there is something of everything that is looked up."""
    counted = Metrics()
    for metric in METRICS.values():
        for values in itertools.product(*(metric.values.get(label) or (ANY[label],) for label in metric.labels)):
            labels = dict(zip(metric.labels, map(str, values), strict=True))
            if metric.kind == "counter":
                counted.count(metric.name, **labels)
            elif metric.kind == "histogram":
                counted.observe(metric.name, 0.3, **labels)
    counted.flush(redis)
    beat = Heartbeat(
        name="w",
        state=WorkerState.BUSY,
        model="grey",
        model_sha256="0" * 64,
        models=("grey@000000000000",),
        engine="trt",
        gpu_mem_bytes=2**30,
        release=Staging(wanted="0" * 64, state="loaded"),
        canary=Canary(at=now(), ok=True, seconds=2.0, first_seconds=1.0),
        started_at=now(),
        seen_at=now(),
    )
    redis.set(worker_key("w"), beat.model_dump_json())
    redis.sadd(WORKERS_KEY, "w")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, _clean_environment: None) -> Iterator[tuple[Redis, str]]:
    """The Redis of a service that has no worker, and the address of a Prometheus that asks it every second."""
    folder = tmp_path_factory.mktemp("watched")
    stack = Stack(folder, AUTH="on")
    prometheus = None
    try:
        stack.redis.start()
        stack.spawn("service")
        wait_for(lambda: is_alive(stack.url), 60, "the service")
        redis, key = connect(stack.redis.url), new_key()
        Keys(redis).add(key, "prometheus", ("metrics",))
        (folder / "fastlightgen.key").write_text(key)
        text = (PROMETHEUS / "prometheus.yml").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{stack.port}")
        (folder / "prometheus.yml").write_text(re.sub("_interval: 15s", "_interval: 1s", text))
        shutil.copy(PROMETHEUS / "alerts.yml", folder)
        address = f"127.0.0.1:{free_port()}"
        options = ("--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}")
        with (folder / "prometheus.log").open("ab") as log:
            prometheus = subprocess.Popen(["prometheus", *options], cwd=folder, stdout=log, stderr=log)
        url = f"http://{address}"
        wait_for(lambda: is_watching(url), 30, "Prometheus to ask the service")
        yield redis, url
        redis.close()
    finally:
        stop(prometheus)
        stack.stop()


def is_watching(url: str) -> bool:
    """Whether Prometheus runs and the service has answered it."""
    try:
        return [one["value"][1] for one in answer(url, 'up{job="fastlightgen"}')] == ["1"]
    except (httpx.TransportError, ValueError):  # it is not there yet, or still reads its storage
        return False


def answer(url: str, expr: str) -> list[Any]:
    """What Prometheus finds; an error of the query fails the test."""
    said = httpx.get(f"{url}/api/v1/query", params={"query": expr}, timeout=10).json()
    assert said["status"] == "success", (expr, said)
    found: list[Any] = said["data"]["result"]
    return found


@needs_prometheus
def test_a_real_prometheus_finds_something_for_every_query(watched: tuple[Redis, str]) -> None:
    redis, url = watched
    # Alerts have none while all is well, the annotation none without a release.
    missing = [who for who in QUERIES if who.startswith(("panel", "rule flg:"))]

    def complete() -> bool:
        happen(redis)
        missing[:] = [who for who in missing if not answer(url, QUERIES[who])]
        return not missing

    with suppress(AssertionError):
        wait_for(complete, 20, "an answer to every query")
    assert missing == []
    for expr in QUERIES.values():
        answer(url, expr)  # has no error
    groups = httpx.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
    assert {rule["name"]: rule["health"] for group in groups for rule in group["rules"]} == dict.fromkeys(
        [*RECORDED, *ALERTS], "ok"
    )


def test_a_real_stack_that_is_well_says_so(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    found = {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert found["flg_worker_starts_total",] >= 1
    assert found["flg_worker_up", "ready"] + found["flg_worker_up", "busy"] == 1
    assert [value for name, value in found.items() if name[0] == "flg_worker_model"] == [1]
    assert {found["flg_redis_ok", check] for check in METRICS["redis_ok"].values["check"]} == {1}
    assert found["flg_event_loop_lag_seconds_count",] > 0
    assert found["flg_canaries_total", "failed"] == found["flg_queue_paused",] == 0
    # All that the table has is there, but for what nothing is known of on this machine and in this minute.
    families = {family.name.removesuffix("_total") for family in text_string_to_metric_families(text) if family.samples}
    unknown = {"flg_canary_slowdown_ratio", "flg_gpu_mem_bytes", "flg_job_seconds", "flg_jobs"}
    assert {metric.exposed.removesuffix("_total") for metric in METRICS.values()} - families <= unknown
