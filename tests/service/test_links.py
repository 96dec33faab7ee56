"""Signed links: what they open, what they do not; and who else gets a file, from a folder and from a bucket."""

import asyncio
from types import SimpleNamespace
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
import pytest

from service import links
from service.app import create_app
from service.auth import Keys, new_key
from service.settings import Settings
from tests.stack import new_record
from worker.contract import LINK_SECRET_KEY, Status, output_path
from worker.records import now
from worker.storage import Storage

pytest_plugins = ["tests.s3"]

SECRET = bytes(range(32))
PATH = "/videos/vid_00000000000000000000000000.mp4"
EXPIRES = 2_000_000_000
VIDEO = bytes(range(256)) * 40


def signed(path=PATH, expires=EXPIRES, key_id="0123abcd", secret=SECRET) -> dict[str, str]:
    return dict(parse_qsl(links.sign(secret, path, expires, key_id), strict_parsing=True))


def opens(query, path=PATH, secret=SECRET, moment=EXPIRES - 1, expires_at=EXPIRES + 0.5) -> bool:
    return links.verify(secret, path, query, moment, expires_at)


# --- signing ----------------------------------------------------------------------------------------------------------


def test_a_link_opens_its_path_until_it_expires():
    query = signed()
    assert query["exp"] == str(EXPIRES)
    assert query["key"] == "0123abcd"
    assert len(query["sig"]) * 6 >= 128
    assert opens(query)
    assert opens({**query, "utm_source": "chat"})
    assert not opens(query, moment=EXPIRES)
    assert not opens(query, moment=EXPIRES + 1)
    assert links.is_genuine(SECRET, PATH, query)


def test_no_link_outlives_what_it_leads_to():
    assert not opens(signed(), moment=1, expires_at=EXPIRES - 0.5)


def test_a_link_is_the_same_whenever_it_is_made():
    assert links.sign(SECRET, PATH, EXPIRES, "local") == links.sign(SECRET, PATH, EXPIRES, "local")


@pytest.mark.parametrize(
    "change",
    [
        {"exp": str(EXPIRES + 1)},
        {"exp": f"0{EXPIRES}"},
        {"exp": f" {EXPIRES}"},
        {"exp": f"+{EXPIRES}"},
        {"exp": "²"},
        {"exp": "٣"},
        {"exp": "9" * 5000},
        {"exp": "nan"},
        {"exp": ""},
        {"key": "0123abce"},
        {"key": ""},
        {"key": "local|"},
        {"key": "é"},
        {"sig": ""},
        {"sig": "é" * 24},
        {"sig": "\udcff"},
        {"sig": "\0"},
    ],
)
def test_a_changed_link_opens_nothing_and_raises_nothing(change):
    assert not opens({**signed(), **change})


@pytest.mark.parametrize("place", range(24))
def test_every_character_of_the_signature_counts(place):
    query = signed()
    other = "A" if query["sig"][place] != "A" else "B"
    assert not opens({**query, "sig": query["sig"][:place] + other + query["sig"][place + 1 :]})


def test_a_shorter_or_longer_signature_opens_nothing():
    query = signed()
    assert not opens({**query, "sig": query["sig"][:-1]})
    assert not opens({**query, "sig": query["sig"] + "A"})
    assert not opens({**query, "sig": query["sig"] + "="})


@pytest.mark.parametrize("name", ["exp", "key", "sig"])
def test_every_part_is_needed(name):
    query = signed()
    del query[name]
    assert not opens(query)
    assert not opens({})


@pytest.mark.parametrize("path", ["", PATH[:-1], PATH.replace("mp4", "jpg"), f"{PATH}/", "/videos/\udcff", "/vidéos/x"])
def test_a_link_opens_no_other_path(path):
    assert not opens(signed(), path=path)


def test_what_is_signed_cannot_be_read_in_two_ways():
    assert not opens(signed(path="/a|1", expires=2), path="/a", moment=0)
    with pytest.raises(AssertionError):
        links.sign(SECRET, PATH, EXPIRES, "a|b")


