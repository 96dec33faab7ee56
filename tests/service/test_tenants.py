"""Idempotency, limits and tenants over HTTP: a service that needs keys, on the stack's Redis and worker."""

import threading

import httpx
import pytest

from service.auth import Keys, new_key
from tests.stack import wait_for
from worker.records import connect

PROMPT = "a red circle moves right quickly, static camera"


@pytest.fixture(scope="module")
def keys(stack):
    redis = connect(stack.redis.url)
    yield Keys(redis)
    redis.close()


@pytest.fixture(scope="module")
def locked(stack):
    with stack.second_service(AUTH="on", MAX_WAIT_S="100000", MAX_QUEUED="1000") as url:
        yield url


@pytest.fixture
def tenant(keys, locked):
    """``tenant(**limits)``: a client of a new key that may generate and read."""
    clients = []

    def make(**limits: int) -> httpx.Client:
        text = new_key()
        keys.add(text, "tenant", ("generate", "read"), **limits)
        clients.append(httpx.Client(base_url=locked, headers={"Authorization": f"Bearer {text}"}, timeout=90))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def paused(stack):
    """The worker takes no job: what is sent stays queued."""
    httpx.post(f"{stack.url}/admin/queue/pause").raise_for_status()
    yield
    httpx.post(f"{stack.url}/admin/queue/resume").raise_for_status()


def send(client: httpx.Client, image, seed: int | None = None, **headers: str) -> httpx.Response:
    form = {"prompt": PROMPT} if seed is None else {"prompt": PROMPT, "seed": str(seed)}
    return client.post("/generate", files={"image": image.read_bytes()}, data=form, headers=headers)


def test_one_key_does_not_see_anothers_jobs(tenant, example_image):
    anna, bert = tenant(), tenant()
    job = send(anna, example_image, Prefer="wait=60").json()
    assert job["status"] == "succeeded"
    path = f"/generate/{job['id']}"
    assert anna.get(path).json()["id"] == job["id"]
    assert [one["id"] for one in anna.get("/generate").json()["data"]] == [job["id"]]
    assert bert.get("/generate").json()["data"] == []
    video = httpx.URL(job["video_url"]).copy_with(query=None)
    for answer in (
        bert.get(path),
        bert.get(f"{path}/events"),
        bert.post(f"{path}/cancel"),
        bert.post(f"{path}/webhook"),
        bert.delete(path),
        bert.get(f"/v1/videos/{job['id']}"),
        bert.get(f"/v1/videos/{job['id']}/content"),
        bert.post(f"/v1/videos/{job['id']}/remix", json={"prompt": PROMPT}),
        bert.delete(f"/v1/videos/{job['id']}"),
        bert.get(video),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), answer.request.url
    assert anna.get(video).status_code == 200
    assert httpx.get(video).status_code == 401
    assert httpx.get(job["video_url"]).status_code == 200  # whoever has the link
    assert bert.get("/generate", params={"after": job["id"]}).json()["error"]["code"] == "unknown_cursor"
    assert anna.delete(path).status_code == 204


def test_a_request_that_is_sent_again_is_one_job(tenant, example_image):
    client = tenant()
    key = {"Idempotency-Key": "order-17"}
    first = send(client, example_image, **key)
    again = send(client, example_image, **key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    other = send(client, example_image, seed=5, **key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert other.json()["error"]["param"] == "Idempotency-Key"
    assert send(tenant(), example_image, seed=5, **key).status_code == 202
    retried = send(client, example_image, **{"x-stainless-retry-count": "1"})
    assert retried.json()["id"] == first.json()["id"]
    assert send(client, example_image).json()["id"] != first.json()["id"]
    bad = send(client, example_image, **{"Idempotency-Key": "a b"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "Idempotency-Key")


@pytest.mark.usefixtures("paused")
def test_the_same_request_from_many_sides_at_once_is_one_job(tenant, example_image):
    client = tenant()
    ids = []

    def one() -> None:
        ids.append(send(client, example_image, **{"Idempotency-Key": "same"}).json()["id"])

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 12 and len(set(ids)) == 1
    client.delete(f"/generate/{ids[0]}")


@pytest.mark.usefixtures("paused")
def test_a_key_has_its_limits_and_bad_requests_give_their_places_back(tenant, example_image):
    client = tenant(max_jobs=2)
    for _ in range(5):
        broken = client.post("/generate", files={"image": example_image.read_bytes()[:200]}, data={"prompt": PROMPT})
        assert broken.status_code == 422
    jobs = [send(client, example_image) for _ in range(2)]
    assert [job.status_code for job in jobs] == [202, 202]
    refused = send(client, example_image)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_jobs")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert client.post(f"/generate/{jobs[0].json()['id']}/cancel").json()["status"] == "cancelled"
    assert send(client, example_image).status_code == 202
    hasty = tenant(per_minute=1)
    assert send(hasty, example_image).status_code == 202
    refused = send(hasty, example_image)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    for one in (client, hasty):
        for job in one.get("/generate").json()["data"]:
            one.delete(f"/generate/{job['id']}")


@pytest.mark.usefixtures("paused")
def test_places_in_line_are_counted_over_all_keys(tenant, example_image):
    anna, bert = tenant(), tenant()
    # A worker that was waiting for a job already takes the first yet.
    sent = [send(client, example_image).json() for client in (anna, anna, bert, anna)]
    last = anna.get(f"/generate/{sent[3]['id']}").json()
    wait_for(
        lambda: anna.get(f"/generate/{sent[0]['id']}").json()["status"] in ("queued", "succeeded"), 30, "the first"
    )
    place = bert.get(f"/generate/{sent[2]['id']}").json()["queue_position"]
    last = anna.get(f"/generate/{sent[3]['id']}").json()
    assert (last["status"], last["queue_position"]) == ("queued", place + 1)
    assert last["eta_seconds"] > 0
    for client, job in zip((anna, anna, bert, anna), sent, strict=True):
        client.delete(f"/generate/{job['id']}")


@pytest.mark.usefixtures("paused")
def test_a_deadline_that_cannot_be_met_is_said_at_once(tenant, example_image):
    client = tenant()
    jobs = [send(client, example_image).json() for _ in range(3)]
    late = send(client, example_image, **{"X-Deadline-Start": "0.01"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline_out_of_reach")
    nonsense = send(client, example_image, **{"X-Deadline": "soon"})
    assert (nonsense.status_code, nonsense.json()["error"]["param"]) == (422, "X-Deadline")
    for job in jobs:
        client.delete(f"/generate/{job['id']}")
