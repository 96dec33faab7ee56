"""OpenAI's wire format, with the `openai` client itself on a real stack: ask, wait, fetch, list, remix, delete."""

import io
import json

import httpx
import httpx2
import openai
import pytest
import redis

from service import openai_schema
from service.auth import Keys, new_key
from service.errors import ApiError
from service.schema import generation
from tests.clips import decode
from tests.stack import Stack, new_record, wait_for
from worker.contract import ModelCard, Status, input_path, output_path
from worker.records import Records, connect, publish_models

pytest_plugins = ["tests.s3"]

# Every method of the client warns that OpenAI's own service ends; the wire format does not.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled to permanently shut down:DeprecationWarning")

PROMPT = "a red circle moves right quickly, static camera"
OTHER_PROMPT = "a red circle moves left quickly, static camera"


class Wire(httpx2.HTTPTransport):
    """Counts what the client sends, and can lose an answer on its way back."""

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0
        self.loses_next = False

    def handle_request(self, request):
        self.num_requests += 1
        answer = super().handle_request(request)
        if self.loses_next:
            self.loses_next = False
            answer.read()
            raise httpx2.ReadError("the connection was lost", request=request)
        return answer


def client_of(url: str, api_key: str = "unused", wire: Wire | None = None) -> openai.OpenAI:
    http = httpx2.Client(transport=wire or Wire(), timeout=60, follow_redirects=True)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, http_client=http)


@pytest.fixture(scope="module")
def openai_client(stack):
    with client_of(stack.url) as client:
        yield client


@pytest.fixture
def owned(stack):
    """Makes clients, each of a new key that has no videos yet."""
    connection, clients = connect(stack.redis.url), []

    def make(wire: Wire | None = None) -> openai.OpenAI:
        text = new_key()
        Keys(connection).add(text, "test", ("generate", "read"))
        clients.append(client_of(stack.url, text, wire))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    connection.close()


@pytest.fixture(scope="module")
def finished(openai_client, image):
    video = openai_client.videos.create_and_poll(prompt=PROMPT, input_reference=image, extra_body={"seed": 11})
    assert video.status == "completed", video.error
    return video


@pytest.fixture(scope="module")
def kept_image(stack, finished) -> bytes:
    """What the service keeps of `image`."""
    return (stack.storage / input_path(finished.id)).read_bytes()


# --- the main job ---------------------------------------------------------------------------------------------------


def test_an_image_and_a_sentence_give_a_video(finished):
    assert (finished.object, finished.progress, finished.error) == ("video", 100, None)
    assert (finished.model, finished.size, finished.seconds) == ("shapes-4step", "64x64", "2.125")
    assert (finished.prompt, finished.seed) == (PROMPT, 11)
    assert finished.created_at <= finished.completed_at < finished.expires_at
    assert finished.remixed_from_video_id is None


def test_its_files_are_those_that_generate_has(openai_client, client, finished, tmp_path):
    video = openai_client.videos.download_content(finished.id).read()
    assert video == client.get(f"/videos/{finished.id}.mp4").content == client.get(finished.url).content
    assert decode(video, tmp_path).shape == (17, 64, 64, 3)
    thumbnail = openai_client.videos.download_content(finished.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/jpeg"
    assert thumbnail.read() == client.get(f"/videos/{finished.id}.jpg").content


def test_its_file_can_be_read_in_parts(client, finished):
    url = f"/v1/videos/{finished.id}/content"
    whole = client.get(url).content
    part = client.get(url, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    head = client.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole)), b"")


def test_a_variant_that_cannot_be_had_is_refused_with_those_that_can(openai_client, finished):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.videos.download_content(finished.id, variant="spritesheet")
    assert caught.value.param == "variant"
    assert "'video' and 'thumbnail'" in caught.value.message


def test_the_client_is_told_when_to_ask_again(openai_client, image):
    raw = openai_client.videos.with_raw_response.create(prompt=PROMPT, input_reference=image)
    video = raw.parse()
    assert video.status in ("queued", "in_progress")
    assert 50 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
    assert openai_client.videos.poll(video.id).status == "completed"
    assert "openai-poll-after-ms" not in openai_client.videos.with_raw_response.retrieve(video.id).headers


def test_both_surfaces_show_the_same_job(client, finished):
    ours = client.get(f"/generate/{finished.id}").json()
    assert (ours["status"], ours["seed"], ours["prompt"]) == ("succeeded", 11, PROMPT)


