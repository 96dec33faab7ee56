"""The main job over HTTP, on a real stack: submit, wait, follow, list, play, cancel, delete."""

import base64
import io
import json
import re
import signal
import threading

import httpx
import pytest
from PIL import Image

from tests.clips import decode
from tests.stack import Stack, stop, wait_for

PROMPT = "a red circle moves right quickly, static camera"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data"}


def submit(client, image, prompt=PROMPT, headers=None, **fields) -> httpx.Response:
    files = {"image": ("x.png", image)}
    return client.post("/generate", files=files, data={"prompt": prompt, **fields}, headers=headers)


def generate(client, image, prompt=PROMPT, **fields) -> dict:
    answer = submit(client, image, prompt, headers={"Prefer": "wait=60"}, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "succeeded", answer.text
    return answer.json()


@pytest.fixture(scope="module")
def finished(stack, image) -> dict:
    with httpx.Client(base_url=stack.url, timeout=90) as client:
        return generate(client, image, seed=11)


# --- the main job ---------------------------------------------------------------------------------------------------


def test_an_image_and_a_sentence_give_the_address_of_a_video(client, finished, tmp_path):
    assert re.fullmatch(r"vid_[0-9a-z]{26}", finished["id"])
    assert finished["prompt"] == PROMPT
    assert (finished["seed"], finished["progress"], finished["phase"], finished["error"]) == (11, 1.0, None, None)
    assert finished["created_at"] < finished["started_at"] < finished["finished_at"] < finished["expires_at"]
    video = client.get(finished["video_url"])
    assert (video.status_code, video.headers["content-type"]) == (200, "video/mp4")
    assert video.headers["x-content-type-options"] == "nosniff"
    assert decode(video.content, tmp_path).shape == (17, 64, 64, 3)
    thumbnail = client.get(finished["thumbnail_url"])
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)


def test_the_manifest_says_what_made_the_video(client, finished, stack):
    manifest = client.get(finished["manifest_url"]).json()
    [model] = client.get("/models").json()["data"]
    assert manifest["model_sha256"] == model["sha256"]
    assert (manifest["seed"], manifest["prompt"]) == (11, PROMPT)
    assert list(manifest["timings_s"]) == ["encoding", "denoising", "decoding", "saving"]
    assert all(seconds > 0 for seconds in manifest["timings_s"].values())
    assert str(stack.root) not in json.dumps(manifest)


def test_the_same_seed_gives_the_same_bytes(client, image, finished):
    again = generate(client, image, seed=11)
    assert client.get(again["video_url"]).content == client.get(finished["video_url"]).content


