"""Requests that nobody wrote, to every route of `/openapi.json`: data that fits its schemas, and data that does not.

`FUZZ_CASES` is how many there are; `make fuzz` sends thousands.
"""

import base64
import os
import sys
from collections import Counter, deque

import pytest
import redis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.stack import wait_for
from worker.contract import WEBHOOKS_DUE_KEY, Distillation
from worker.records import Records, connect

CASES = int(os.environ.get("FUZZ_CASES", "300"))
PROMPT = "a red circle moves right quickly, static camera"
IMAGE_FIELDS = ("image", "input_reference")
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

pytestmark = pytest.mark.timeout(max(300, CASES))


class Fuzz:
    """One run against one stack."""

    def __init__(self, stack, image: bytes) -> None:
        self.stack = stack
        self.image = image
        self.session = requests.Session()
        self.ids: dict[str, deque[str]] = {"vid": deque(maxlen=20), "dist": deque(maxlen=20)}
        self.made: set[str] = set()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.problems: dict[str, str] = {}
        """By what is wrong, so that each is reported once."""
        # Nothing of the machine may be in an answer; `python` stands in links of tracebacks.
        private = (str(stack.root), str(stack.folder), str(stack.storage), sys.prefix, "site-packages", "Traceback")
        self.private = [text.encode() for text in private]

    @property
    def count(self) -> int:
        return self.statuses.total()

    def try_all(self, operations, cases: int) -> None:
        """So many requests in all; what an operation has no use for is left to those after it."""
        end = self.count + cases
        for number, operation in enumerate(operations):
            for mode in GenerationMode:
                left = (end - self.count) / (len(operations) - number)
                self.try_one(operation, mode, max(1, round(left / (2 if mode is GenerationMode.POSITIVE else 1))))

    def try_one(self, operation, mode: GenerationMode, cases: int) -> None:
        # The same cases each time, and no smaller ones of those that fail: the service is another after each.
        @settings(
            max_examples=cases,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), helped=st.tuples(*[st.integers(0, 3)] * 4))
        def one(case, helped) -> None:
            self.send(case, *helped)

        try:
            one()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # there is nothing that it could be given

    def send(self, case, id_, picture: int, sentence: int, headers: int) -> None:
        """One request, half of them helped past the first hurdles: to an id, a picture or a prompt that is there."""
        if id_ % 2 and "job_id" in case.path_parameters:
            ids = self.ids["dist" if "distillations" in case.path else "vid"]
            case.path_parameters["job_id"] = ids[-1 - id_ % len(ids)]
            if "suffix" in case.path_parameters and picture % 2:
                case.path_parameters["suffix"] = ("mp4", "jpg", "json")[sentence % 3]
        if "name" in case.path_parameters and id_ % 2:
            case.path_parameters["name"] = "red-circle" if "examples" in case.path else "shapes-4step"
        if isinstance(case.body, dict):
            self.help_body(case, picture, sentence)
        if headers % 2:
            for name in ("x-deadline", "x-deadline-start", "idempotency-key"):
                case.headers.pop(name, None)
        response = case.call(session=self.session, timeout=60)
        self.statuses[case.operation.label, response.status_code] += 1
        if case.path == "/admin/queue/pause":  # nothing that runs after this is to wait for ever
            requests.post(f"{self.stack.url}/admin/queue/resume", timeout=60).raise_for_status()
        self.note(response)
        try:
            self.check(case, response)
        except (AssertionError, FailureGroup) as error:
            what = f"{case.operation.label} {response.status_code} {str(error).splitlines()[0]}"
            self.problems.setdefault(what, f"{error}\n{case.as_curl_command()[:2000]}\n{response.text[:2000]}")

    def help_body(self, case, picture: int, sentence: int) -> None:
        is_form = case.media_type == "multipart/form-data"
        url = "data:image/png;base64," + base64.b64encode(self.image).decode()
        for name in IMAGE_FIELDS:
            if name in case.body and picture % 2:
                case.body[name] = self.image if is_form else url if picture == 1 else {"image_url": url}
        if "prompt" in case.body and sentence % 2:
            case.body["prompt"] = PROMPT
            for name in ("model", "steps", "size", "seconds"):
                case.body.pop(name, None)
        if "recipe" in case.body and picture % 2:
            case.body.update(recipe="shapes", preset="smoke")
        if sentence == 3:  # nor anything else that would be refused
            known = {*IMAGE_FIELDS, "prompt", "recipe", "preset"}
            case.body = {name: value for name, value in case.body.items() if name in known}

    def note(self, response) -> None:
        """Remember the id of what has been made."""
        if response.status_code not in (200, 202) or response.headers.get("content-type") != ["application/json"]:
            return
        body = response.json()
        job_id = body.get("id") if isinstance(body, dict) else None
        if isinstance(job_id, str) and job_id not in self.made:
            self.made.add(job_id)
            if (ids := self.ids.get(job_id.partition("_")[0])) is not None:
                ids.append(job_id)

    def check(self, case, response) -> None:
        status = response.status_code
        assert status < 500 or status in (503, 507), "a server error"
        if status >= 400:
            error = response.json().get("error", {})
            assert set(error) == {"message", "type", "param", "code"}, "not in the envelope"
            assert 0 < len(error["message"]) <= 2100, "a message of no use"
        assert not [text for text in self.private if text in response.content], "it tells of the machine"
        case.validate_response(response, checks=CHECKS)

    def clean_up(self) -> None:
        """Leave what other tests may look at as it was."""
        requests.post(f"{self.stack.url}/admin/queue/resume", timeout=60).raise_for_status()
        for job_id in self.made:
            if job_id.startswith("vid_"):
                assert requests.delete(f"{self.stack.url}/generate/{job_id}", timeout=60).status_code in (204, 404)
        connection = connect(self.stack.redis.url)
        for job_id in self.made:
            if job_id.startswith("dist_"):
                requests.post(f"{self.stack.url}/admin/distillations/{job_id}/cancel", timeout=60)
                Records(connection, Distillation).delete(job_id)
            connection.zrem(WEBHOOKS_DUE_KEY, job_id)
        connection.close()