def test_deleting_removes_it(openai_client, image, stack):
    video = openai_client.videos.create(prompt=PROMPT, input_reference=image)
    gone = openai_client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    assert not list(stack.storage.glob(f"*/{video.id}*"))
    for call in (
        openai_client.videos.retrieve,
        openai_client.videos.delete,
        openai_client.videos.download_content,
        lambda video_id: openai_client.videos.remix(video_id, prompt=PROMPT),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call(video.id)
        assert caught.value.code == "not_found"


# --- the image in every shape ---------------------------------------------------------------------------------------


def kept(stack, openai_client, video_id: str) -> bytes:
    """What was kept of an image. Its video is not waited for."""
    data = (stack.storage / input_path(video_id)).read_bytes()
    openai_client.videos.delete(video_id)
    return data


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda path: path.read_bytes(), id="bytes"),
        pytest.param(lambda path: ("../../x.exe", path.read_bytes(), "text/html"), id="tuple"),
        pytest.param(lambda path: path, id="path"),
        pytest.param(lambda path: io.BytesIO(path.read_bytes()), id="stream"),
    ],
)
def test_a_file_is_taken_however_the_client_is_given_it(openai_client, stack, kept_image, example_image, wrap):
    video = openai_client.videos.create(prompt=PROMPT, input_reference=wrap(example_image))
    assert kept(stack, openai_client, video.id) == kept_image


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda url: url, id="url"),
        pytest.param(lambda url: {"image_url": url}, id="image_url"),
        pytest.param(lambda url: {"url": url}, id="url-member"),
        pytest.param(lambda url: {"image_url": {"url": url}}, id="nested"),
        pytest.param(lambda url: [url], id="list"),
        pytest.param(lambda url: json.dumps({"image_url": url}), id="json-text"),
        pytest.param(lambda url: json.dumps({"type": "image_url", "image_url": {"url": url}}), id="json-text-nested"),
    ],
)
@pytest.mark.parametrize("kind", ["form", "json"])
def test_a_data_url_is_taken_however_it_is_wrapped(openai_client, client, stack, kept_image, data_url, wrap, kind):
    if kind == "form":
        # With `input_reference=` itself the client takes files only.
        video_id = openai_client.videos.create(prompt=PROMPT, extra_body={"input_reference": wrap(data_url)}).id
    else:
        body = {"prompt": PROMPT, "input_reference": wrap(data_url), "n": 1}
        video_id = client.post("/v1/videos", json=body).json()["id"]
    assert kept(stack, openai_client, video_id) == kept_image


def test_a_form_without_a_file_is_taken(openai_client, client, stack, kept_image, data_url):
    """As other clients send it."""
    answer = client.post("/v1/videos", data={"prompt": PROMPT, "input_reference": data_url, "model": ""})
    assert answer.status_code == 200, answer.text
    assert kept(stack, openai_client, answer.json()["id"]) == kept_image


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (None, "image_missing"),
        ("", "image_missing"),
        ({"file_id": "file-1"}, "file_id_not_supported"),
        ("https://example.com/a.png", "image_url_off"),
        ({"image_url": "https://example.com/a.png"}, "image_url_off"),
        ("a picture", "image_not_data_url"),
        ("{broken", "bad_json"),
        ("[" * 5_000, "bad_json"),
        ([], "invalid_field"),
        (7, "invalid_field"),
        ({"url": {"url": {"url": {"url": {"url": {"url": "x"}}}}}}, "invalid_field"),
        ("data:image/png;base64,AAAA", "image_format"),
    ],
)
def test_what_holds_no_image_is_refused_in_the_name_of_its_field(client, reference, code):
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "input_reference": reference})
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, "input_reference"), error
    assert answer.status_code == (415 if code == "image_format" else 422)


# --- retries --------------------------------------------------------------------------------------------------------


def test_a_retry_after_a_lost_answer_makes_no_second_video(owned, image):
    wire = Wire()
    client = owned(wire)
    wire.loses_next = True
    video = client.videos.create(prompt=PROMPT, input_reference=image, extra_body={"seed": 3})
    assert wire.num_requests == 2
    assert [listed.id for listed in client.videos.list()] == [video.id]
    again = client.videos.create(prompt=PROMPT, input_reference=image, extra_body={"seed": 3})
    assert again.id != video.id  # asked for twice on purpose