def test_json_with_a_data_url_is_the_same_request(client, image, finished):
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    body = {"image": url, "prompt": f"  {PROMPT.upper()}.", "seed": 11, "steps": None}
    answer = client.post("/generate", json=body, headers={"Prefer": "respond-async, wait=60"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=60"
    assert client.get(answer.json()["video_url"]).content == client.get(finished["video_url"]).content


def test_without_waiting_the_answer_is_202_and_says_where_to_look(client, image):
    answer = submit(client, image)
    body = answer.json()
    assert answer.status_code == 202
    assert body["status"] in ("queued", "running")
    assert body["video_url"] is None
    assert answer.headers["location"] == body["links"]["self"]
    seen = wait_done(client, body["id"])
    assert seen["status"] == "succeeded"
    assert seen["seed"] != submit(client, image).json()["seed"]  # drawn anew for each


def wait_done(client, job_id: str) -> dict:
    state = {}

    def over() -> bool:
        state.update(client.get(f"/generate/{job_id}").json())
        return state["status"] in ("succeeded", "failed", "cancelled")

    wait_for(over, 60, f"{job_id} to end")
    return state


def test_wait_gives_up_when_its_time_is_over(client, image):
    answer = submit(client, image, headers={"Prefer": "wait=0"})
    assert answer.status_code == 202
    wait_done(client, answer.json()["id"])


# --- following ------------------------------------------------------------------------------------------------------


def read_events(client, job_id: str, headers=None) -> list[tuple[str, dict]]:
    events, event_id = [], ""
    with client.stream("GET", f"/generate/{job_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                events.append((event_id, json.loads(line[6:])))
    return events


def test_events_follow_the_job_through_its_phases_to_its_end(client, image):
    job_id = submit(client, image).json()["id"]
    events = read_events(client, job_id)
    phases = [event["phase"] for _, event in events]
    assert list(dict.fromkeys(p for p in phases if p)) == ["encoding", "denoising", "decoding", "saving"]
    progress = [event["progress"] for _, event in events]
    assert progress == sorted(progress)
    assert len(set(progress)) > 5
    assert events[-1][1] == client.get(f"/generate/{job_id}").json()
    # After a break in the connection the rest follows, and nothing twice.
    middle = len(events) // 2
    rest = read_events(client, job_id, headers={"Last-Event-ID": events[middle][0]})
    assert [e["progress"] for _, e in rest] == progress[middle + 1 :]
    assert rest[-1][1]["video_url"]


def test_events_of_a_job_that_is_over_are_its_end(client, finished):
    [(_, event)] = read_events(client, finished["id"])
    assert event["status"] == "succeeded"


# --- files ----------------------------------------------------------------------------------------------------------


def test_videos_can_be_seeked(client, finished):
    whole = client.get(finished["video_url"]).content
    part = client.get(finished["video_url"], headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert client.get(finished["video_url"], headers={"Range": f"bytes={len(whole) + 1}-"}).status_code == 416
    head = client.head(finished["video_url"])
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole)), b"")
    assert head.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    "path",
    [
        "/videos/vid_00000000000000000000000000.mp4",
        "/videos/..%2f..%2fetc%2fpasswd.mp4",
        "/videos/vid_../x.mp4",
        "/generate/vid_00000000000000000000000000",
        "/generate/vid_00000000000000000000000000/events",
        "/generate/whatever",
        "/examples/..%2findex.png",
        "/no/such/page",
    ],
)
def test_what_is_not_there_is_404_in_the_envelope(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert answer.headers["x-request-id"].startswith("req_")


def test_other_suffixes_are_404(client, finished):
    assert client.get(finished["video_url"].replace(".mp4", ".exe")).status_code == 404


# --- cancel, delete, list -------------------------------------------------------------------------------------------


def held_at_its_steps(client, image, worker) -> str:
    """A job that is encoded or denoised, and stands still: its worker is stopped, which the caller has to undo."""
    for _ in range(20):
        job_id = submit(client, image).json()["id"]
        while client.get(f"/generate/{job_id}").json()["status"] == "queued":
            pass
        worker.send_signal(signal.SIGSTOP)
        if client.get(f"/generate/{job_id}").json()["phase"] in ("encoding", "denoising"):
            return job_id
        worker.send_signal(signal.SIGCONT)  # it was faster than we
        wait_done(client, job_id)
    raise AssertionError("no job was met while it was denoised")


def test_a_running_job_is_cancelled_at_its_next_step(client, image, stack):
    worker = stack.processes["worker"]
    try:
        job_id = held_at_its_steps(client, image, worker)
        answer = client.post(f"/generate/{job_id}/cancel")
        assert answer.status_code == 202
        assert answer.json()["status"] == "cancelling"
    finally:
        worker.send_signal(signal.SIGCONT)
    after = wait_done(client, job_id)
    assert after["status"] == "cancelled"
    assert after["progress"] < 0.98
    assert after["video_url"] is None
    assert not list((stack.storage / "videos").glob(f"{job_id}*"))
    assert client.get(f"/videos/{job_id}.mp4").json()["error"]["code"] == "not_ready"
    assert client.post(f"/generate/{job_id}/cancel").status_code == 200  # again is no error


def test_a_queued_job_is_cancelled_at_once_and_never_runs(client, image):
    running = submit(client, image).json()["id"]
    queued = [submit(client, image).json() for _ in range(2)]
    second = client.get(f"/generate/{queued[1]['id']}").json()
    assert second["status"] == "queued"
    assert second["queue_position"] in (1, 2)
    assert second["eta_seconds"] > 0
    answer = client.post(f"/generate/{queued[0]['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert wait_done(client, running)["status"] == "succeeded"
    assert wait_done(client, queued[1]["id"])["status"] == "succeeded"
    never = client.get(f"/generate/{queued[0]['id']}").json()
    assert (never["status"], never["started_at"]) == ("cancelled", None)


def test_a_finished_job_cannot_be_cancelled(client, finished):
    answer = client.post(f"/generate/{finished['id']}/cancel")
    assert answer.status_code == 409
    assert "has succeeded and cannot be cancelled" in answer.json()["error"]["message"]


def test_deleting_removes_the_files_and_the_record(client, image, stack):
    job = generate(client, image)
    assert len(list(stack.storage.glob(f"*/{job['id']}.*"))) == 4
    assert client.delete(f"/generate/{job['id']}").status_code == 204
    assert not list(stack.storage.glob(f"*/{job['id']}*"))
    assert client.get(f"/generate/{job['id']}").status_code == 404
    assert client.get(job["video_url"]).status_code == 404
    assert client.delete(f"/generate/{job['id']}").status_code == 404


def test_deleting_a_running_job_stops_it_first(client, image, stack):
    job_id = submit(client, image).json()["id"]
    wait_for(lambda: client.get(f"/generate/{job_id}").json()["status"] == "running", 30, "the job to run")
    assert client.delete(f"/generate/{job_id}").status_code == 204
    assert client.get(f"/generate/{job_id}").status_code == 404
    assert not list(stack.storage.glob(f"*/{job_id}*"))


def test_the_list_is_newest_first_and_pages(client, image):
    ids = [submit(client, image).json()["id"] for _ in range(3)]
    first = client.get("/generate", params={"limit": 2}).json()
    assert [g["id"] for g in first["data"]] == [ids[2], ids[1]]
    assert first["has_more"]
    second = client.get("/generate", params={"limit": 2, "after": first["last_id"]}).json()
    assert second["data"][0]["id"] == ids[0]
    assert [client.delete(f"/generate/{job_id}").status_code for job_id in ids] == [204, 204, 204]
    assert client.get("/generate", params={"after": ids[0]}).json()["error"]["param"] == "after"


# --- what is refused ------------------------------------------------------------------------------------------------


def everything(stack) -> tuple[set[str], set[str]]:
    """All files and all keys, but for what beats and counts by itself."""
    import redis

    with redis.Redis.from_url(stack.redis.url, decode_responses=True) as connection:
        keys = {k for k in connection.scan_iter("*") if k.startswith(("flg:job", "flg:queued", "rq:queue"))}
    return {str(p) for p in stack.storage.rglob("*") if p.is_file()}, keys


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"prompt": "a red circle flies off"}, 422, "prompt", "after 'a red circle' came 'flies off'; expected one of"),
        ({"prompt": ""}, 422, "prompt", "at the start came nothing"),
        ({"prompt": "x" * 3000}, 422, "prompt", "at most 2000 characters"),
        ({"seed": "-1"}, 422, "seed", "greater than or equal to 0"),
        ({"seed": str(2**32)}, 422, "seed", "less than 4294967296"),
        ({"seed": "lucky"}, 422, "seed", "valid integer"),
        ({"steps": "5"}, 422, "steps", "got 5; shapes-4step was made for"),
        ({"model": "other"}, 422, "model", "got 'other'; the models that can be asked for are 'shapes-4step'"),
        ({"metadata": "{" + '"a":{' * 50_000}, 422, "metadata", "more than 10000 brackets"),
        ({"metadata": '{"a": "\\ud800"}'}, 422, "metadata.a", "unicode"),
        ({"metadata": '{"a": 1}'}, 422, "metadata.a", "valid string"),
        ({"metadata": '{"a": "' + 1100 * "x" + '"}'}, 422, "metadata", "1024 may be"),
        ({"webhook_url": "http://example.org/x"}, 422, "webhook_url", "https"),
        ({"webhook_url": "https://127.0.0.1/x"}, 422, "webhook_url", "public"),
        ({"k" * 500: "red"}, 422, "k" * 64, "at most 200 are taken"),
        ({"colour": "red"}, 422, "colour", "there is no such field; there are image, video, prompt, seed, model"),
    ],
)
def test_wrong_fields_say_what_was_wrong_and_leave_nothing(client, stack, image, fields, status, param, says):
    before = everything(stack)
    answer = submit(client, image, **{"prompt": PROMPT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert says in error["message"]
    assert everything(stack) == before


@pytest.mark.parametrize(
    ("request_", "status", "param"),
    [
        pytest.param({"files": {"image": ("x.png", b"no")}, "data": {"prompt": PROMPT}}, 415, "image", id="bytes"),
        pytest.param({"files": {"picture": ("x.png", b"")}, "data": {"prompt": PROMPT}}, 422, "picture", id="no-image"),
        pytest.param({"json": {"prompt": PROMPT}}, 422, "image", id="json-no-image"),
        pytest.param({"json": {"image": "https://example.com/a.png", "prompt": PROMPT}}, 422, "image", id="url"),
        pytest.param({"json": {"image": 7, "prompt": PROMPT}}, 422, "image", id="json-number"),
        pytest.param({"json": [1]}, 422, None, id="json-list"),
        pytest.param({"content": b"{", "headers": JSON}, 422, None, id="json-broken"),
        pytest.param({"content": b"hello", "headers": {"Content-Type": "text/plain"}}, 415, None, id="text"),
        pytest.param({"content": b"[" * 200_000, "headers": JSON}, 422, None, id="json-deep"),
        pytest.param({"content": b"hello"}, 415, None, id="nothing"),
        pytest.param({"content": b"x", "headers": FORM}, 400, None, id="no-boundary"),
    ],
)
def test_wrong_bodies_are_4xx_in_the_envelope_and_leave_nothing(client, stack, request_, status, param):
    before = everything(stack)
    answer = client.post("/generate", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert everything(stack) == before


def test_a_missing_prompt_names_the_field(client, image):
    error = client.post("/generate", files={"image": ("x.png", image)}).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "invalid_field")


def test_bodies_that_are_too_large_are_413_with_and_without_a_length(client):
    declared = client.post("/generate", files={"image": ("x.png", b"0" * (21 * 2**20))}, data={"prompt": PROMPT})
    assert declared.status_code == 413

    def chunks():
        for _ in range(21):
            yield b"0" * 2**20

    streamed = client.post("/generate", content=chunks(), headers=JSON)
    assert streamed.status_code == 413
    assert streamed.json()["error"]["code"] == "body_too_large"


def test_a_wrong_method_is_405_in_the_envelope(client):
    answer = client.put("/generate")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"


# --- the rest of the surface ----------------------------------------------------------------------------------------


def test_probes(client):
    assert client.get("/livez").json() == {"status": "alive", "causes": []}
    ready = client.get("/readyz").json()
    [worker] = ready.pop("workers")
    assert ready == {"status": "ready", "causes": []}
    assert worker.pop("name").startswith("worker-")
    assert worker == {"model": "shapes-4step", "engine": "ort-cpu", "engine_reason": None}


def test_links_follow_the_address_that_the_client_used(client, finished):
    other = client.get(f"/generate/{finished['id']}", headers={"Host": "localhost:99"}).json()
    assert other["video_url"].startswith("http://localhost:99/videos/")


def test_examples_can_be_fetched_and_their_prompts_are_understood(client):
    examples = client.get("/examples").json()["data"]
    assert len(examples) == 12
    [model] = client.get("/models").json()["data"]
    from distill.prompt import Prompt

    prompt = Prompt.model_validate(model["prompt"])
    for example in examples:
        assert prompt.canonical(example["prompt"]) == example["prompt"]
        assert Image.open(io.BytesIO(client.get(example["image_url"]).content)).size == (64, 64)


def test_the_documentation_page_needs_no_network(client):
    page = client.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links
    for link in links:
        assert httpx.URL(link).host in ("", "127.0.0.1"), link
        assert client.get(link).status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/generate", "/generate/{job_id}", "/videos/{job_id}.{suffix}"} <= set(paths)


def test_many_at_once_all_end(image, stack):
    """Six requests in parallel: each gets its own video, none is lost."""
    done: list[dict] = []

    def one(seed: int) -> None:
        with httpx.Client(base_url=stack.url, timeout=90) as own:
            done.append(generate(own, image, seed=seed))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job["seed"] for job in done) == list(range(6))
    assert len({job["id"] for job in done}) == 6


def test_without_redis_the_answer_is_503_and_afterwards_all_is_as_before(image, tmp_path_factory):
    """A second, small stack without a worker, whose Redis goes away and comes back."""
    small = Stack(tmp_path_factory.mktemp("no-redis"))
    try:
        small.redis.start()
        service = small.spawn("service")
        with httpx.Client(base_url=small.url, timeout=60) as client:
            wait_for(lambda: alive(client), 60, small.log("service"))
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["causes"]) == (503, ["no worker is running"])
            refused = submit(client, image)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_model")
            assert refused.headers["retry-after"] == "5"
            small.redis.stop()
            down = client.get("/generate")
            assert (down.status_code, down.json()["error"]["code"]) == (503, "store_unavailable")
            assert down.headers["retry-after"] == "2"
            assert client.get("/readyz").json()["causes"] == ["Redis does not answer"]
            assert client.get("/livez").status_code == 200
            small.redis.start()
            assert client.get("/generate").json()["data"] == []
        stop(service)
        assert "Application shutdown complete" in small.log("service")
    finally:
        small.stop()


def alive(client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False
