"""`/admin/distillations` over HTTP, on a real Redis with real trainers: ask, list, follow, and a whole small run."""

import asyncio
import json
import re
import time

import httpx
import pytest

from distill.recipes import RECIPES
from service.app import create_app
from service.distillation_schema import DistillationFields
from service.distillations import DistillationStore
from service.settings import Settings
from tests.stack import Stack, stop, wait_for
from tests.stand_in import MODELS, sha256_of
from worker.contract import TRAIN_OFFER_KEY, Named, Offer, Progress, Status
from worker.records import connect
from worker.releases import Releases
from worker.storage import Storage

PATH = "/admin/distillations"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Redis and a service; each test starts the trainer that it needs."""
    folder = tmp_path_factory.mktemp("own")
    running = Stack(folder, RUNS=str(folder / "runs"), STUDENTS=str(folder / "students"))
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
        ({"recipe": "squares"}, "recipe", f"recipe: got 'squares'; there are {', '.join(RECIPES)}"),
        ({"recipe": "shapes", "preset": "tiny"}, "preset", "preset: got 'tiny'; there are full, quick, smoke"),
        ({"preset": "smoke"}, "recipe", "recipe: Field required"),
        ({"recipe": "shapes", "set": ["seed=1"]}, "set", "set: Extra inputs are not permitted"),
        ({"recipe": 7}, "recipe", "recipe: Input should be a valid string"),
        (
            {"recipe": "shapes", "teacher": "/models/shapes-teacher"},
            "teacher",
            "teacher: got '/models/shapes-teacher'; there are shapes-teacher",
        ),
        ({"recipe": "shapes", "teacher": "https://x"}, "teacher", "teacher: got 'https://x'; there are shapes-teacher"),
        ({"recipe": "shapes", "dataset": "../x"}, "dataset", "dataset: got '../x'; there are shapes"),
        ({"recipe": "shapes", "promote": "now"}, "promote", "promote: Input should be 'auto' or 'manual'"),
        (
            {"recipe": "shapes", "overrides": {"pruning.fit.step": 4}},
            "overrides.pruning.fit.step",
            "overrides.pruning.fit.step: the recipe shapes has no such field; did you mean pruning.fit.steps?",
        ),
        (
            {"recipe": "shapes", "overrides": {"teacher": "/etc"}},
            "overrides.teacher",
            "overrides.teacher: this field is not one that a request may change",
        ),
        (
            {"recipe": "shapes", "overrides": {"pruning.fit.steps": "40"}},
            "overrides.pruning.fit.steps",
            'overrides.pruning.fit.steps: got "40"; Input should be a valid integer',
        ),
        (
            {"recipe": "shapes", "overrides": {"pruning.fit.steps": [[]]}},
            "overrides.pruning.fit.steps",
            "overrides.pruning.fit.steps: Value error, wanted a number, a text, true, false, or a list of two numbers",
        ),
        (
            {"recipe": "shapes", "overrides": {"gate.far": 3}},
            "overrides.gate.far",
            "overrides.gate.far: limits of the gate belong into gate",
        ),
        (
            {"recipe": "shapes", "gate": {"far": 0}},
            "gate.far",
            "gate.far: got 0; Input should be greater than or equal to 1",
        ),
        (
            {"recipe": "shapes", "gate": {"clips_from": "/etc"}},
            "gate.clips_from",
            "gate.clips_from: this field is not one that a request may change",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_name_of_its_field(client, body, param, says):
    answer = client.post(PATH, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["param"], error["message"]) == (param, says)
    assert client.get(PATH).json()["data"] == []


def test_numbers_that_json_cannot_say_are_refused_like_any_other(client):
    for number in ("NaN", "Infinity", "1e999"):
        body = '{"recipe": "shapes", "overrides": {"pruning.fit.learning_rate": NUMBER}}'.replace("NUMBER", number)
        answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "overrides.pruning.fit.learning_rate"


@pytest.fixture
def offer(own):
    """A trainer was here, with another teacher than the recipe's own."""
    redis = connect(own.redis.url)
    made = Offer(
        recipes=("shapes",),
        teachers=(Named(name="other-teacher", sha256="7d" * 32),),
        datasets=("shapes",),
        policy="serve-first",
        gpu="GPU-1",
    )
    redis.set(TRAIN_OFFER_KEY, made.model_dump_json())
    yield made
    redis.delete(TRAIN_OFFER_KEY)
    redis.close()