def test_an_idempotency_key_makes_two_requests_one(openai_client, image):
    def create(**more):
        headers = {"Idempotency-Key": f"openai-{id(image)}"}
        return openai_client.videos.create(input_reference=image, extra_headers=headers, **more)

    assert create(prompt=PROMPT).id == create(prompt=PROMPT).id
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(prompt=OTHER_PROMPT)
    assert caught.value.code == "idempotency_key_reused"


# --- list -----------------------------------------------------------------------------------------------------------


def test_the_list_pages_by_itself_in_both_orders(owned, image):
    client = owned()
    ids = [client.videos.create(prompt=PROMPT, input_reference=image).id for _ in range(5)]
    assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == ids
    assert [video.id for video in client.videos.list(after=ids[2], order="asc")] == ids[3:]
    page = client.videos.list(limit=2)
    assert (page.object, page.first_id, page.last_id, page.has_more) == ("list", ids[4], ids[3], True)
    for video_id in ids:
        client.videos.delete(video_id)
    page = client.videos.list()
    assert (page.data, page.has_more, page.last_id) == ([], False, None)


# --- remix ----------------------------------------------------------------------------------------------------------


def test_a_remix_animates_the_same_image_with_another_prompt(openai_client, finished, kept_image, stack):
    video = openai_client.videos.remix(finished.id, prompt=OTHER_PROMPT)
    assert (video.remixed_from_video_id, video.prompt) == (finished.id, OTHER_PROMPT)
    assert video.seed != finished.seed
    assert openai_client.videos.poll(video.id).status == "completed"
    assert (stack.storage / input_path(video.id)).read_bytes() == kept_image


def test_a_remix_with_the_same_prompt_and_seed_is_the_same_video(openai_client, finished):
    video = openai_client.videos.remix(finished.id, prompt=PROMPT, extra_body={"seed": finished.seed})
    assert openai_client.videos.poll(video.id).status == "completed"
    download = openai_client.videos.download_content
    assert download(video.id).read() == download(finished.id).read()


def test_a_remix_of_an_image_that_is_gone_is_409_and_not_tried_again(owned, image, stack):
    wire = Wire()
    client = owned(wire)
    video = client.videos.create_and_poll(prompt=PROMPT, input_reference=image)
    (stack.storage / input_path(video.id)).unlink()
    wire.num_requests = 0
    with pytest.raises(openai.ConflictError) as caught:
        client.videos.remix(video.id, prompt=OTHER_PROMPT)
    assert (caught.value.code, wire.num_requests) == ("input_gone", 1)


# --- whose it is ----------------------------------------------------------------------------------------------------


def test_another_keys_video_is_not_there(owned, finished):
    stranger = owned()
    for call in (
        stranger.videos.retrieve,
        stranger.videos.delete,
        stranger.videos.download_content,
        lambda video_id: stranger.videos.remix(video_id, prompt=PROMPT),
    ):
        with pytest.raises(openai.NotFoundError):
            call(finished.id)
    assert list(stranger.videos.list()) == []


def test_a_key_that_is_not_known_is_401(stack):
    with client_of(stack.url, new_key()) as client, pytest.raises(openai.AuthenticationError) as caught:
        client.videos.list()
    assert caught.value.code == "wrong_key"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "code", "param", "says"),
    [
        ({"prompt": "a red circle flies off"}, 422, "prompt_not_understood", "prompt", "came 'flies off'; expected"),
        ({"prompt": ""}, 422, "prompt_not_understood", "prompt", "at the start came nothing"),
        ({"model": "sora-2"}, 404, "model_not_found", "model", "that can be asked for are 'shapes-4step'"),
        ({"size": "1280x720"}, 400, "invalid_value", "size", "got '1280x720'; shapes-4step makes '64x64'"),
        ({"seconds": "4"}, 400, "invalid_value", "seconds", "got '4'; shapes-4step makes '2.125' (or '3')"),
        ({"extra_body": {"seed": -1}}, 422, "invalid_field", "seed", "greater than or equal to 0"),
        ({"extra_body": {"metadata": "7"}}, 422, "invalid_field", "metadata", "valid dictionary"),
        ({"extra_body": {"prompt": ["a", "b"]}}, 422, "invalid_field", "prompt", "valid string"),
        ({"extra_body": {"prompt[a]": "b"}}, 422, "invalid_field", "prompt", "send one of the two"),
    ],
)
def test_wrong_fields_reach_the_client_as_it_knows_errors(openai_client, image, fields, error, code, param, says):
    with pytest.raises(openai.APIStatusError) as caught:
        openai_client.videos.create(**{"prompt": PROMPT, "input_reference": image, **fields})
    failed = caught.value
    assert (failed.status_code, failed.code, failed.param) == (error, code, param), failed.message
    assert says in failed.message


