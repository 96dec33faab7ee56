"""What an administrator sees and does beside distillations: workers, the queue, webhooks that were given up."""

import httpx
import pytest

from tests.stack import Stack, wait_for
from worker.contract import WEBHOOKS_DEAD_KEY, WEBHOOKS_DUE_KEY
from worker.records import connect, now

PROMPT = "a red circle moves right quickly, static camera"


def statuses(client: httpx.Client, ids: list[str]) -> list[str]:
    return [client.get(f"/generate/{job_id}").json()["status"] for job_id in ids]


def test_workers_are_listed(client):
    [worker] = client.get("/admin/workers").json()["data"]
    exactly = f"shapes-4step@{worker['model_sha256'][:12]}"
    assert (worker["model"], worker["models"], worker["state"]) == ("shapes-4step", [exactly], "ready")


def test_while_it_is_paused_jobs_are_taken_and_wait(client, example_image):
    ids = []
    try:
        assert client.post("/admin/queue/pause").json()["paused"]
        for seed in range(4):
            files = {"image": example_image.read_bytes()}
            answer = client.post("/generate", files=files, data={"prompt": PROMPT, "seed": str(seed)})
            assert answer.status_code == 202
            ids.append(answer.json()["id"])
        # The worker was waiting for a job already, and may take that one yet.
        wait_for(lambda: "running" not in statuses(client, ids), 30, "the worker to rest")
        waiting = statuses(client, ids)
        assert waiting.count("queued") >= 3
        assert client.get("/admin/queue").json() == {"waiting": waiting.count("queued"), "paused": True}
    finally:
        assert not client.post("/admin/queue/resume").json()["paused"]
    wait_for(lambda: statuses(client, ids) == ["succeeded"] * 4, 60, "the jobs")


@pytest.fixture
def dead(client, stack: Stack, example_image):
    """A job whose webhook was given up. No courier runs here."""
    files = {"image": example_image.read_bytes()}
    told = {"prompt": PROMPT, "webhook_url": "https://hooks.example.org/x", "metadata": '{"order": "17"}'}
    job = client.post("/generate", files=files, data=told, headers={"Prefer": "wait=60"}).json()
    assert (job["webhook"]["status"], job["metadata"]) == ("pending", {"order": "17"})
    redis = connect(stack.redis.url)
    redis.zrem(WEBHOOKS_DUE_KEY, job["id"])
    redis.zadd(WEBHOOKS_DEAD_KEY, {job["id"]: now()})
    redis.hset(f"flg:webhook:{job['id']}", mapping={"attempts": 8, "last_status": 500, "dead_at": now()})
    yield job["id"], redis
    redis.close()


def test_a_webhook_that_was_given_up_is_listed_and_sent_again(client, dead):
    job_id, redis = dead
    assert client.get(f"/generate/{job_id}").json()["webhook"]["status"] == "dead"
    listed = client.get("/admin/webhooks").json()["data"]
    assert [(one["id"], one["attempts"], one["last_status"]) for one in listed] == [(job_id, 8, 500)]
    assert client.post(f"/admin/webhooks/{job_id}/replay").status_code == 202
    assert redis.zscore(WEBHOOKS_DUE_KEY, job_id) <= now()
    assert client.get("/admin/webhooks").json()["data"] == []
    assert client.get(f"/generate/{job_id}").json()["webhook"]["status"] == "pending"


def test_whose_job_it_was_may_have_it_sent_again(client, dead):
    job_id, redis = dead
    assert client.post(f"/generate/{job_id}/webhook").json()["webhook"]["status"] == "pending"
    assert redis.zscore(WEBHOOKS_DUE_KEY, job_id) is not None


def test_where_there_is_no_webhook_there_is_nothing_to_send(client, example_image):
    files = {"image": example_image.read_bytes()}
    job = client.post("/generate", files=files, data={"prompt": PROMPT}, headers={"Prefer": "wait=60"}).json()
    assert client.post(f"/generate/{job['id']}/webhook").json()["error"]["code"] == "no_webhook"
    assert client.post(f"/admin/webhooks/{job['id']}/replay").status_code == 404
