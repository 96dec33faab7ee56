"""Models that take no image, on a real stack: videos from a sentence, and from a video and a sentence."""

import base64
from contextlib import nullcontext

import httpx
import numpy as np
import openai
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from distill.prompt import Prompt
from service.errors import ApiError
from service.jobs import Ask, _check_source
from service.schema import GenerateFields
from tests.clips import decode
from tests.footage import film, frames_of, moving_square
from tests.stack import Stack, wait_for
from tests.students import make_t2v_student
from worker.contract import ModelCard, VideoSize, first_step, input_path

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled to permanently shut down:DeprecationWarning")

PROMPT = "a red circle moves right quickly, static camera"
IMAGES = "shapes-4step"
SIGMAS = [1.0, 0.937305, 0.832987, 0.625]


@pytest.fixture(scope="module")
def stack(tmp_path_factory, _clean_environment):
    """One worker with two models: the first makes videos from text, the other from images."""
    folder = tmp_path_factory.mktemp("t2v")
    make_t2v_student(folder / "shapes-t2v")
    running = Stack(folder, MODEL=f"{folder / 'shapes-t2v'},{IMAGES}", ENGINE="eager")
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def clip() -> bytes:
    return film()


def ask(client, files=None, **fields) -> httpx.Response:
    body = {"prompt": PROMPT, "seed": 3, **fields}
    return client.post("/generate", data=body, files=files or {}, headers={"Prefer": "wait=60"}, timeout=90)


def made(answer: httpx.Response) -> dict:
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded"), answer.text
    return answer.json()


def frames_at(client, job: dict, folder) -> np.ndarray:
    return decode(client.get(job["video_url"]).content, folder)


@pytest.fixture(scope="module")
def from_text(stack) -> dict:
    with httpx.Client(base_url=stack.url) as client:
        return made(client.post("/generate", json={"prompt": PROMPT, "seed": 3}, headers={"Prefer": "wait=60"}))


def from_video(client, clip, **fields) -> dict:
    return made(ask(client, {"video": ("a.mp4", clip)}, **fields))


def test_a_sentence_alone_gives_a_video(client, stack, from_text, tmp_path):
    assert (from_text["model"], from_text["source"]) == ("shapes-t2v", "none")
    assert (from_text["strength"], from_text["first_step"]) == (None, None)
    assert frames_at(client, from_text, tmp_path).shape == (17, 64, 64, 3)
    manifest = client.get(from_text["manifest_url"]).json()
    assert not manifest.keys() & {"input_sha256", "strength", "first_step"}
    assert not list((stack.storage / "inputs").glob(f"{from_text['id']}*"))


def test_an_empty_field_of_a_form_is_none(client, from_text):
    again = made(ask(client, {"image": ("", b""), "video": ("", b"")}))
    assert client.get(again["video_url"]).content == client.get(from_text["video_url"]).content


@pytest.mark.parametrize(("strength", "step"), [(1, 0), (0.9, 1), (0.8, 2), (None, 3), (0.001, 3)])
def test_strength_picks_the_step_whose_noise_is_nearest(client, clip, strength, step):
    fields = {} if strength is None else {"strength": strength}
    job = from_video(client, clip, **fields)
    assert (job["source"], job["strength"], job["first_step"]) == ("video", strength or 0.7, step)
    manifest = client.get(job["manifest_url"]).json()
    assert (manifest["strength"], manifest["first_step"]) == (strength or 0.7, step)
    assert manifest["first_sigma"] == SIGMAS[step]


def test_the_less_is_changed_the_more_it_is_like_the_video(client, clip, tmp_path):
    given = np.stack([moving_square(i / 8)[:, 16:80] for i in range(17)]).astype(int)
    frames = [frames_at(client, from_video(client, clip, strength=s), tmp_path) for s in (0.1, 0.83, 0.94)]
    errors = [np.abs(one - given).mean() for one in frames]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2]


def test_where_all_is_changed_the_video_makes_no_difference(client, clip, from_text):
    job = from_video(client, clip, strength=1)
    assert client.get(job["video_url"]).content == client.get(from_text["video_url"]).content


def test_the_video_is_kept_as_the_model_takes_it_and_goes_with_the_job(client, stack, clip):
    job = from_video(client, clip)
    kept = stack.storage / input_path(job["id"], "video")
    assert frames_of(kept.read_bytes()).shape == (17, 64, 64, 3)
    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    body = {"prompt": PROMPT, "seed": 3, "video": url}
    again = made(client.post("/generate", json=body, headers={"Prefer": "wait=60"}))
    assert client.get(again["video_url"]).content == client.get(job["video_url"]).content
    assert client.delete(f"/generate/{job['id']}").status_code == 204
    assert not kept.exists()


