"""Requests that nobody wrote, to every route of `/openapi.json`: data that fits its schemas, and data that does not.

`FUZZ_CASES` is how many there are; `make fuzz` sends thousands.
"""

import base64
import math
import os
import sys
from collections import Counter

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
SCHEMA = response_schema_conformance
CHECKS = [status_code_conformance, content_type_conformance, response_headers_conformance, SCHEMA]

HELP = st.fixed_dictionaries(
    {"id": st.integers(0, 3), "picture": st.booleans(), "prompt": st.integers(0, 3), "rest": st.integers(0, 3)}
)
"""Random data alone does not get past the first hurdles: most cases are helped over some of them."""

pytestmark = pytest.mark.timeout(max(300, CASES))


class Fuzz:
    """One run against one stack."""

    def __init__(self, stack, url: str, image: bytes) -> None:
        self.stack = stack
        self.url = url
        self.image = image
        self.session = requests.Session()
        self.ids: dict[str, list[str]] = {"vid": [], "dist": []}
        """Of jobs that are there."""
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
            own_end = self.count + math.ceil((end - self.count) / (len(operations) - number))
            self.try_one(operation, GenerationMode.NEGATIVE, max(1, (own_end - self.count) // 2))
            self.try_one(operation, GenerationMode.POSITIVE, max(1, own_end - self.count))

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
        @given(case=operation.as_strategy(generation_mode=mode), help_=HELP)
        def one(case, help_) -> None:
            self.send(case, help_)

        try:
            one()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # there is nothing that it could be given

    def send(self, case, help_: dict[str, int]) -> None:
        """One request, and what is to be said of its answer."""
        self.help_path(case, help_)
        if isinstance(case.body, dict):
            self.help_body(case, help_)
        if help_["rest"]:
            for name in ("x-deadline", "x-deadline-start", "idempotency-key"):
                case.headers.pop(name, None)
        response = case.call(session=self.session, timeout=60)
        self.statuses[case.operation.label, response.status_code] += 1
        if case.path == "/admin/queue/pause":  # nothing that runs after this is to wait for ever
            requests.post(f"{self.url}/admin/queue/resume", timeout=60).raise_for_status()
        self.note(case, response)
        try:
            self.check(case, response)
        except (AssertionError, FailureGroup) as error:
            what = f"{case.operation.label} {response.status_code} {str(error).splitlines()[0]}"
            self.problems.setdefault(what, f"{error}\n{case.as_curl_command()[:2000]}\n{response.text[:2000]}")

    def help_path(self, case, help_: dict[str, int]) -> None:
        """To what is there."""
        parameters = case.path_parameters
        if help_["id"] and "job_id" in parameters:
            ids = self.ids["dist" if "distillations" in case.path else "vid"] or self.make_jobs()
            parameters["job_id"] = ids[-1 - help_["id"] % len(ids)]
        if help_["id"] and "suffix" in parameters:
            parameters["suffix"] = ("mp4", "jpg", "json")[help_["id"] - 1]
        if help_["id"] and "variant" in case.query:
            case.query["variant"] = ("video", "thumbnail")[help_["id"] % 2]
        if help_["id"] and "name" in parameters:
            parameters["name"] = "red-circle" if "examples" in case.path else "shapes-4step"

    def help_body(self, case, help_: dict[str, int]) -> None:
        """With a picture, a prompt or a recipe; and by leaving away what would be refused anyhow."""
        is_form = case.media_type == "multipart/form-data"
        url = "data:image/png;base64," + base64.b64encode(self.image).decode()
        for name in IMAGE_FIELDS:
            if name in case.body and help_["picture"]:
                case.body[name] = self.image if is_form else url
                case.body.pop("video", None)
        if "prompt" in case.body and help_["prompt"]:
            case.body["prompt"] = PROMPT
        if "recipe" in case.body and help_["prompt"]:
            case.body.update(recipe="shapes", preset="smoke")
        if help_["rest"]:
            known = {*IMAGE_FIELDS, "prompt", "recipe", "preset", "seed"}
            case.body = {name: value for name, value in case.body.items() if name in known}

    def make_jobs(self) -> list[str]:
        """Two videos, one of which has a webhook, and the first distillation; the ids of the former."""
        for more in ({}, {"webhook_url": "https://hooks.example.org/x"}):
            fields = {"prompt": PROMPT, **more}
            made = requests.post(f"{self.url}/generate", files={"image": self.image}, data=fields, timeout=60)
            assert made.status_code == 202, made.text
            self.keep(made.json()["id"])
        if not self.ids["dist"]:
            recipe = {"recipe": "shapes", "preset": "smoke"}
            made = requests.post(f"{self.url}/admin/distillations", json=recipe, timeout=60)
            assert made.status_code == 202, made.text
            self.keep(made.json()["id"])
        return self.ids["vid"]

    def keep(self, job_id: str) -> None:
        self.made.add(job_id)
        ids = self.ids[job_id.partition("_")[0]]
        if job_id not in ids:
            ids.append(job_id)

    def note(self, case, response) -> None:
        """Remember the id of what has been made, and forget what is there no more."""
        if case.method == "DELETE" and response.status_code in (200, 204):
            self.ids["vid"].remove(case.path_parameters["job_id"])
            return
        if response.status_code not in (200, 202) or response.headers.get("content-type") != ["application/json"]:
            return
        body = response.json()
        job_id = body.get("id") if isinstance(body, dict) else None
        if isinstance(job_id, str) and job_id.startswith(("vid_", "dist_")):
            self.keep(job_id)

    def check(self, case, response) -> None:
        status = response.status_code
        assert status < 500 or status in (503, 507), "a server error"
        if status >= 400:
            error = response.json().get("error", {})
            assert set(error) == {"message", "type", "param", "code"}, "not in the envelope"
            assert 0 < len(error["message"]) <= 2100, "a message of no use"
        assert not [text for text in self.private if text in response.content], "it tells of the machine"
        is_stream = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
        # It holds each event against the schema of the whole.
        case.validate_response(response, checks=[check for check in CHECKS if not (is_stream and check is SCHEMA)])

    def clean_up(self) -> None:
        """Leave what other tests may look at as it was."""
        requests.post(f"{self.url}/admin/queue/resume", timeout=60).raise_for_status()
        for job_id in self.made:
            if job_id.startswith("vid_"):
                assert requests.delete(f"{self.url}/generate/{job_id}", timeout=60).status_code in (204, 404)
        connection = connect(self.stack.redis.url)
        for job_id in self.made:
            if job_id.startswith("dist_"):
                requests.post(f"{self.url}/admin/distillations/{job_id}/cancel", timeout=60)
                Records(connection, Distillation).delete(job_id)
            connection.zrem(WEBHOOKS_DUE_KEY, job_id)
        connection.close()


@pytest.fixture
def fuzz(stack, example_image):
    # Thousands of requests are more than one client may send, and would mostly be told so.
    with stack.second_service(KEY_PER_MINUTE="0", KEY_MAX_JOBS="0") as url:
        running = Fuzz(stack, url, example_image.read_bytes())
        yield running
        running.clean_up()
        running.session.close()


def test_no_request_that_can_be_thought_of_breaks_the_service(stack, fuzz):
    schema = schemathesis.openapi.from_url(f"{fuzz.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    fuzz.make_jobs()
    with_bodies = [operation for operation in operations if operation.body]
    fuzz.try_all([operation for operation in operations if not operation.body], CASES // 2)
    fuzz.try_all(with_bodies, CASES - fuzz.count)

    assert not fuzz.problems, "\n\n".join(f"{what}\n{more}" for what, more in fuzz.problems.items())
    assert fuzz.count >= CASES
    assert {label for label, _ in fuzz.statuses} == {operation.label for operation in operations}
    # It came further than to the first check: some were taken. (Of releases there is only the first student.)
    for operation in with_bodies:
        if operation.path.startswith("/admin/students"):
            continue
        assert any(fuzz.statuses[operation.label, status] for status in (200, 202)), operation.label
    with redis.Redis.from_url(stack.redis.url) as connection:  # and every place was given back
        wait_for(lambda: connection.zcount("flg:slots", "-inf", "(+inf") == 0, 30, "reserved places to be given back")