@pytest.fixture
def fuzz(stack, example_image):
    running = Fuzz(stack, example_image.read_bytes())
    yield running
    running.clean_up()
    running.session.close()


def test_no_request_that_can_be_thought_of_breaks_the_service(stack, fuzz):
    schema = schemathesis.openapi.from_url(f"{stack.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    for more in ({}, {"webhook_url": "https://hooks.example.org/x"}):  # there is something to look at, and to delete
        fields = {"prompt": PROMPT, **more}
        made = requests.post(f"{stack.url}/generate", files={"image": fuzz.image}, data=fields, timeout=60)
        fuzz.ids["vid"].append(made.json()["id"])
        fuzz.made.add(made.json()["id"])
    made = requests.post(f"{stack.url}/admin/distillations", json={"recipe": "shapes", "preset": "smoke"}, timeout=60)
    fuzz.ids["dist"].append(made.json()["id"])
    fuzz.made.add(made.json()["id"])

    with_bodies = [operation for operation in operations if operation.body]
    fuzz.try_all([operation for operation in operations if not operation.body], CASES // 2)
    fuzz.try_all(with_bodies, CASES - fuzz.count)

    assert not fuzz.problems, "\n\n".join(f"{what}\n{more}" for what, more in fuzz.problems.items())
    assert fuzz.count >= CASES
    assert {label for label, _ in fuzz.statuses} == {operation.label for operation in operations}
    # It came further than to the first check: some were taken.
    for operation in with_bodies:
        assert any(fuzz.statuses[operation.label, status] for status in (200, 202)), operation.label
    with redis.Redis.from_url(stack.redis.url) as connection:  # and every place was given back
        wait_for(lambda: connection.zcount("flg:slots", "-inf", "(+inf") == 0, 30, "reserved places to be given back")
