"""A student of every model that can be had, at tiny size, on a real stack: one request each."""

from __future__ import annotations

import io

import httpx
import pytest
from PIL import Image

from tests import tiny
from tests.clips import decode
from tests.real_models import RECIPES
from tests.stack import Stack


@pytest.fixture(scope="module")
def stack(real_models, tmp_path_factory, _clean_environment):
    """One worker with a student of each."""
    students = [str(real_models.student(variant)) for variant in sorted(RECIPES)]
    running = Stack(tmp_path_factory.mktemp("real"), MODEL=",".join(students), ENGINE="eager")
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize("variant", sorted(RECIPES))
def test_a_request_gives_a_video(stack, variant, tmp_path):
    files = {}
    if tiny.takes_an_image(variant):
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), (90, 20, 160)).save(picture, "PNG")
        files = {"image": ("a.png", picture.getvalue())}
    asked = {"model": variant, "prompt": "a boat rocks in the wind", "seed": 1}
    with httpx.Client(base_url=stack.url, timeout=90) as client:
        models = {model["name"]: model for model in client.get("/models").json()["data"]}
        size = models[variant]["video"]
        assert models[variant]["task"] == ("ti2v" if tiny.takes_an_image(variant) else "t2v")
        answer = client.post("/generate", data=asked, files=files, headers={"Prefer": "wait=60"})
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded"), answer.text
        video = client.get(answer.json()["video_url"]).content
    assert len(decode(video, tmp_path, size["width"], size["height"])) == size["num_frames"]