def test_the_same_request_sent_again_is_the_same_job(client, clip):
    def send(data: bytes, **fields) -> httpx.Response:
        body = {"prompt": PROMPT, **fields}
        return client.post("/generate", data=body, files={"video": data}, headers={"Idempotency-Key": "v"})

    first = send(clip, strength=0.5)
    assert send(clip, strength="0.50").json()["id"] == first.json()["id"]
    assert send(clip, strength=0.6).json()["error"]["code"] == "idempotency_key_reused"


def test_a_model_that_takes_images_goes_on_as_ever(client, image):
    job = made(ask(client, {"image": image}, model=IMAGES))
    assert (job["model"], job["source"], job["strength"]) == (IMAGES, "image", None)
    assert "input_sha256" in client.get(job["manifest_url"]).json()


def test_the_models_say_what_they_take(client):
    cards = {card["name"]: card for card in client.get("/models").json()["data"]}
    assert {name: card["task"] for name, card in cards.items()} == {"shapes-t2v": "t2v", IMAGES: "ti2v"}
    assert cards["shapes-t2v"]["sigmas"] == SIGMAS
    assert "sigmas" not in cards[IMAGES]
    assert {model["id"]: model["task"] for model in client.get("/v1/models").json()["data"]} == {
        "shapes-t2v": "t2v",
        IMAGES: "ti2v",
    }


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sends", "fields", "param", "code", "says"),
    [
        (
            "image",
            {},
            "image",
            "image_not_taken",
            "shapes-t2v (task t2v) takes none; leave it out, or send a video",
        ),
        (
            "",
            {"model": IMAGES},
            "image",
            "image_missing",
            "missing, and shapes-4step (task ti2v) animates one; send a PNG",
        ),
        ("video", {"model": IMAGES}, "video", "video_not_taken", "shapes-4step (task ti2v) takes none; send an image"),
        ("", {"strength": 0.5}, "strength", "strength_without_video", "there is no video; leave it out, or send one"),
        ("image", {"model": IMAGES, "strength": 0.5}, "strength", "strength_without_video", "there is no video"),
        ("image video", {}, "video", "invalid_field", "sent beside an image"),
        ("video", {"strength": 0}, "strength", "invalid_field", "greater than 0"),
        ("video", {"strength": 1.01}, "strength", "invalid_field", "less than or equal to 1"),
        ("video", {"strength": "nan"}, "strength", "invalid_field", "strength: Input should be"),
        ("short", {}, "video", "video_too_short", "lasts 1 s; this model makes 2.125 s"),
        (
            "",
            {"video": "https://example.org/a.mp4"},
            "video",
            "video_not_data_url",
            "wanted a data URL in base64, data:video/mp4",
        ),
        ("", {"video": "data:video/mp4;base64,%"}, "video", "video_not_data_url", "got text that begins"),
    ],
)
def test_what_does_not_go_together_is_refused_and_leaves_nothing(
    client, stack, image, clip, sends, fields, param, code, says
):
    data = {"image": image, "video": clip}
    files = {name: data[name] for name in sends.split() if name in data}
    if sends == "short":
        files["video"] = film(seconds=1)
    before = sorted(path.name for path in stack.storage.rglob("*"))
    answer = ask(client, files, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (422, param, code)
    assert says in error["message"]
    assert sorted(path.name for path in stack.storage.rglob("*")) == before


def test_a_file_that_is_no_video_is_of_a_wrong_kind(client, image):
    error = ask(client, {"video": image})
    assert (error.status_code, error.json()["error"]["code"]) == (415, "video_format")
    number = client.post("/generate", json={"prompt": PROMPT, "video": 7}).json()["error"]
    assert number["message"] == "video: got int; wanted a data URL"


@pytest.mark.parametrize(("source", "code"), [("video", None), ("none", "video_missing"), ("image", "image_not_taken")])
def test_a_model_that_changes_videos_wants_one(source, code):
    size = VideoSize(width=64, height=64, num_frames=17, fps=8)
    prompt = Prompt(kind="free", help="", examples=("x",))
    card = ModelCard(name="m", sha256="0" * 64, task="v2v", num_inference_steps=4, video=size, prompt=prompt)
    with pytest.raises(ApiError) if code else nullcontext() as caught:
        _check_source(card, Ask(GenerateFields(prompt="x"), "", source))
    assert code is None or (caught.value.code, "m (task v2v)" in caught.value.message) == (code, True)


def test_of_two_noise_levels_that_are_equally_near_the_higher_is_taken():
    assert [first_step((1.0, 0.5, 0.25), strength) for strength in (0.75, 0.74, 0.375, 0.01)] == [0, 1, 1, 2]


# --- OpenAI's clients -------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as made_client:
        yield made_client.videos


def test_openais_client_asks_with_a_sentence_alone_and_remixes_that(videos, client, from_text):
    video = videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 3})
    assert (video.status, video.model) == ("completed", "shapes-t2v")
    assert videos.download_content(video.id).content == client.get(from_text["video_url"]).content
    again = videos.remix(video.id, prompt="a blue star grows", extra_body={"seed": 4})
    assert again.remixed_from_video_id == video.id