@pytest.mark.usefixtures("offer")
def test_a_teacher_is_one_of_those_that_the_trainer_has(client):
    refused = client.post(PATH, json={"recipe": "shapes"}).json()["error"]
    assert (refused["param"], refused["code"]) == ("teacher", "unknown_teacher")
    assert refused["message"] == "teacher: got 'shapes-teacher'; there are other-teacher"
    made = submit(client, teacher="other-teacher")
    assert (made["teacher"], made["dataset"], made["promote"]) == ("other-teacher", "shapes", "manual")


@pytest.mark.usefixtures("offer")
def test_recipes_are_listed_with_what_may_be_changed_of_them(client):
    listed = client.get("/admin/recipes").json()
    [recipe] = listed["data"]
    assert (recipe["name"], recipe["presets"]) == ("shapes", ["full", "quick", "smoke"])
    fields = {field["path"]: field for field in recipe["fields"]}
    steps = fields["pruning.fit.steps"]
    assert (steps["default"], steps["by_preset"], steps["type"]) == (2400, {"quick": 40, "smoke": 4}, "integer")
    assert {"far", "ground_truth.score", "reference.motion"} < {field["path"] for field in recipe["gate_fields"]}
    assert not {"teacher", "name", "compile"} & fields.keys()
    assert listed["teachers"] == [{"name": "other-teacher", "sha256": "7d" * 32}]
    assert (listed["datasets"], listed["trainer"]["policy"], listed["gpu"]) == (["shapes"], "serve-first", None)


def test_what_was_asked_for_stands_in_the_answer(client):
    asked = {
        "overrides": {"pruning.fit.steps": 80, "matching.scores.beta_1": [0.5, 1], "matching.critic.kind": "full"},
        "gate": {"ground_truth.score": 0.05},
        "promote": "auto",
    }
    made = submit(client, **asked)
    assert (made["overrides"], made["limits"], made["promote"]) == (asked["overrides"], asked["gate"], "auto")
    assert client.get(made["links"]["self"]).json() == made
    for way in ("log", "metrics", "samples", "checkpoints"):
        assert client.get(made["links"][way]).json().get("data", []) == []
    assert client.get(made["links"]["log"]).json() == {"lines": [], "last_id": None}


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
    store = DistillationStore(*clients, Storage(str(own.storage)))
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


def test_one_that_was_given_up_goes_on_with_all_its_attempts_before_it(own):
    clients = connect(own.redis.url), connect(own.redis.url, text=False)
    store = DistillationStore(*clients, Storage(str(own.storage)))
    record = store.submit(DistillationFields(recipe="shapes"), owner="local")
    lost = {"status": Status.FAILED, "attempt": 3, "deaths": 3, "error_code": "worker_crashed", "error_message": "x"}
    store.records.change(record, (Status.QUEUED,), **lost)
    store.go_on(record.id)
    after = store.get(record.id)
    assert (after.status, after.attempt, after.deaths) == (Status.QUEUED, 0, 0)
    store.cancel(record.id)
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


