"""One trace from an HTTP request to the phases of its video, by what leaves the process: to a real receiver too."""

import asyncio
import gzip
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from fastapi import FastAPI
from google.protobuf.json_format import MessageToDict
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.routes.metrics import telemetry
from tests.stack import ROOT, new_record
from worker import logs, tracing
from worker.contract import Phase
from worker.records import Records

CLIENT = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{CLIENT}-b7ad6b7169203331-01"


@pytest.fixture
def exporter():
    """Where finished spans are found."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracing.use(provider)
    yield memory
    tracing.use(None)


def accept(records: Records, headers: dict[str, str], query: str = "") -> str:
    """A service that takes a job: its record says which trace it belongs to. Returns its id."""
    app = FastAPI(telemetry=telemetry())

    @app.post("/generate")
    def create() -> str:  # in a thread, as the real one
        record = new_record().model_copy(update={"trace": tracing.current_traceparent()})
        records.create(record)
        logging.getLogger("service").info("accepted")
        return record.id

    @app.get("/livez")
    async def live() -> None: ...

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            await client.get("/livez")
            return await client.post(f"/generate{query}", headers=headers)

    return asyncio.run(send()).json()


def work(records: Records, job_id: str) -> None:
    """A worker that does it, in a thread that knows of no trace."""

    def run() -> None:
        record = records.get(job_id)
        with tracing.consumer_span(record.trace, "generate", job_id=record.id, model=record.model, attempt=1):
            tracing.phase_spans({Phase.ENCODING: 0.5, Phase.DENOISING: 2.0}, ended_at=1000.0)
            tracing.phase_spans({Phase.DECODING: 1.0, Phase.SAVING: 0.25}, ended_at=1003.0)
            logging.getLogger("worker").info("done")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_one_trace_from_the_request_to_the_phases(records, exporter):
    job_id = accept(records, {"traceparent": TRACEPARENT}, "?sig=secret")
    work(records, job_id)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /generate", "generate", *Phase}  # nothing of the probe
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {CLIENT}
    request, job = spans["POST /generate"], spans["generate"]
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert job.parent.span_id == request.context.span_id
    assert all(spans[phase].parent.span_id == job.context.span_id for phase in Phase)
    assert (request.attributes["http.route"], request.attributes["http.response.status_code"]) == ("/generate", 200)
    assert job.attributes == {"flg.job_id": job_id, "flg.model": "shapes-4step", "flg.attempt": 1}
    assert job.kind is trace.SpanKind.CONSUMER
    said = " ".join(span.to_json() for span in spans.values())
    assert "secret" not in said
    assert "red circle" not in said


def test_phases_lie_where_they_were(records, exporter):
    work(records, accept(records, {}))
    times = {span.name: (span.start_time / 1e9, span.end_time / 1e9) for span in exporter.get_finished_spans()}
    assert {phase: times[phase] for phase in Phase} == {
        "encoding": (997.5, 998.0),
        "denoising": (998.0, 1000.0),
        "decoding": (1001.75, 1002.75),
        "saving": (1002.75, 1003.0),
    }


def test_a_record_without_a_trace_begins_one(records, exporter):
    record = new_record()
    records.create(record)
    work(records, record.id)
    [job] = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    assert job.parent is None


def test_a_failure_is_marked_without_its_message(exporter):
    with pytest.raises(ValueError, match="red circle"), tracing.consumer_span("no traceparent", "generate"):
        raise ValueError("a red circle is not understood")
    with tracing.consumer_span(None, "generate"):
        tracing.note_failure("timed_out")
    one, other = exporter.get_finished_spans()
    assert [(span.status.is_ok, span.attributes["error.type"]) for span in (one, other)] == [
        (False, "ValueError"),
        (False, "timed_out"),
    ]
    assert "red circle" not in one.to_json()


def test_lines_within_a_span_say_which(records, exporter, caplog):
    caplog.handler.addFilter(logs.add_context)
    caplog.set_level(logging.INFO)
    work(records, accept(records, {"traceparent": TRACEPARENT}))
    lines = {entry.name: entry for entry in caplog.records if entry.name in ("service", "worker")}
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {line.trace_id for line in lines.values()} == {CLIENT}
    assert lines["service"].span_id == f"{spans['POST /generate'].context.span_id:016x}"
    assert lines["worker"].span_id == f"{spans['generate'].context.span_id:016x}"


# --- over the wire ---------------------------------------------------------------------------------------------------


class Receiver(ThreadingHTTPServer):
    """Takes what OTLP exporters send over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict]] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request.ParseFromString(body)
        self.server.requests.append((self.path, MessageToDict(request)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def receiver():
    server = Receiver()
    yield server
    server.shutdown()
    server.server_close()


def test_a_collector_gets_one_trace_from_two_programs(records, receiver, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    try:
        tracing.configure("service")
        job_id = accept(records, {})
        tracing.flush()
        tracing.configure("worker")
        work(records, job_id)
        tracing.flush()
    finally:
        tracing.use(None)
    assert {path for path, _ in receiver.requests} == {"/v1/traces"}
    spans = {}
    for _, request in receiver.requests:
        for resource in request["resourceSpans"]:
            names = {a["key"]: a["value"].get("stringValue") for a in resource["resource"]["attributes"]}
            for scope in resource["scopeSpans"]:
                spans |= {span["name"]: (names["service.name"], span) for span in scope["spans"]}
    assert {name: program for name, (program, _) in spans.items()} == {
        "POST /generate": "fastlightgen-service",
        "generate": "fastlightgen-worker",
        **{phase.value: "fastlightgen-worker" for phase in Phase},
    }
    assert len({span["traceId"] for _, span in spans.values()}) == 1
    assert spans["generate"][1]["parentSpanId"] == spans["POST /generate"][1]["spanId"]


# --- off -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
    ],
)
def test_it_is_off_unless_it_is_asked_for(records, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracing.configure("service")
    assert tracing.provider() is None
    assert records.get(accept(records, {"traceparent": TRACEPARENT})).trace is None
    with tracing.consumer_span(None, "generate", attempt=1):
        tracing.phase_spans({Phase.SAVING: 1.0})
        assert tracing.current_traceparent() is None
    tracing.flush()


def test_what_cannot_be_traced_is_said_and_does_not_stop_the_program(caplog, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    tracing.configure("service")
    assert (tracing.provider(), [entry.levelname for entry in caplog.records]) == (None, ["WARNING"])


def test_without_the_sdk_all_of_it_does_nothing():
    code = """
import logging, sys
sys.modules["opentelemetry.sdk.resources"] = None  # as if it were not installed
from worker import tracing
logging.basicConfig()
tracing.configure("worker")
with tracing.consumer_span(None, "generate", attempt=1):
    tracing.phase_spans({"saving": 1.0})
tracing.note_failure("timed_out")
tracing.flush()
heavy = {"torch", "fastapi", "starlette"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "add the extra `otel`" in done.stderr