def test_openais_client_sends_a_video_as_the_reference_and_remixes_that(videos, client, stack, clip):
    reference = ("a.mp4", clip, "video/mp4")
    video = videos.create_and_poll(prompt=PROMPT, input_reference=reference, extra_body={"seed": 3, "strength": 0.9})
    assert client.get(f"/generate/{video.id}").json()["first_step"] == 1
    again = videos.remix(video.id, prompt="a blue star grows")
    wait_for(lambda: videos.retrieve(again.id).status == "completed", 60, "the remix")
    job = client.get(f"/generate/{again.id}").json()
    assert (job["source"], job["strength"], job["first_step"], job["remixed_from"]) == ("video", 0.9, 1, video.id)
    kept = [frames_of((stack.storage / input_path(one.id, "video")).read_bytes()) for one in (video, again)]
    assert np.abs(kept[0].astype(int) - kept[1]).mean() < 1


@pytest.mark.parametrize(
    ("reference", "model", "code"),
    [
        ("image", "shapes-t2v", "video_format"),
        ("video", IMAGES, "image_format"),
        (None, IMAGES, "image_missing"),
    ],
)
def test_a_reference_of_the_wrong_kind_names_the_field_that_it_came_in(client, image, clip, reference, model, code):
    files = {"input_reference": {"image": image, "video": clip}[reference]} if reference else {}
    error = client.post("/v1/videos", data={"prompt": PROMPT, "model": model}, files=files).json()["error"]
    assert (error["code"], error["param"]) == (code, "input_reference")


# --- the playground ---------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser, stack):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(stack.url)
    expect(page.locator("#still-lead")).to_have_text("Say what the video is to show.")
    yield page
    page.close()
    assert [text for text in complaints if "the server responded with a status of 422" not in text] == []


def test_the_playground_asks_for_what_the_model_takes(page, client, clip):
    expect(page.get_by_role("group", name="First frame")).to_be_hidden()
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill("3")
    expect(page.locator("#snippet")).not_to_contain_text("image")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("button", name="Again with a new seed")).to_be_visible(timeout=30_000)
    assert client.get(f"/generate/{page.evaluate('location.hash.slice(1)')}").json()["source"] == "none"

    page.locator("#video").set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": clip})
    expect(page.locator("#strength-says")).to_have_text("1 of 4 steps, strength 0.63")
    page.locator("#strength").fill("3")
    expect(page.locator("#strength-says")).to_have_text("3 of 4 steps, strength 0.94")
    assert [one["id"] for one in Axe().run(page).response["violations"]] == []
    page.locator("#code summary").click()
    expect(page.locator("#snippet")).to_contain_text("video=@a.mp4")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#facts")).to_contain_text("steps 2 to 4", timeout=30_000)
    with page.expect_response(lambda answer: answer.request.method == "POST"):
        page.get_by_role("button", name="Again with a new seed").click()
    first, second = client.get("/generate?limit=2").json()["data"]
    assert (first["source"], second["first_step"], first["metadata"]) == ("video", 1, {"video": "a.mp4"})
    assert first["strength"] == second["strength"] == SIGMAS[1]
    assert first["seed"] != second["seed"]

    page.get_by_role("button", name="Without it").click()
    expect(page.locator("#strength-field")).to_be_hidden()
    page.get_by_label("Model", exact=True).select_option(IMAGES)
    expect(page.get_by_role("group", name="First frame")).to_be_visible()
    expect(page.locator("#video-field")).to_be_hidden()


def test_what_the_server_says_of_a_video_is_shown_beside_it(page):
    page.get_by_label("Prompt").fill(PROMPT)
    page.locator("#video").set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": film(seconds=1)})
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#video-error")).to_contain_text("lasts 1 s; this model makes 2.125 s")
