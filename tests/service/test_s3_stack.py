"""The whole way with results in an object store: service and worker share nothing else."""

import httpx
import pytest

from tests.clips import decode
from tests.stack import Stack, run_with

pytest_plugins = ["tests.s3"]


@pytest.fixture(scope="module")
def stack_on_s3(tmp_path_factory, s3_server):
    folder = tmp_path_factory.mktemp("s3-stack")
    running = Stack(folder, **s3_server.environment)
    running.environment["STORAGE_URL"] = s3_server.make_bucket("videos") + "/ours"
    try:
        running.start()
        yield running
    finally:
        running.stop()


def test_a_video_goes_to_the_bucket_and_comes_from_there(stack_on_s3, s3_server, example_image, tmp_path):
    with httpx.Client(base_url=stack_on_s3.url, timeout=90) as client:
        answer = client.post(
            "/generate",
            files={"image": example_image.read_bytes()},
            data={"prompt": "a red circle moves right quickly, static camera"},
            headers={"Prefer": "wait=60"},
        )
        job = answer.json()
        assert (answer.status_code, job["status"]) == (200, "succeeded")
        found = client.get(job["video_url"])
        assert found.status_code == 307
        assert found.headers["location"].startswith(s3_server.url)
        video = httpx.get(found.headers["location"])  # no key, no cookies: the link alone
        assert video.headers["content-type"] == "video/mp4"
        assert decode(video.content, tmp_path).shape == (17, 64, 64, 3)
        listed = s3_server.client().list_objects_v2(Bucket="videos")["Contents"]
        names = {entry["Key"].split(".")[-1] for entry in listed if job["id"] in entry["Key"]}
        assert names == {"png", "mp4", "jpg", "json"}
        assert client.delete(f"/generate/{job['id']}").status_code == 204
        assert job["id"] not in str(s3_server.client().list_objects_v2(Bucket="videos").get("Contents"))
    assert not stack_on_s3.storage.exists()  # nothing of it was ever on a disk


def test_a_bucket_that_is_not_there_ends_the_start_with_one_line(stack_on_s3):
    for module in ("service", "worker"):
        nowhere = {**stack_on_s3.environment, "STORAGE_URL": "s3://nowhere/ours", "PORT": "1"}
        ended = run_with(module, nowhere)
        assert ended.returncode == 2
        assert "STORAGE_URL=s3://nowhere/ours" in ended.stderr.splitlines()[-1]