def test_one_that_has_failed_goes_on_and_one_that_waits_does_not(client, trainer):
    made = submit(client)
    answer = client.post(made["links"]["resume"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_resumable")
    client.post(made["links"]["cancel"])
    answer = client.post(made["links"]["resume"])
    assert (answer.status_code, answer.json()["status"], answer.json()["finished_at"]) == (202, "queued", None)
    trainer("tests.stand_in", "trainer", "refuses")
    assert wait_until_over(client, made, 30)["status"] == "failed"
    assert client.get(made["links"]["log"]).json()["lines"] == ["error: nowhere is no model folder"]


def test_it_is_followed_over_server_sent_events_to_its_end(client, own, trainer):
    made = submit(client)
    (own.folder / "runs" / made["id"]).mkdir(parents=True)
    (own.folder / "runs" / made["id"] / "go").touch()
    trainer("tests.stand_in", "trainer", "fails_the_gate")
    seen = []
    with client.stream("GET", made["links"]["events"], timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "data":
                seen.append(json.loads(value))
            elif name == "event":
                assert value == "distillation"
            elif name == "id":
                last_id = value
    assert [seen[0]["status"], seen[-1]["status"]] == ["queued", "succeeded"]
    assert seen[-1]["gate"]["refusals"] == ["reference, motion: the videos stand still"]
    assert {"training", "gate", None} <= {view["phase"] for view in seen}
    again = client.get(made["links"]["events"], headers={"Last-Event-ID": last_id})
    assert again.text.count("event: distillation") == 1
    # Lines go on after those that were read.
    first = client.get(made["links"]["metrics"]).json()
    assert [event["step"] for event in first["data"]][-1] == 8
    rest = client.get(made["links"]["metrics"], params={"after": first["last_id"]}).json()
    assert rest == {"data": [], "last_id": first["last_id"]}
    assert client.get(made["links"]["log"], params={"after": "x"}).json()["error"]["param"] == "after"


def test_a_recipe_becomes_a_student_that_is_judged_and_kept(client, own, trainer):
    """The whole way, with the real commands: stages, gate, storage, registry, and all that is reported of it."""
    # Four updates make no good student; whether one passes is not what this is about.
    made = submit(client, preset="smoke", promote="auto", overrides={"pruning.fit.steps": 3}, gate={"far": 2.0})
    trainer("worker.trainer")
    seen, phases = set(), set()

    def over() -> bool:
        now = client.get(made["links"]["self"]).json()
        seen.add((now["progress"] or {}).get("stage"))
        phases.add(now["phase"])
        return Status(now["status"]).is_terminal

    wait_for(over, 280, f"the student:\n{own.log('worker.trainer')}")
    after = client.get(made["links"]["self"]).json()
    assert after["status"] == "succeeded", after
    assert (after["progress"]["stage"], after["attempt"], after["error"]) == ("student", 1, None)
    assert seen & {"latents", "importance", "pruning", "matching"}
    assert {"training", "gate"} <= phases
    student = own.folder / "runs" / after["student"]
    assert after["student_sha256"] == sha256_of(student)
    assert client.post(made["links"]["cancel"]).json()["error"]["code"] == "already_over"

    assert (len(after["importance"]["drop"]), len(after["importance"]["pruned"])) == (10, 3)
    gate = after["gate"]
    assert (gate["passed"], gate["against"]) == (False, sha256_of(MODELS / "shapes-4step"))
    assert gate["refusals"]
    assert (after["release"], after["note"]) == (None, None)
    for url, begins in ((gate["report_url"], b"# "), (gate["plot_url"], b"\x89PNG"), (gate["sheet_url"], b"\x89PNG")):
        assert client.get(url).content.startswith(begins)
    redis = connect(own.redis.url)
    [kept] = [one for one in Releases(redis).students() if one.distillation == made["id"]]
    assert (kept.sha256, kept.gate.passed, Releases(redis).state().active) == (after["student_sha256"], False, None)
    redis.close()

    samples = {one["name"]: one for one in client.get(made["links"]["samples"]).json()["data"]}
    assert {"importance.png", "importance.json", "matching-000003.png", "student.png", "report.md"} < samples.keys()
    assert samples["student.png"]["kind"] == "sheet"
    shown = client.get(samples["importance.json"]["url"])
    assert (shown.headers["content-type"], shown.json()["pruned"]) == (
        "application/json",
        after["importance"]["pruned"],
    )
    assert client.get(made["links"]["samples"] + "/nothing.png").json()["error"]["code"] == "not_found"
    data = client.get(made["links"]["metrics"]).json()["data"]
    fitted = [one for one in data if one["stage"] == "matching" and "loss" in one["values"]]
    assert [one["step"] for one in fitted] == [1, 2, 3]
    for one in fitted:
        assert one["values"]["steps_per_s"] > 0
        assert one["values"]["memory_mb"] > 100
        assert any(name.startswith("critic_gap_s") for name in one["values"])
    assert [one["steps"] for one in data if one["stage"] == "pruning" and "loss" in one["values"]] == [3, 3, 3]
    checkpoints = client.get(made["links"]["checkpoints"]).json()["data"]
    assert [one["stage"] for one in checkpoints] == ["pruning", "matching"]
    lines = client.get(made["links"]["log"]).json()["lines"]
    assert any(line.startswith("importance: blocks") for line in lines)


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
                await client.get("/admin/recipes"),
            ]

    for answer in asyncio.run(answers()):
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_key")
