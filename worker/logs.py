"""What every program of ours writes to its log: lines for people, or with LOG_FORMAT=json one object a line. No torch.

What a line belongs to (a request, a job) is bound once and stands in every line until it is unbound, also in those of
libraries. It is kept in context variables: starlette's threadpool takes them along, a bare thread begins with none.
Prompts are not logged at INFO or above.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from opentelemetry import trace
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

Format = Literal["text", "json"]

_BOUND: ContextVar[dict[str, str]] = ContextVar("bound", default={})  # noqa: B039 - never changed in place
_TALKATIVE = ("httpx", "httpcore", "urllib3", "opentelemetry", "onnxscript", "onnx_ir")
"""What says more at INFO than ours do: whole URLs, or a line for each node of a graph."""


def configure(program: str, level: str = "INFO", fmt: Format = "text") -> None:
    """Have everything that this process logs go to stderr. Once, at start.

    Args:
        program: what its lines begin with.
        level: the least that is said.
        fmt: text for people, json for machines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_text(program) if fmt == "text" else _Json(program))
    handler.addFilter(add_context)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel("WARNING")
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


@contextmanager
def bind(**values: str | None) -> Iterator[None]:
    """Have every line within say these, such as ``request_id`` and ``job_id``; None says nothing."""
    token = _BOUND.set({**_BOUND.get(), **{name: value for name, value in values.items() if value is not None}})
    try:
        yield
    finally:
        _BOUND.reset(token)


def add_context(record: logging.LogRecord) -> bool:
    """A filter that lets every line pass and writes on it what it belongs to."""
    for name, value in _BOUND.get().items():
        record.__dict__.setdefault(name, value)
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        record.trace_id = trace.format_trace_id(span.trace_id)
        record.span_id = trace.format_span_id(span.span_id)
    return True


def _text(program: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {program:7} %(levelname)s %(message)s")


class _Json(JsonFormatter):
    """One object a line; what was bound and what a call gave as ``extra`` are fields of it."""

    def __init__(self, program: str) -> None:
        super().__init__(
            ("asctime", "levelname", "name", "message"),
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"},
            static_fields={"program": program},
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002
        """RFC 3339 in UTC, to the millisecond."""
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _log_uncaught(kind: type[BaseException], error: BaseException, trace_back: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace_back)
    else:
        logging.getLogger(__name__).critical("ended by %s", kind.__name__, exc_info=(kind, error, trace_back))