def test_a_link_of_another_secret_opens_nothing():
    assert not opens(signed(secret=bytes(32)))


def test_services_of_one_redis_agree_on_the_secret(records):
    first = links.link_secret(records.redis)
    assert len(first) == 32
    assert links.link_secret(records.redis) == first
    records.redis.delete(LINK_SECRET_KEY)
    assert links.link_secret(records.redis) != first


@pytest.mark.parametrize("found", ["", "secret", 64 * "x", 62 * "0"])
def test_a_secret_that_is_none_is_refused(records, found):
    records.redis.set(LINK_SECRET_KEY, found)
    with pytest.raises(ValueError, match=f"^{LINK_SECRET_KEY} in Redis is not 64 hexadecimal digits; delete it"):
        links.link_secret(records.redis)


# --- the route --------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(request, records, redis_server, tmp_path):
    """A service that needs keys, two of which it has; and one finished video of the first."""
    url = request.getfixturevalue("bucket") if getattr(request, "param", "folder") == "s3" else str(tmp_path)
    keys = {}
    for name, scopes in {"owner": ("read",), "other": ("read",), "writer": ("generate",)}.items():
        text = new_key()
        key = Keys(records.redis).add(text, name, scopes)
        keys[name] = SimpleNamespace(id=key.id, headers={"Authorization": f"Bearer {text}"})
    record = new_record().model_copy(update={"owner": keys["owner"].id})
    records.create(record)
    record = records.change(record, (Status.QUEUED,), status=Status.SUCCEEDED)
    storage = Storage(url)
    for suffix in ("mp4", "jpg", "json"):
        storage.write(output_path(record.id, suffix), VIDEO)
    app = create_app(Settings(auth="on", redis_url=redis_server.url, storage_url=url))
    secret = links.link_secret(records.redis)
    return SimpleNamespace(app=app, records=records, record=record, storage=storage, keys=keys, secret=secret)


