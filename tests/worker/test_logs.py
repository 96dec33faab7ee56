"""What programs write to their logs: by what comes out of a real process; and that no prompt is ever in it."""

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading

import pytest
from starlette.concurrency import run_in_threadpool

from tests.stack import ROOT
from worker import logs


def run(code: str, fmt: str) -> list[str]:
    """The lines that a program writes to stderr once its log is set up; nothing may come out on stdout."""
    prepared = f"import logging\nfrom worker import logs\nlogs.configure('worker', 'INFO', {fmt!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", prepared], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.stderr.splitlines()


SAYS = """
log = logging.getLogger("worker.jobs")
with logs.bind(request_id="req_1"), logs.bind(job_id="vid_1", owner=None):
    log.info("%s: two\\nlines", "vid_1", extra={"status": 200})
    logging.getLogger("rq.worker").warning("a library", extra={"color_message": "a library"})
log.debug("too little to be said")
logging.getLogger("httpx").info("GET https://example.org/?secret")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
import warnings
warnings.warn("old")
raise RuntimeError("the end")
"""


def test_json_is_one_object_a_line():
    said = [json.loads(line) for line in run(SAYS, "json")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time")) for entry in said)
    assert {entry.pop("program") for entry in said} == {"worker"}
    bound = {"request_id": "req_1", "job_id": "vid_1"}
    assert said[0] == {"level": "INFO", "logger": "worker.jobs", "message": "vid_1: two\nlines", "status": 200, **bound}
    assert said[1] == {"level": "WARNING", "logger": "rq.worker", "message": "a library", **bound}
    failed, warned, ended = said[2:]
    assert (failed["level"], failed["message"]) == ("ERROR", "it failed")
    assert failed["exception"].endswith("ZeroDivisionError: division by zero")
    assert "UserWarning: old" in warned["message"]
    assert (ended["level"], ended["message"]) == ("CRITICAL", "ended by RuntimeError")
    assert ended["exception"].endswith("RuntimeError: the end")


def test_text_is_for_people():
    first, second, *rest = run(SAYS, "text")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} worker  INFO vid_1: two", first)
    assert second == "lines"
    assert "secret" not in " ".join(rest)
    assert "too little" not in " ".join(rest)


@pytest.fixture
def context_of():
    """``context_of()``: what a line that is written now would say it belongs to."""

    def ask() -> dict[str, str]:
        record = logging.makeLogRecord({})
        plain = set(record.__dict__)
        logs.add_context(record)
        return {name: value for name, value in record.__dict__.items() if name not in plain}

    return ask


def test_what_was_bound_goes_along_into_the_threadpool_and_not_elsewhere(context_of):
    found = {}

    async def request(number: int) -> None:
        with logs.bind(request_id=f"req_{number}"):
            await asyncio.sleep(0)
            found[number] = await run_in_threadpool(context_of)

    async def serve() -> None:
        await asyncio.gather(*(request(number) for number in range(3)))

    asyncio.run(serve())
    assert found == {number: {"request_id": f"req_{number}"} for number in range(3)}
    with logs.bind(job_id="vid_1"):
        thread = threading.Thread(target=lambda: found.update(bare=context_of()))
        thread.start()
        thread.join()
    assert found["bare"] == {}
    assert context_of() == {}


def test_what_a_call_says_itself_stands():
    record = logging.makeLogRecord({"request_id": "its own"})
    with logs.bind(request_id="req_1"):
        logs.add_context(record)
    assert record.request_id == "its own"


def test_no_program_writes_a_prompt_to_its_log(stack, client, example_image):
    prompt = "a red circle moves right quickly, static camera"
    send = {"image": (example_image.name, example_image.read_bytes())}
    done = client.post("/generate", files=send, data={"prompt": prompt}, headers={"Prefer": "wait=60"})
    assert done.json()["status"] == "succeeded", done.text
    refused = client.post("/generate", files=send, data={"prompt": "an unspeakable elephant"})
    assert refused.status_code == 422
    written = "".join(path.read_text() for path in stack.folder.rglob("*.log"))
    assert "service" in written
    assert "worker" in written
    assert not re.search(r"red circle|moves right|unspeakable|elephant", written)
