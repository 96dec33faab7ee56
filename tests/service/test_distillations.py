"""`/admin/distillations` over HTTP, on a real Redis with real trainers: ask, list, cancel, and a whole small run."""

import asyncio
import re
import time

import httpx
import pytest

from service.app import create_app
from service.distillations import DistillationStore
from service.schema import DistillationFields
from service.settings import Settings
from tests.stack import Stack, stop, wait_for
from worker.contract import Progress, Status
from worker.records import connect

PATH = "/admin/distillations"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Redis and a service; each test starts the trainer that it needs."""
    folder = tmp_path_factory.mktemp("own")
    running = Stack(folder, RUNS=str(folder / "runs"))
    running.redis.start()
    running.spawn("service")
    yield running
    running.stop()


@pytest.fixture
def client(own):
    with httpx.Client(base_url=own.url, timeout=20) as http:

        def answers() -> bool:
            try:
                return http.get("/livez").is_success
            except httpx.TransportError:
                return False

        wait_for(answers, 30, f"the service:\n{own.log('service')}")
        yield http
        for made in http.get(PATH, params={"limit": 100}).json()["data"]:
            http.post(f"{PATH}/{made['id']}/cancel")


@pytest.fixture
def trainer(own):
    """Starts a trainer; it is stopped with the test."""
    started = []

    def start(module: str, *arguments: str) -> None:
        started.append(own.spawn(module, *arguments))

    yield start
    for process in started:
        stop(process)


def submit(client, **body) -> dict:
    answer = client.post(PATH, json={"recipe": "shapes", **body})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == answer.json()["links"]["self"]
    return answer.json()


def wait_until_over(client, made: dict, seconds: float) -> dict:
    def over() -> bool:
        return Status(client.get(made["links"]["self"]).json()["status"]).is_terminal

    wait_for(over, seconds, f"the end of {client.get(made['links']['self']).text}")
    return client.get(made["links"]["self"]).json()


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"recipe": "squares"}, "recipe", "recipe: got 'squares'; there are shapes"),
        ({"recipe": "shapes", "preset": "tiny"}, "preset", "preset: got 'tiny'; there are full, quick, smoke"),
        ({"preset": "smoke"}, "recipe", "recipe: Field required"),
        ({"recipe": "shapes", "set": ["seed=1"]}, "set", "set: Extra inputs are not permitted"),
        ({"recipe": 7}, "recipe", "recipe: Input should be a valid string"),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_name_of_its_field(client, body, param, says):
    answer = client.post(PATH, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["param"], error["message"]) == (param, says)
    assert client.get(PATH).json()["data"] == []


def test_it_waits_for_a_trainer_and_is_cancelled_at_once_while_it_waits(client):
    made = submit(client, preset="quick")
    assert re.fullmatch(r"dist_[0-9a-z]{26}", made["id"])
    assert (made["status"], made["recipe"], made["preset"], made["attempt"]) == ("queued", "shapes", "quick", 0)
    assert client.get(made["links"]["self"]).json() == made
    cancelled = client.post(made["links"]["cancel"])
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert client.post(made["links"]["cancel"]).json() == cancelled.json()


def test_they_are_listed_newest_first_page_by_page(client):
    made = [submit(client)["id"] for _ in range(3)]
    first = client.get(PATH, params={"limit": 2}).json()
    assert [one["id"] for one in first["data"]] == [made[2], made[1]]
    assert first["has_more"]
    second = client.get(PATH, params={"limit": 2, "after": first["last_id"]}).json()
    assert second["data"][0]["id"] == made[0]


@pytest.mark.parametrize("job_id", ["dist_" + "0" * 26, "vid_" + "0" * 26, "dist_..", "x"])
def test_what_is_no_distillation_is_not_found(client, job_id):
    for answer in (client.get(f"{PATH}/{job_id}"), client.post(f"{PATH}/{job_id}/cancel")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "no distillation" in answer.json()["error"]["message"]


def test_no_more_wait_than_may(client):
    answers = [client.post(PATH, json={"recipe": "shapes"}) for _ in range(21)]
    assert [answer.status_code for answer in answers] == [202] * 20 + [503]
    assert (answers[-1].json()["error"]["code"], answers[-1].headers["retry-after"]) == ("queue_full", "120")


def test_what_the_queue_has_lost_is_enqueued_again_and_keeps_its_progress(own, monkeypatch):
    clients = connect(own.redis.url), connect(own.redis.url, text=False)
    store = DistillationStore(*clients)
    record = store.submit(DistillationFields(recipe="shapes"), owner="local")
    progress = Progress(stage="pruning", step=3, values={"loss": 0.5})
    store.records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1, progress=progress)
    store._queue.empty()
    assert store.reconcile() == 0  # it may still be on its way there
    monkeypatch.setattr("service.store.now", lambda: time.time() + 60)
    assert store.reconcile() == 1
    assert (store.get(record.id).status, store.get(record.id).progress) == (Status.QUEUED, progress)
    assert store._queue.job_ids == [record.id]
    for client in clients:
        client.close()


def test_why_a_run_was_refused_reaches_the_client(client, trainer):
    made = submit(client)
    trainer("tests.stand_in", "trainer", "refuses")
    after = wait_until_over(client, made, 30)
    assert after["status"] == "failed"
    assert after["error"] == {
        "message": "nowhere is no model folder",
        "type": "distillation_error",
        "param": None,
        "code": "invalid_run",
    }


def test_a_recipe_becomes_a_student(client, own, trainer):
    made = submit(client, preset="smoke")
    trainer("worker.trainer")
    seen = set()

    def over() -> bool:
        now = client.get(made["links"]["self"]).json()
        seen.add((now["progress"] or {}).get("stage"))
        return Status(now["status"]).is_terminal

    wait_for(over, 200, f"the student:\n{own.log('worker.trainer')}")
    after = client.get(made["links"]["self"]).json()
    assert after["status"] == "succeeded", after
    assert (after["progress"]["stage"], after["attempt"], after["error"]) == ("student", 1, None)
    assert seen & {"latents", "importance", "pruning", "matching"}
    assert (own.folder / "runs" / after["student"] / "student.json").is_file()
    assert client.post(made["links"]["cancel"]).json()["error"]["code"] == "already_over"


def test_where_others_reach_the_service_admin_needs_a_key(redis_server, tmp_path):
    app = create_app(Settings(host="0.0.0.0", redis_url=redis_server.url, storage_url=str(tmp_path)))

    async def answers() -> list[httpx.Response]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            return [
                await client.post(PATH, json={"recipe": "shapes"}),
                await client.get(PATH),
                await client.post(f"{PATH}/dist_{'0' * 26}/cancel"),
            ]

    for answer in asyncio.run(answers()):
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_key")