def ask(place, target: str, method: str = "GET", **options) -> httpx.Response:
    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(place.app)
        async with (
            place.app.router.lifespan_context(place.app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return await client.request(method, target, **options)

    return asyncio.run(answer())


def link(place, suffix="mp4", expires=None) -> str:
    path = f"/videos/{place.record.id}.{suffix}"
    until = int(place.record.expires_at) if expires is None else expires
    return f"{path}?{links.sign(place.secret, path, until, place.record.owner)}"


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("suffix", "kind"), [("mp4", "video/mp4"), ("jpg", "image/jpeg"), ("json", "application/json")]
)
def test_a_signed_link_needs_no_key(place, method, suffix, kind):
    answer = ask(place, link(place, suffix), method)
    assert (answer.status_code, answer.content) == (200, VIDEO if method == "GET" else b"")
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-length"] == str(len(VIDEO))
    assert answer.headers["content-disposition"] == f'inline; filename="{place.record.id}.{suffix}"'
    assert answer.headers["cache-control"].startswith("private, max-age=")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["etag"]


def test_a_part_of_a_video_comes_through_a_link(place):
    answer = ask(place, link(place), headers={"Range": "bytes=100-199"})
    assert (answer.status_code, answer.content) == (206, VIDEO[100:200])
    assert ask(place, link(place), headers={"Range": "bytes=99999999-"}).status_code == 416


def test_a_link_is_for_reading_and_for_one_file(place):
    assert ask(place, link(place), "POST").status_code == 405
    assert ask(place, link(place), "DELETE").status_code == 405
    query = urlsplit(link(place)).query
    assert code(ask(place, f"/videos/{place.record.id}.jpg?{query}")) == (401, "missing_key")
    assert ask(place, f"/generate/{place.record.id}?{query}").status_code == 401


def test_the_key_that_a_video_was_made_with_opens_it(place):
    path = f"/videos/{place.record.id}.mp4"
    assert ask(place, path, headers=place.keys["owner"].headers).content == VIDEO
    assert code(ask(place, path, headers=place.keys["other"].headers)) == (404, "not_found")
    assert code(ask(place, path, headers=place.keys["writer"].headers)) == (404, "not_found")
    assert ask(place, link(place), headers=place.keys["other"].headers).content == VIDEO


def test_a_key_that_may_not_read_does_not_open_its_own(place):
    mine = new_record().model_copy(update={"owner": place.keys["writer"].id})
    place.records.create(mine)
    place.records.change(mine, (Status.QUEUED,), status=Status.SUCCEEDED)
    answer = ask(place, f"/videos/{mine.id}.mp4", headers=place.keys["writer"].headers)
    assert code(answer) == (403, "scope_missing")


def test_without_link_and_key_nobody_learns_what_there_is(place):
    answers = [ask(place, f"/videos/{job_id}.mp4") for job_id in (place.record.id, f"vid_{26 * '0'}")]
    assert [code(answer) for answer in answers] == 2 * [(401, "missing_key")]
    assert answers[0].json() == answers[1].json()
    assert answers[0].headers["www-authenticate"].startswith("Bearer")
    forged = link(place)[:-4] + "AAAA"
    assert ask(place, forged).json() == answers[0].json()
    assert code(ask(place, f"/videos/{place.record.id}.mp4?exp=%ff&key=%00&sig=%C3%A9")) == (401, "missing_key")


def test_an_old_link_says_that_there_are_new_ones(place):
    assert code(ask(place, link(place, expires=int(now()) - 1))) == (401, "link_expired")
    assert code(ask(place, link(place, expires=int(place.record.expires_at) + 9))) == (401, "link_expired")


@pytest.mark.parametrize("status", [Status.EXPIRED, Status.SUCCEEDED])
def test_what_has_expired_is_gone_for_good(place, status):
    """Also where nobody has removed it yet."""
    hour_ago = now() - 3600
    place.records.change(place.record, (Status.SUCCEEDED,), status=status, expires_at=hour_ago)
    for answer in (
        ask(place, f"/videos/{place.record.id}.mp4", headers=place.keys["owner"].headers),
        ask(place, link(place, expires=int(hour_ago))),
    ):
        assert code(answer) == (410, "expired")
        assert "kept for 168 hours" in answer.json()["error"]["message"]


def test_what_is_not_ready_is_not_found(place):
    place.records.change(place.record, (Status.SUCCEEDED,), status=Status.FAILED)
    assert code(ask(place, link(place))) == (404, "not_ready")


def test_a_file_that_is_gone_is_not_found(place):
    place.storage.delete(output_path(place.record.id, "mp4"))
    assert code(ask(place, link(place))) == (404, "not_found")
    assert code(ask(place, link(place).replace(".mp4", ".gif"))) == (404, "not_found")


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_is_where_a_link_leads(place):
    answer = ask(place, link(place))
    assert (answer.status_code, answer.content) == (307, b"")
    assert answer.headers["cache-control"] == "private, no-store"
    there = answer.headers["location"]
    assert int(parse_qs(urlsplit(there).query)["X-Amz-Expires"][0]) <= 3600
    video = httpx.get(there, headers={"Range": "bytes=0-9"})
    assert (video.status_code, video.content, video.headers["content-type"]) == (206, VIDEO[:10], "video/mp4")
    for_head = ask(place, link(place), "HEAD").headers["location"]
    assert httpx.head(for_head).headers["content-length"] == str(len(VIDEO))
    assert code(ask(place, f"/videos/{place.record.id}.mp4")) == (401, "missing_key")


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_s_link_does_not_outlive_the_video(place):
    place.records.change(place.record, (Status.SUCCEEDED,), expires_at=now() + 30)
    answer = ask(place, f"/videos/{place.record.id}.mp4", headers=place.keys["owner"].headers)
    assert int(parse_qs(urlsplit(answer.headers["location"]).query)["X-Amz-Expires"][0]) <= 30