@pytest.mark.parametrize("seconds", ["2.125", "2.1", 3, "3.0", "", None])
def test_what_the_model_makes_may_be_asked_for(client, data_url, seconds):
    body = {"prompt": PROMPT, "input_reference": data_url, "size": "64X64", "seconds": seconds, "model": "shapes-4step"}
    answer = client.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    assert client.delete(f"/v1/videos/{answer.json()['id']}").status_code == 200


def test_own_fields_pass_through_as_extra_body(openai_client, image):
    own = {"seed": 7, "metadata": {"order": "17"}, "quality": "best", "steps": 4}
    video = openai_client.videos.create(prompt=PROMPT, input_reference=image, extra_body=own)
    assert (video.seed, video.metadata) == (7, {"order": "17"})


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, id="broken"),
        pytest.param({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 422, id="deep"),
        pytest.param({"json": [1]}, 422, id="list"),
        pytest.param({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, id="text"),
        pytest.param({"content": b"x"}, 415, id="nothing"),
        pytest.param({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, id="no-boundary"),
        pytest.param({"files": [("input_reference", (f"{i}.png", b"x")) for i in range(3)]}, 400, id="three-files"),
        pytest.param({"data": {f"f{i}": "x" for i in range(60)}}, 400, id="sixty-fields"),
    ],
)
def test_wrong_bodies_are_4xx_in_the_envelope(client, request_, status):
    answer = client.post("/v1/videos", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_what_only_openai_can_do_says_so(openai_client, image):
    for call in (
        lambda: openai_client.videos.edit(prompt=PROMPT, video=image),
        lambda: openai_client.videos.extend(prompt=PROMPT, video=image, seconds="4"),
        lambda: openai_client.videos.create_character(name="x", video=image),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "not_offered"


# --- models ---------------------------------------------------------------------------------------------------------


def test_models_can_be_listed_and_looked_at(openai_client):
    [model] = openai_client.models.list()
    assert (model.id, model.object, model.owned_by) == ("shapes-4step", "model", "fastlightgen")
    assert (model.task, model.steps, model.size, model.seconds) == ("ti2v", 4, "64x64", "2.125")
    assert model.created > 1_700_000_000
    assert openai_client.models.retrieve("shapes-4step") == model
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.models.retrieve("sora-2")
    assert caught.value.code == "model_not_found"


# --- without a worker: an object store, images by URL ---------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(stack, s3_server, tmp_path_factory):
    """A service whose files lie in S3 and that fetches images, with a model whose worker has gone."""
    bucket = s3_server.make_bucket("openai")
    settings = {"URL_IMAGES": "1", "PRIVATE_HOSTS": f"127.0.0.1:{s3_server.port}", "STORAGE_URL": bucket}
    remote = Stack(tmp_path_factory.mktemp("remote"), **s3_server.environment, **settings)
    try:
        remote.redis.start()
        connection = connect(remote.redis.url)
        with redis.Redis.from_url(stack.redis.url, decode_responses=True) as of_stack:
            [card] = of_stack.hvals("flg:models")
        publish_models(connection, [ModelCard.model_validate_json(card)])
        remote.spawn("service")
        wait_for(lambda: _is_alive(remote.url), 30, "the service to answer")
        yield remote, connection
        connection.close()
    finally:
        remote.stop()


def _is_alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez").is_success
    except httpx.TransportError:
        return False


def test_the_client_follows_to_the_object_store(remote, s3_server):
    service, connection = remote
    record = new_record()
    s3_server.client().put_object(Bucket="openai", Key=output_path(record.id, "mp4"), Body=b"a video")
    records = Records(connection, type(record))
    records.create(record)
    records.change(record, (Status.QUEUED,), status=Status.SUCCEEDED)
    with client_of(service.url) as client:
        content = client.videos.download_content(record.id)
        assert content.read() == b"a video"
        assert content.response.url.port == s3_server.port
        assert "authorization" not in content.response.request.headers


@pytest.mark.parametrize("member", [None, "image_url", "url"])
def test_an_image_may_be_given_as_its_address(remote, s3_server, image, kept_image, member):
    service, _ = remote
    s3_server.client().put_object(Bucket="openai", Key="seen.png", Body=image, ACL="public-read")
    url = f"{s3_server.url}/openai/seen.png"

    def body(url: str) -> dict:
        return {"input_reference": {member: url} if member else url}

    with client_of(service.url) as client:
        video = client.videos.create(prompt=PROMPT, extra_body=body(url))
        assert video.status == "queued"
        kept = s3_server.client().get_object(Bucket="openai", Key=input_path(video.id))["Body"].read()
        assert kept == kept_image
        with pytest.raises(openai.APIStatusError) as caught:
            client.videos.create(prompt=PROMPT, extra_body=body(f"{url}.gone"))
        assert caught.value.param == "input_reference"


def test_videos_of_models_that_are_gone_can_be_seen_and_remixed(remote, s3_server, image):
    service, connection = remote
    [text] = connection.hvals("flg:models")
    card = ModelCard.model_validate_json(text)
    video = card.video.model_copy(update={"width": 32})
    smaller = card.model_copy(update={"name": "old", "sha256": "f" * 64, "video": video})
    connection.hset("flg:models", smaller.id, smaller.model_dump_json())
    old, unknown = new_record("old").model_copy(update={"model_sha256": smaller.sha256}), new_record("unknown")
    for record in (old, unknown):
        Records(connection, type(record)).create(record)
    s3_server.client().put_object(Bucket="openai", Key=input_path(old.id), Body=image)
    with client_of(service.url) as client:
        assert client.videos.retrieve(old.id).size == "32x64"
        assert client.videos.retrieve(unknown.id).size is None
        remix = client.videos.remix(old.id, prompt=PROMPT)
        assert (remix.model, remix.remixed_from_video_id) == ("shapes-4step", old.id)


# --- conversions ----------------------------------------------------------------------------------------------------


def shown(size=None, **changes) -> openai_schema.Video:
    return openai_schema.video(generation(new_record().model_copy(update=changes), "http://here"), size)


@pytest.mark.parametrize(
    ("status", "theirs", "code"),
    [
        (Status.QUEUED, "queued", None),
        (Status.RUNNING, "in_progress", None),
        (Status.CANCELLING, "in_progress", None),
        (Status.SUCCEEDED, "completed", None),
        (Status.FAILED, "failed", "out_of_memory"),
        (Status.CANCELLED, "failed", "cancelled"),
        (Status.EXPIRED, "failed", "expired"),
    ],
)
def test_every_status_is_one_that_the_client_knows(status, theirs, code):
    why = {"error_code": "out_of_memory", "error_message": "too large"} if status is Status.FAILED else {}
    video = shown(status=status, progress=0.567, finished_at=7.9, **why)
    assert (video.status, video.progress, video.completed_at) == (theirs, 56, 7 if status.is_terminal else None)
    assert (video.error and video.error.code) == code
    assert (video.url is not None) == (theirs == "completed")


def test_a_video_has_every_field_that_the_client_reads():
    assert set(openai.types.Video.model_fields) <= set(openai_schema.Video.model_fields)
    assert openai_schema.VideoError.model_fields.keys() <= openai.types.VideoCreateError.model_fields.keys()


def test_the_size_of_a_model_that_nobody_has_any_more_is_not_guessed():
    assert (shown().size, shown().seconds) == (None, None)


@pytest.mark.parametrize(("eta_s", "ms"), [(None, 500), (0.0, 50), (0.2, 50), (3.0, 300), (60.0, 5000), (9e9, 5000)])
def test_a_client_asks_about_ten_times(eta_s, ms):
    assert openai_schema.poll_after_ms(eta_s) == ms


def test_brackets_are_members_and_lists():
    items = [("a", "1"), ("b[c]", "2"), ("b[d][e]", "3"), ("l[]", "4"), ("l[]", "5"), ("[]", "6"), ("", "7")]
    read = openai_schema.nested(items)
    assert read == {"a": "1", "b": {"c": "2", "d": {"e": "3"}}, "l": ["4", "5"], "": ["6", "7"]}


@pytest.mark.parametrize("items", [[("a", "1"), ("a[b]", "2")], [("a[]", "1"), ("a[b]", "2")]])
def test_a_value_with_members_is_refused(items):
    with pytest.raises(ApiError) as caught:
        openai_schema.nested(items)
    assert (caught.value.status, caught.value.param) == (422, "a")
