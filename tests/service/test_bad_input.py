"""Whatever is wrong is refused with the right 4xx, in the envelope, and leaves nothing in Redis or in the storage.

Most of it is sent by hand: HTTP clients are too polite for what is tried here.
"""

import base64
import http.client
import io
import json
import re
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import psutil
import pytest
import redis
import uvicorn
from PIL import Image

from service.auth import Keys, new_key
from service.errors import ApiError
from service.images import clean
from service.wire import HttpProtocol
from tests.stack import free_port, wait_for
from worker.records import connect

PROMPT = "a red circle moves right quickly, static camera"
MAX_PIXELS = 24_000_000
MIB = 2**20
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=XX"}
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}
NOWHERE = "vid_00000000000000000000000000"
BEATS = re.compile(
    r"flg:(workers?\b|metrics|swept|seconds|rate|upkeep|.*:upkeep)|rq:(workers?\b|job|results|finished|clean)"
)
"""Keys that change by themselves, or that other jobs' ends and the passing of time change."""


# --- requests by hand -------------------------------------------------------------------------------------------------


class Answer:
    """What came back, and how much could be sent before."""

    def __init__(self, response: http.client.HTTPResponse, sent: int) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()
        self.sent = sent

    @property
    def error(self) -> dict:
        """The inside of the envelope."""
        [(name, error)] = json.loads(self.body).items()
        assert name == "error"
        assert set(error) == {"message", "type", "param", "code"}
        return error


def head(method: str, path: str, headers=None, **lengths: int) -> bytes:
    """A request line and headers; values may be bytes. ``length=`` adds a Content-Length."""
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: localhost"]
    for name, value in (headers or {}).items():
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode("latin-1")))
    lines += [b"Content-Length: %d" % length for length in lengths.values()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def talk(stack, *pieces: bytes, half_close: bool = False) -> Answer:
    """Send these, and read the answer, which may come before all is sent."""
    with socket.create_connection(("127.0.0.1", stack.port), timeout=30) as connection:
        sent = 0
        try:
            for piece in pieces:
                connection.sendall(piece)
                sent += len(piece)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass
        response = http.client.HTTPResponse(connection, method=pieces[0].split(b" ")[0].decode("latin-1"))
        response.begin()
        return Answer(response, sent)


def post(stack, path: str, headers: dict, body: bytes) -> Answer:
    return talk(stack, head("POST", path, headers, length=len(body)), body)


def form(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"--XX\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + b"--XX--\r\n"


def text(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="%b"' % name, value


def file(name: bytes, data: bytes, filename: bytes = b"x.png") -> tuple[bytes, bytes]:
    disposition = b'Content-Disposition: form-data; name="%b"; filename="%b"' % (name, filename)
    return disposition + b"\r\nContent-Type: image/png", data


PROMPT_PART = text(b"prompt", PROMPT.encode())


def upload(stack, image: bytes, filename: bytes = b"x.png") -> Answer:
    return post(stack, "/generate", FORM, form(PROMPT_PART, file(b"image", image, filename)))


# --- what is left -----------------------------------------------------------------------------------------------------


def everything(stack) -> tuple[dict[str, bytes], set[str]]:
    """All keys with their content, but for what beats, and all files."""
    with redis.Redis.from_url(stack.redis.url) as connection:
        names = [key for key in connection.scan_iter("*", count=1000) if not BEATS.match(key.decode())]
        pipeline = connection.pipeline(transaction=False)
        for name in names:
            pipeline.dump(name)
        found = dict(zip(map(bytes.decode, names), pipeline.execute(), strict=True))
    return found, {str(path) for path in stack.folder.rglob("*") if path.is_file()}


@contextmanager
def nothing_left(stack):
    """Whatever is sent inside leaves nothing that was not there, and changes nothing that was."""
    keys, files = everything(stack)
    yield
    keys_after, files_after = everything(stack)
    # Those that are gone have had their time: other tests' jobs were here before.
    assert [key for key, value in keys_after.items() if value is not None and keys.get(key) != value] == []
    assert files_after - files == set()


@pytest.fixture(scope="module")
def quiet(stack):
    """The stack, when no job is under way."""
    upload(stack, b"no image")  # it makes the keys that every request makes
    wait_until_quiet(stack)
    return stack


def wait_until_quiet(stack) -> None:
    with redis.Redis.from_url(stack.redis.url) as connection:
        wait_for(lambda: not connection.zcard("flg:slots"), 60, "all jobs to end")


@pytest.fixture
def paused(quiet):
    """The worker takes no job: what is accepted stays as it was sent, and is deleted at once."""
    httpx.post(f"{quiet.url}/admin/queue/pause").raise_for_status()
    yield quiet
    for job in httpx.get(f"{quiet.url}/generate", params={"limit": 100}).json()["data"]:
        if job["status"] == "queued":
            httpx.delete(f"{quiet.url}/generate/{job['id']}", timeout=30)  # 404: the worker had it in its hands
    httpx.post(f"{quiet.url}/admin/queue/resume").raise_for_status()
    wait_until_quiet(quiet)


class Memory:
    """What the service holds, in MiB."""

    def __init__(self, stack) -> None:
        self._process = psutil.Process(stack.processes["service"].pid)
        self.peak = self.now()

    def now(self) -> float:
        return self._process.memory_info().rss / MIB

    @contextmanager
    def watched(self):
        """Keeps the ``peak`` of what happens inside."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                self.peak = max(self.peak, self.now())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expect", [{}, {"Expect": "100-continue"}])
@pytest.mark.parametrize("path", ["/generate", "/v1/videos", "/admin/distillations", "/livez"])
def test_a_body_that_says_it_has_100_mb_is_refused_before_any_of_it_is_sent(quiet, path, expect):
    memory = Memory(quiet)
    before = memory.now()
    with nothing_left(quiet):
        answer = talk(quiet, head("POST", path, {**JSON, **expect}, length=100 * MIB))
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"
        # And whoever sends it all the same is cut off: what the kernel holds is all that is taken.
        pushed = talk(quiet, head("POST", path, {**JSON, **expect}, length=100 * MIB), *[bytes(MIB)] * 100)
        assert pushed.status == 413
        assert pushed.sent < 30 * MIB
    assert memory.now() - before < 30


@pytest.mark.parametrize(
    ("path", "headers", "most"),
    [
        ("/generate", JSON, 20),
        ("/v1/videos", URLENCODED, 20),
        ("/v1/videos", JSON, 20),
        ("/admin/distillations", JSON, 1),
    ],
)
def test_a_body_of_100_mb_that_says_nothing_is_cut_off_at_the_limit(quiet, path, headers, most):
    memory = Memory(quiet)
    before = memory.now()
    chunk = b"%x\r\n%b\r\n" % (MIB, bytes(MIB))
    with nothing_left(quiet), memory.watched():
        start = head("POST", path, {**headers, "Transfer-Encoding": "chunked"})
        answer = talk(quiet, start, *[chunk] * 100, b"0\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert answer.sent < (most + 25) * MIB
    assert memory.peak - before < most + 60


def test_a_form_of_100_mb_in_one_file_is_cut_off_at_the_limit(quiet):
    start = form(PROMPT_PART, file(b"image", b""))[: -len(b"\r\n--XX--\r\n")]
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (start, *[bytes(MIB)] * 100)]
    with nothing_left(quiet):
        answer = talk(quiet, head("POST", "/generate", {**FORM, "Transfer-Encoding": "chunked"}), *chunks)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert answer.sent < 45 * MIB


def test_lengths_that_lie_leave_nothing(quiet, image):
    body = form(PROMPT_PART, file(b"image", image))
    with nothing_left(quiet):
        # The rest is no request.
        assert talk(quiet, head("POST", "/generate", FORM, length=len(body) - 100), body).status == 400
        with pytest.raises((http.client.HTTPException, ConnectionError)):  # nobody is there to be answered
            talk(quiet, head("POST", "/generate", FORM, length=len(body) + 100), body, half_close=True)
    assert "Traceback" not in quiet.log("service")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(head("POST", "/generate", FORM, one=5, other=6) + b"123456", id="two-lengths"),
        pytest.param(head("POST", "/generate", FORM, length=-1), id="negative-length"),
        pytest.param(head("POST", "/generate", {"Content-Length": "9" * 40}), id="huge-length"),
        pytest.param(head("POST", "/generate", {"Content-Length": "0x10"}), id="hexadecimal-length"),
        pytest.param(head("POST", "/generate", {"Transfer-Encoding": "chunked"}, length=5), id="length-and-chunked"),
        pytest.param(head("POST", "/generate", {"Transfer-Encoding": "xchunked"}) + b"1", id="unknown-encoding"),
        pytest.param(head("POST", "/generate", {"Transfer-Encoding": "chunked"}) + b"zz\r\n", id="bad-chunk"),
        pytest.param(head("GET", "/livez", {"X-Request-Id": b"a\nX-Evil: 1"}), id="line-feed"),
        pytest.param(head("GET", "/livez", {"X-Request-Id": b"a\rX-Evil: 1"}), id="carriage-return"),
        pytest.param(head("GET", "/livez", {"X-Request-Id": b"a\0b"}), id="nul"),
        pytest.param(head("GET", "/livez", {"X-Request-Id": b"a\r\n X-Evil: 1"}), id="folded"),
        pytest.param(head("GET", "/livez", {"X Request": "a"}), id="space-in-name"),
        pytest.param(head("GET", "/generate/\xff"), id="path-not-ascii"),
        pytest.param(head("FOO", "/generate"), id="no-such-method"),
        pytest.param(b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n", id="http-9.9"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls"),
        pytest.param(b"hello\r\n\r\n", id="words"),
    ],
)
def test_what_is_no_http_is_400(quiet, request_):
    answer = talk(quiet, request_)
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    assert b"X-Evil" not in answer.headers.as_bytes()


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "OPTIONS", "DELETE", "CONNECT", "PROPFIND"])
def test_other_methods_are_405_in_the_envelope(quiet, method):
    for path in ("/generate", "/v1/models", "/livez"):
        answer = talk(quiet, head(method, path))
        assert (answer.status, answer.error["code"]) == (405, "method_not_allowed"), path
        assert answer.headers["allow"]


FORMS = {
    "no-boundary": ("multipart/form-data", form(PROMPT_PART), 400),
    "empty-boundary": ("multipart/form-data; boundary=", form(PROMPT_PART), 400),
    "long-boundary": ("multipart/form-data; boundary=" + 10_000 * "x", form(PROMPT_PART), 400),
    "boundary-not-ascii": ("multipart/form-data; boundary=\xff\xfe", form(PROMPT_PART), 400),
    "other-boundary": ("multipart/form-data; boundary=YY", form(PROMPT_PART), 400),
    "empty": (FORM["Content-Type"], b"", 400),
    "one-boundary": (FORM["Content-Type"], b"--XX\r\n", 400),
    "end-alone": (FORM["Content-Type"], b"--XX--\r\n", 422),
    "no-name": (FORM["Content-Type"], form((b"Content-Disposition: form-data", b"x")), 400),
    "no-disposition": (FORM["Content-Type"], form((b"X-Header: x", b"x")), 400),
    "no-header": (FORM["Content-Type"], form((b"nonsense", b"x")), 400),
    "10000-parts": (FORM["Content-Type"], form(*[text(b"a%d" % n, b"x") for n in range(10_000)]), 400),
    "1000-files": (FORM["Content-Type"], form(*[file(b"image", b"x")] * 1000), 400),
    "part-headers-of-1-mb": (FORM["Content-Type"], form((b"X: " + MIB * b"x", b"x")), 400),
    "100000-part-headers": (FORM["Content-Type"], form((100_000 * b"X: x\r\n" + PROMPT_PART[0], b"x")), 400),
    "long-field-name": (FORM["Content-Type"], form(text(300 * b"a", b"x")), 422),
    "deep-field-name": (FORM["Content-Type"], form(text(b"metadata" + 100 * b"[a]", b"x")), 422),
    "many-values": (FORM["Content-Type"], form(PROMPT_PART, text(b"metadata", b"[" + 2 * MIB * b"[],")), 422),
    "charset-undefined": (FORM["Content-Type"] + "; charset=undefined", form(PROMPT_PART), 415),
    "charset-punycode": (FORM["Content-Type"] + '; CHARSET="punycode"', form(PROMPT_PART), 415),
    "charset-utf-7": (FORM["Content-Type"] + "; charset=utf-7", form(text(b"+2AA-", b"+2AA-")), 415),
    "mixed": ("multipart/mixed; boundary=XX", form(PROMPT_PART), 415),
    "text": ("text/plain", b"x", 415),
    "xml": ("application/xml", b"<x/>", 415),
    "an-image": ("image/png", b"\x89PNG", 415),
    "long-type": (5000 * "x", b"x", 415),
    "type-not-ascii": ("\xff", b"x", 415),
}


@pytest.mark.parametrize("path", ["/generate", "/v1/videos"])
def test_broken_forms_and_wrong_types(quiet, subtests, path):
    with nothing_left(quiet):
        for name, (content_type, body, status) in FORMS.items():
            with subtests.test(name):
                answer = post(quiet, path, {"Content-Type": content_type}, body)
                assert answer.status == status, answer.body
                assert 0 < len(answer.error["message"]) < 400


def test_a_form_that_breaks_off_is_refused_wherever_it_does(quiet, image):
    """Not taken without its last field: the seed would be another one."""
    body = form(PROMPT_PART, file(b"image", image), text(b"seed", b"1234567"))
    with nothing_left(quiet):
        for length in (*range(0, len(body), 97), *range(len(body) - 70, len(body) - 4)):
            assert post(quiet, "/generate", FORM, body[:length]).status in (400, 422), body[:length][-40:]


def test_urlencoded_bodies_are_bounded(quiet, subtests):
    memory = Memory(quiet)
    before = memory.now()
    bodies = {
        "many-fields": (2 * MIB * b"a=1&", 400),
        "deep-name": (b"a" + 5 * MIB * b"[b]" + b"=1", 422),
        "junk": (b"&&;;%%%=%=&\xff\xfe=\0", 422),
        "empty": (b"", 422),
    }
    with nothing_left(quiet), memory.watched():
        for name, (body, status) in bodies.items():
            with subtests.test(name):
                assert post(quiet, "/v1/videos", URLENCODED, body).status == status
    assert memory.peak - before < 150


FILE_NAMES = {
    "traversal": b"../../../../flg-evil.png",
    "absolute": b"/tmp/flg-evil.png",
    "windows": b"C:\\\\flg-evil.png",
    "backslashes": b"..\\\\..\\\\flg-evil.png",
    "nul": b"flg-evil\0.png",
    "unicode": "flg-evil-\N{PILE OF POO}-\N{RIGHT-TO-LEFT OVERRIDE}gnp.png".encode(),
    "not-utf-8": b"flg-evil-\xff\xfe.png",
    "quoted": b'flg-evil\\".png',
    "other-type": b"flg-evil.exe",
    "empty": b"",
    "long": 3000 * b"a" + b"flg-evil.png",
}


def test_nothing_is_called_what_a_client_calls_it(paused, subtests, image):
    for name, filename in FILE_NAMES.items():
        with subtests.test(name):
            answer = upload(paused, image, filename)
            assert answer.status == 202, answer.body
            assert b"evil" not in answer.body
    names = [str(path) for path in paused.folder.parent.rglob("*")]
    assert not [name for name in names if "flg-evil" in name]
    with redis.Redis.from_url(paused.redis.url) as connection:
        assert not [key for key in connection.scan_iter("*") if b"evil" in key]
    refused = upload(paused, image, 100_000 * b"a")
    assert (refused.status, refused.error["code"]) == (400, "form_unreadable")
    assert not [name for name in names if name.startswith("/tmp/flg-evil")]


# --- JSON and fields --------------------------------------------------------------------------------------------------


def json_bodies(field: str, url: str) -> dict[str, tuple[bytes, str]]:
    """Bodies, and the code of their refusal."""
    whole = f'"{field}": "{url}", "prompt": "{PROMPT}"'.encode()

    def more(members: bytes) -> bytes:
        return b"{%b, %b}" % (whole, members)

    return {
        "empty": (b"", "bad_json"),
        "null": (b"null", "bad_json"),
        "list": (b"[]", "bad_json"),
        "text": (b'"x"', "bad_json"),
        "cut-short": (b"{%b" % whole, "bad_json"),
        "two-documents": (b"{}{}", "bad_json"),
        "comment": (b"{/* */}", "bad_json"),
        "deep-lists": (100_000 * b"[", "bad_json"),
        "deep-objects": (3000 * b'{"a":', "bad_json"),
        "deep-metadata": (more(b'"metadata": ' + 4000 * b"[" + 4000 * b"]"), "bad_json"),
        "many-values": (b'{"a": [' + 3 * MIB * b"[]," + b"[]]}", "bad_json"),
        "huge-integer": (more(b'"seed": 1' + 5000 * b"0"), "bad_json"),
        "long-integer": (more(b'"seed": 1' + 4000 * b"0"), "invalid_field"),
        "infinite": (more(b'"seed": 1e400'), "invalid_field"),
        "nan": (more(b'"seed": NaN'), "invalid_field"),
        "minus-infinity": (more(b'"seed": -Infinity'), "invalid_field"),
        "half": (more(b'"seed": 0.5'), "invalid_field"),
        "negative": (more(b'"seed": -1'), "invalid_field"),
        "2^32": (more(b'"seed": 4294967296'), "invalid_field"),
        "boolean": (more(b'"steps": "yes"'), "invalid_field"),
        "twice": (more(b'"prompt": "a blue star grows"'), "invalid_field"),
        "twice-inside": (more(b'"metadata": {"a": "1", "a": "2"}'), "invalid_field"),
        "not-utf-8": (more(b'"model": "\xff\xfe"'), "bad_json"),
        "overlong-utf-8": (more(b'"model": "\xc0\xaf"'), "bad_json"),
        "surrogate": (more(b'"model": "\\ud800"'), "invalid_field"),
        "surrogate-raw": (more(b'"model": "\xed\xa0\x80"'), "invalid_field"),
        "surrogate-in-metadata": (more(b'"metadata": {"\\udfff": "\\ud800"}'), "invalid_field"),
        "control-character": (more(b'"model": "a\0b"'), "bad_json"),
        "prompt-with-nul": (
            b'{"%b": "%b", "prompt": "a red circle\\u0000 grows"}' % (field.encode(), url.encode()),
            "prompt_not_understood",
        ),
        "prompt-right-to-left": (
            b'{"%b": "%b", "prompt": "a red circle \\u202egrows\\u202c"}' % (field.encode(), url.encode()),
            "prompt_not_understood",
        ),
        "prompt-of-2-mb": (
            b'{"%b": "%b", "prompt": "%b"}' % (field.encode(), url.encode(), 2 * MIB * b"x"),
            "invalid_field",
        ),
        "prompt-list": (b'{"%b": "%b", "prompt": []}' % (field.encode(), url.encode()), "invalid_field"),
        "metadata-text": (more(b'"metadata": "x"'), "invalid_field"),
        "metadata-number": (more(b'"metadata": {"a": 1}'), "invalid_field"),
        "metadata-nested": (more(b'"metadata": {"a": {"b": "c"}}'), "invalid_field"),
        "metadata-long": (more(b'"metadata": {"a": "%b"}' % (2000 * b"x")), "invalid_field"),
        "metadata-many": (more(b'"metadata": {%b}' % b",".join(b'"%d": ""' % n for n in range(500))), "invalid_field"),
        "steps": (more(b'"steps": 1' + 4000 * b"0"), "steps_not_supported"),
        "image-number": (b'{"%b": 7, "prompt": "x"}' % field.encode(), "invalid_field"),
        "image-list": (b'{"%b": [1, 2], "prompt": "x"}' % field.encode(), "invalid_field"),
        "image-empty": (b'{"%b": "", "prompt": "%b"}' % (field.encode(), PROMPT.encode()), "image"),
        "image-not-base64": (
            b'{"%b": "data:image/png;base64,a$b", "prompt": "%b"}' % (field.encode(), PROMPT.encode()),
            "image_not_base64",
        ),
        "image-surrogate": (
            b'{"%b": "data:image/png;base64,\\ud800", "prompt": "%b"}' % (field.encode(), PROMPT.encode()),
            "image_not_base64",
        ),
        "image-unknown-scheme": (
            b'{"%b": "file:///etc/passwd", "prompt": "%b"}' % (field.encode(), PROMPT.encode()),
            "image_not_data_url",
        ),
    }


@pytest.mark.parametrize(("path", "field"), [("/generate", "image"), ("/v1/videos", "input_reference")])
def test_bad_json_is_422(quiet, subtests, data_url, path, field):
    with nothing_left(quiet):
        for name, (body, code) in json_bodies(field, data_url).items():
            with subtests.test(name):
                answer = post(quiet, path, JSON, body)
                assert answer.status == 422, answer.body
                assert answer.error["code"].startswith(code), answer.body
                assert len(answer.error["message"]) < 2100
                answer.body.decode()


def test_bad_json_for_the_administrator_is_4xx(quiet, subtests):
    bodies = {
        "empty": b"",
        "cut-short": b'{"recipe": ',
        "list": b"[]",
        "not-utf-8": b'{"recipe": "\xff"}',
        "deep": 5000 * b"[",
        "huge-integer": b'{"recipe": 1' + 5000 * b"0" + b"}",
        "nan": b'{"recipe": NaN}',
        "surrogate": b'{"recipe": "\\ud800"}',
        "surrogate-name": b'{"\\ud800": "\\ud800"}',
        "unknown": b'{"recipe": "../../etc/passwd"}',
        "unknown-preset": b'{"recipe": "shapes", "preset": "\\u0000"}',
        "other-field": b'{"recipe": "shapes", "output": "/tmp/x"}',
    }
    with nothing_left(quiet):
        for name, body in bodies.items():
            with subtests.test(name):
                answer = post(quiet, "/admin/distillations", JSON, body)
                assert answer.status == 422, answer.body
                assert answer.error["message"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "ftp://example.org/x",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "//example.org/x",
        "example.org",
        "https://",
        "https:///x",
        "https://user:password@example.org/x",
        "https://example.org:22/x",
        "https://example.org:99999/x",
        "https://127.0.0.1/x",
        "https://[::1]/x",
        "https://[::ffff:10.0.0.1]/x",
        "https://[64:ff9b::7f00:1]/x",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/x",
        "https://192.168.1.1/x",
        "https://100.64.0.1/x",
        "https://224.0.0.1/x",
        "https://0.0.0.0/x",
        "https://example.org/\r\nX-Evil: 1",
        "https://example.org/\0",
        "https://\ud83d/x",
        "https://example.org/" + 5000 * "x",
        7,
        [],
        {"url": "https://example.org"},
    ],
)
def test_webhooks_go_to_public_https_alone(quiet, data_url, url):
    body = json.dumps({"image": data_url, "prompt": PROMPT, "webhook_url": url}).encode()
    with nothing_left(quiet):
        answer = post(quiet, "/generate", JSON, body)
    assert (answer.status, answer.error["param"]) == (422, "webhook_url"), answer.body
    assert len(answer.error["message"]) < 400


# --- headers, paths and queries ---------------------------------------------------------------------------------------


def test_a_request_id_is_a_plain_token_or_another(quiet, subtests):
    values = {
        "line": b"a\r\nX-Evil: 1",
        "tab": b"a\tb",
        "spaces": b"a b",
        "latin-1": b"\xe9\xb5",
        "utf-8": "\N{SNOWMAN}".encode(),
        "quotes": b'"><script>',
        "long": 65 * b"x",
        "empty": b"",
    }
    for name, value in values.items():
        with subtests.test(name):
            answer = talk(quiet, head("GET", "/livez", {"X-Request-Id": value}))
            said = answer.headers["x-request-id"]
            # A line that ends ends the value; what comes after it is a header of the request.
            assert re.fullmatch(r"req_[0-9a-f]{16}", said) or (name == "line" and said == "a")
            assert "x-evil" not in answer.headers


NO_SECONDS = [b"", b"soon", b"nan", b"inf", b"-1", b"0", b"0.0", b"1e5", b"1e400", b"604801", b"1,5", b"\xb2", b"0x10"]
BAD_HEADERS = [
    ("Idempotency-Key", b"\xe9"),
    ("Idempotency-Key", b""),
    ("Idempotency-Key", b"a b"),
    ("Idempotency-Key", b"a\tb"),
    ("Idempotency-Key", 256 * b"x"),
    *((name, value) for name in ("X-Deadline", "X-Deadline-Start") for value in NO_SECONDS),
]


def test_bad_headers_of_a_request_for_a_video(quiet, subtests, image):
    body = form(PROMPT_PART, file(b"image", image))
    with nothing_left(quiet):
        for name, value in BAD_HEADERS:
            with subtests.test(f"{name}: {value[:20]!r}"):
                answer = post(quiet, "/generate", {**FORM, name: value}, body)
                assert (answer.status, answer.error["code"], answer.error["param"]) == (422, "invalid_header", name)


def test_headers_that_may_be_ignored_are(paused, image):
    """Preferences and hints that make no sense do not cost the client its video, nor make it wait for days."""
    body = form(PROMPT_PART, file(b"image", image))
    for name, value in (
        ("Prefer", b"wait=99999999999"),
        ("Prefer", b"wait=-1"),
        ("Prefer", b"wait=\xb2"),
        ("X-Stainless-Retry-Count", 5000 * b"9"),
        ("X-Stainless-Retry-Count", b"\xb2"),
        ("traceparent", b"00-nonsense"),
        ("tracestate", 8000 * b"x"),
    ):
        answer = post(paused, "/generate", {**FORM, name: value}, body)
        assert answer.status == 202, (name, value[:20], answer.body)


def test_other_sites_and_names_are_refused(quiet, subtests, image):
    body = form(PROMPT_PART, file(b"image", image))
    with nothing_left(quiet):
        for origin in (b"null", b"https://evil.example", b"http://[", b"http://localhost.evil.example", b"\xff", b"//"):
            with subtests.test(f"Origin: {origin!r}"):
                answer = post(quiet, "/generate", {**FORM, "Origin": origin}, body)
                assert (answer.status, answer.error["code"]) == (403, "other_site")
        for host in (b"evil.example", b"[", b"", b"localhost.evil.example", b"127.0.0.1:1:2", b"\xff", b"127.0.0.1@x"):
            with subtests.test(f"Host: {host!r}"):
                answer = talk(quiet, b"GET /generate HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
                assert (answer.status, answer.error["code"]) == (403, "other_site")


@pytest.fixture(scope="module")
def finished(quiet, image) -> str:
    """The id of a video that is done."""
    answer = post(quiet, "/generate", {**FORM, "Prefer": "wait=60"}, form(PROMPT_PART, file(b"image", image)))
    made = json.loads(answer.body)
    assert made["status"] == "succeeded"
    yield made["id"]
    httpx.delete(f"{quiet.url}/generate/{made['id']}", timeout=30)


@pytest.mark.parametrize(
    "last_id",
    [b"", b"x", b"-", b"99999999999999999999-0", b"18446744073709551615-18446744073709551615", b"1-1-1", b"\xb2-1"],
)
def test_a_last_event_id_that_is_none_of_ours_begins_anew(quiet, finished, last_id):
    answer = talk(quiet, head("GET", f"/generate/{finished}/events", {"Last-Event-ID": last_id}))
    assert answer.status == 200
    assert b'"status":"succeeded"' in answer.body


@pytest.mark.parametrize(
    ("range_", "status"),
    [
        (b"bytes=x", 400),
        (b"bytes=-", 400),
        (b"bytes=9-2", 400),
        (b"lines=0-1", 400),
        (b"bytes=0-" + 5000 * b"9", 400),
        (b"bytes=99999999-", 416),
        (b"bytes=-99999999999999999999", 206),
        (b"bytes=" + 9000 * b"0-1,", 200),
    ],
)
def test_ranges_that_are_none(quiet, finished, range_, status):
    answer = talk(quiet, head("GET", f"/videos/{finished}.mp4", {"Range": range_}))
    assert answer.status == status
    if status >= 400:
        assert answer.error["message"]
    if status == 416:
        assert answer.headers["content-range"].startswith("bytes */")


PATHS = [
    "/generate/..%2f..%2fetc%2fpasswd",
    "/generate/%2e%2e",
    "/generate/%00",
    "/generate/%0d%0aX-Evil:%201",
    f"/generate/{NOWHERE}%0a",
    f"/generate/{NOWHERE.upper()}",
    f"/generate/{NOWHERE}%00",
    "/generate/" + 20_000 * "a",
    "/generate/%ff%fe",
    "/generate/%",
    f"/generate/{NOWHERE}/events/..",
    "//generate",
    f"/v1/videos/..%2f{NOWHERE}/content",
    "/v1/videos/%2e%2e/content",
    "/v1/models/..%2f..%2fetc",
    "/v1/models/%00",
    "/videos/..%2f..%2f..%2fetc%2fpasswd.mp4",
    f"/videos/{NOWHERE}.mp4%00.png",
    f"/videos/{NOWHERE}.%2e%2e%2fx",
    "/examples/..%2findex.png",
    "/examples/%00.png",
    "/web/..%2f..%2fapp.py",
    "/web/%2e%2e/%2e%2e/app.py",
    "/web/../../app.py",
    "/web/%00",
    "/web/" + 5000 * "a",
    "/web//etc/passwd",
    "/admin/distillations/..%2f..",
    "/.env",
    "/generate.php",
]


def test_paths_that_lead_nowhere_are_404(quiet, subtests):
    with nothing_left(quiet):
        for path in PATHS:
            with subtests.test(path[:60]):
                answer = talk(quiet, head("GET", path))
                assert (answer.status, answer.error["type"]) == (404, "not_found_error"), answer.body
                assert "x-evil" not in answer.headers


QUERIES = [
    "/generate?limit=0",
    "/generate?limit=-1",
    "/generate?limit=101",
    "/generate?limit=1e2",
    "/generate?limit=" + 5000 * "9",
    "/generate?limit=NaN",
    "/generate?limit=",
    "/generate?limit=%EF%BC%95",
    "/generate?after=%00",
    "/generate?after=%ff%fe",
    "/generate?after=*",
    f"/generate?after={NOWHERE}",
    "/generate?after=" + 20_000 * "x",
    "/v1/videos?order=sideways",
    "/v1/videos?limit=0x10",
    "/v1/videos?after[]=x&after=",
    "/admin/distillations?limit=1000000000",
    "/admin/distillations?after=..%2f",
    "/admin/webhooks?limit=0",
    f"/v1/videos/{NOWHERE}/content?variant=%2e%2e%2fx",
    f"/v1/videos/{NOWHERE}/content?variant=" + 5000 * "x",
]


def test_queries_out_of_bounds_are_refused(quiet, subtests):
    for path in QUERIES:
        with subtests.test(path[:60]):
            answer = talk(quiet, head("GET", path))
            assert answer.status == (400 if "variant" in path else 422), answer.body
            assert answer.error["param"] in ("limit", "after", "order", "variant")
            assert len(answer.error["message"]) < 2100


# --- images -----------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, *chunks: bytes, rows: bytes | None = None) -> bytes:
    """Black when there are no ``rows``. Colour as in IHDR: 0 grey, 2 RGB, 3 palette, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    if rows is None:
        channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
        row, packer = bytes(1 + (width * bits * channels + 7) // 8), zlib.compressobj(1)
        data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    else:
        data = zlib.compress(rows)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def says(width: int, height: int, kind: str) -> bytes:
    """A small file whose header says this size."""
    if kind == "PNG":
        return png(64, 64, 8, 2).replace(struct.pack(">II", 64, 64), struct.pack(">II", width, height))
    if kind == "JPEG":
        data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
        place = data.find(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
        return bytes(data)
    canvas = b"".join(struct.pack("<I", side - 1)[:3] for side in (width, height))
    inner = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + encoded(Image.new("RGB", (64, 64)), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WEBP" + inner


def progressive(scans: int) -> bytes:
    """A small JPEG of 24 megapixels with one scan many times over: each is a pass over all of them."""
    data = encoded(Image.new("RGB", (6000, 4000), "red"), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + scans * data[last:-2] + b"\xff\xd9"


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
COLOURS = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
INFLATED = zlib.compress(bytes(200_000_000), 1)
"""A chunk's worth that becomes 200 MB."""

BOMBS = {
    "12000x12000-1-bit": lambda: png(12000, 12000, 1, 0),
    "20000x20000-1-bit": lambda: png(20000, 20000, 1, 0),
    "60000x60000-header": lambda: says(60000, 60000, "PNG"),
    "2^31-header": lambda: says(2**31 - 1, 2**31 - 1, "PNG"),
    "65535x65535-jpeg": lambda: says(65535, 65535, "JPEG"),
    "16383x16383-webp": lambda: says(16383, 16383, "WEBP"),
    "2^24-webp": lambda: says(2**24, 255, "WEBP"),
    "17000x20": lambda: png(17000, 20, 8, 0),
    "itxt": lambda: png(64, 64, 8, 2, chunk(b"iTXt", b"k\0\1\0\0\0" + INFLATED)),
    "ztxt": lambda: png(64, 64, 8, 2, chunk(b"zTXt", b"k\0\0" + INFLATED)),
    "iccp": lambda: png(64, 64, 8, 2, chunk(b"iCCP", b"k\0\0" + INFLATED)),
    "million-chunks": lambda: png(64, 64, 8, 2, 1_000_000 * chunk(b"teSt", b"")),
    "million-texts": lambda: png(64, 64, 8, 2, 1_000_000 * chunk(b"tEXt", b"a\0b")),
    "million-segments": lambda: b"\xff\xd8" + 1_000_000 * b"\xff\xfe\0\2" + encoded(COLOURS[0], "JPEG")[2:],
    "fill-bytes": lambda: b"\xff\xd8" + 10 * MIB * b"\xff" + encoded(COLOURS[0], "JPEG")[2:],
    "10000-scans": lambda: progressive(10_000),
}


def test_bombs_do_not_go_off(quiet, subtests):
    upload(quiet, encoded(NOISE)[:-200])  # whatever is loaded at the first
    memory = Memory(quiet)
    before = memory.now()
    with nothing_left(quiet), memory.watched():
        for name, make in BOMBS.items():
            with subtests.test(name):
                answer = upload(quiet, make())
                assert answer.status == 422, answer.body
                assert answer.error["code"] in ("image_too_large", "image_damaged", "image_too_complex")
                assert tells_what_to_do(answer.error["message"])
    assert memory.peak - before < 200
    assert memory.now() - before < 60


def tells_what_to_do(message: str) -> bool:
    return bool(re.search(r"\b(send|save|scale|convert|must be)\b", message, re.IGNORECASE))


def test_the_largest_pictures_that_are_taken_stay_within_memory(paused, subtests):
    """Four at once: two are decoded at a time."""
    largest = {
        "grey-16-bit": png(6000, 4000, 16, 0),
        "palette": png(6000, 4000, 8, 3, chunk(b"PLTE", b"\xff\0\0\0\xff\0"), chunk(b"tRNS", b"\x80")),
        "transparent": png(6000, 4000, 8, 6),
        "webp": encoded(Image.new("RGB", (6000, 4000), "red"), "WEBP", lossless=True, method=0),
        "thin": png(16, 16000, 8, 2),
    }
    memory = Memory(paused)
    before = memory.now()
    with memory.watched(), ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda data: upload(paused, data), largest.values())
        for name, answer in zip(largest, answers, strict=True):
            with subtests.test(name):
                assert answer.status == 202, answer.body
    assert memory.peak - before < 800
    assert memory.now() - before < 60  # and nothing of it is kept


REFUSED = {
    "empty": (b"", 422, "image_empty"),
    "one-byte": (b"\x89", 415, "image_format"),
    "signature": (b"\x89PNG\r\n\x1a\n", 422, "image_damaged"),
    "1x1": (png(1, 1, 8, 2), 422, "image_too_small"),
    "0x0": (says(0, 0, "PNG"), 422, "image_damaged"),
    "no-pixels": (png(64, 64, 8, 2)[:33] + chunk(b"IEND", b""), 422, "image_damaged"),
    "no-palette": (png(64, 64, 8, 3), 422, "image_damaged"),
    "checksum": (png(64, 64, 8, 2)[:29] + b"evil" + png(64, 64, 8, 2)[33:], 422, "image_damaged"),
    "animated-png": (encoded(COLOURS[0], save_all=True, append_images=COLOURS[1:]), 422, "image_animated"),
    "animated-webp": (
        encoded(COLOURS[0], "WEBP", save_all=True, append_images=COLOURS[1:]),
        422,
        "image_animated",
    ),
    "animated-gif": (encoded(COLOURS[0], "GIF", save_all=True, append_images=COLOURS[1:]), 415, "image_format"),
    "2^31-frames": (png(64, 64, 8, 2, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))), 422, "image_animated"),
    "gif": (encoded(COLOURS[0], "GIF"), 415, "image_format"),
    "tiff": (encoded(COLOURS[0], "TIFF"), 415, "image_format"),
    "bmp": (encoded(COLOURS[0], "BMP"), 415, "image_format"),
    "ico": (encoded(COLOURS[0], "ICO"), 415, "image_format"),
    "ppm": (encoded(COLOURS[0], "PPM"), 415, "image_format"),
    "psd": (b"8BPS\0\1" + bytes(60), 415, "image_format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", 415, "image_format"),
    "pdf": (b"%PDF-1.7\n", 415, "image_format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>", 415, "image_format"),
    "html": (b"<!doctype html><script>alert(1)</script>", 415, "image_format"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), 415, "image_format"),
    "mp4": (b"\0\0\0\x20ftypisom" + bytes(40), 415, "image_format"),
    "zip": (b"PK\3\4" + bytes(40), 415, "image_format"),
    "webp-of-sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), 415, "image_format"),
    "webp-of-nothing": (b"RIFF\4\0\0\0WEBP", 422, "image_damaged"),
}


def test_images_that_are_refused_say_why_and_leave_nothing(quiet, subtests):
    with nothing_left(quiet):
        for name, (data, status, code) in REFUSED.items():
            with subtests.test(name):
                answer = upload(quiet, data)
                assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, "image")
                assert tells_what_to_do(answer.error["message"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_that_are_cut_short_are_refused_wherever_they_are(quiet, kind):
    data = encoded(NOISE, kind)
    whole = clean(data, 64, 64, MAX_PIXELS)
    for length in range(0, len(data), 10):
        try:
            # At the end there may be nothing left to miss.
            assert clean(data[:length], 64, 64, MAX_PIXELS) == whole
            assert len(data) - length < 20
        except ApiError as error:
            assert error.code in ("image_empty", "image_format", "image_damaged")
            assert error.code == "image_damaged" or length < 12  # it begins as such a file does
    with nothing_left(quiet):
        for length in range(12, len(data) - 20, len(data) // 6):
            answer = upload(quiet, data[:length])
            assert (answer.status, answer.error["code"]) == (422, "image_damaged")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_make_no_other_error(kind):
    data = encoded(NOISE, kind, **({"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"} if kind != "PNG" else {}))
    random = np.random.default_rng(7)
    for number in range(300):
        damaged = bytearray(data)
        reach = 60 if number % 2 else len(data)
        for place in random.integers(0, reach, 1 + number % 5):
            damaged[place] = random.integers(0, 256)
        try:
            assert Image.open(io.BytesIO(clean(bytes(damaged), 64, 64, MAX_PIXELS))).size == (64, 64)
        except ApiError as error:
            assert error.status in (415, 422)


def rows(height: int, *pixel: int) -> bytes:
    """As many rows as columns, all of one pixel of 16 bits a channel."""
    return height * (b"\0" + height * struct.pack(f">{len(pixel)}H", *pixel))


def ycck() -> bytes:
    """A red JPEG as Photoshop writes them: inverted, and as luminance and colour. Pillow writes no such file itself."""
    y, cb, cr = Image.new("RGB", (1, 1), "cyan").convert("YCbCr").getpixel((0, 0))
    data = bytearray(encoded(Image.new("CMYK", (64, 64), (255 - y, 255 - cb, 255 - cr, 0)), "JPEG", quality=100))
    data[data.find(b"Adobe") + 11] = 2
    return bytes(data)


def with_exif(orientation: int) -> bytes:
    """Red at the left, blue at the right."""
    halves = Image.new("RGB", (128, 64), "red")
    halves.paste("blue", (64, 0, 128, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(halves, "JPEG", exif=exif, quality=95)


GARBAGE = [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + 100 * b"\xff", b""]

TAKEN = {
    # What it is, and pixels of it as the model is given it, at 4 of 64 from the top left and the bottom right.
    "grey-16-bit": (png(64, 64, 16, 0, rows=rows(64, 0xC0FF)), (192, 192, 192), (192, 192, 192)),
    "rgb-16-bit": (png(64, 64, 16, 2, rows=rows(64, 0xC000, 0x4000, 0x1234)), (192, 64, 18), (192, 64, 18)),
    "rgba-16-bit": (png(64, 64, 16, 6, rows=rows(64, 0xFF00, 0, 0, 0x8000)), (255, 127, 127), (255, 127, 127)),
    "palette-transparent": (
        png(64, 64, 8, 3, chunk(b"PLTE", b"\xff\0\0"), chunk(b"tRNS", b"\0")),
        (255, 255, 255),
        (255, 255, 255),
    ),
    "palette-large": (
        png(1500, 1500, 8, 3, chunk(b"PLTE", b"\xff\0\0"), chunk(b"tRNS", b"\x80")),
        (255, 127, 127),
        (255, 127, 127),
    ),
    "one-bit": (png(800, 800, 1, 0), (0, 0, 0), (0, 0, 0)),
    "cmyk": (encoded(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), "JPEG"), (0, 255, 255), (0, 255, 255)),
    "ycck": (ycck(), (255, 0, 0), (255, 0, 0)),
    "16x16000": (png(16, 16000, 8, 2), (0, 0, 0), (0, 0, 0)),
    "one-frame": (png(64, 64, 8, 2, chunk(b"acTL", struct.pack(">II", 0, 0))), (0, 0, 0), (0, 0, 0)),
    "upright": (with_exif(1), (255, 0, 0), (0, 0, 255)),
    "mirrored": (with_exif(2), (0, 0, 255), (255, 0, 0)),
    "upside-down": (with_exif(3), (0, 0, 255), (255, 0, 0)),
    "turned-right": (with_exif(6), (255, 0, 0), (0, 0, 255)),
    "turned-left": (with_exif(8), (0, 0, 255), (255, 0, 0)),
    "no-such-orientation": (with_exif(9), (255, 0, 0), (0, 0, 255)),
    "exif-garbage": (png(64, 64, 8, 2, *(chunk(b"eXIf", part) for part in GARBAGE)), (0, 0, 0), (0, 0, 0)),
    "exif-words": (png(64, 64, 8, 2, chunk(b"eXIf", b"garbage")), (0, 0, 0), (0, 0, 0)),
    "webp-exif-garbage": (encoded(COLOURS[0], "WEBP", exif=b"Exif\0\0garbage", quality=95), (255, 0, 0), (255, 0, 0)),
    "also-html": (encoded(COLOURS[1]) + b"<script>alert('hidden')</script>", (0, 0, 255), (0, 0, 255)),
    "html-inside": (
        png(64, 64, 8, 2, chunk(b"tEXt", b"k\0<script>alert('hidden')</script>")),
        (0, 0, 0),
        (0, 0, 0),
    ),
    "16-mb-of-text": (png(64, 64, 8, 2, chunk(b"tEXt", b"k\0" + 2**20 * b"hidden metadata ")), (0, 0, 0), (0, 0, 0)),
    "two-pictures": (
        encoded(COLOURS[0], "MPO", save_all=True, append_images=COLOURS[1:], quality=95),
        (255, 0, 0),
        (255, 0, 0),
    ),
}


def test_odd_images_are_taken_as_they_look_and_lose_all_else(paused, subtests):
    for name, (data, *pixels) in TAKEN.items():
        with subtests.test(name):
            answer = upload(paused, data)
            assert answer.status == 202, answer.body
            kept = (paused.storage / "inputs" / f"{json.loads(answer.body)['id']}.png").read_bytes()
            assert b"hidden" not in kept
            assert len(kept) < 20_000
            picture = Image.open(io.BytesIO(kept))
            assert (picture.format, picture.mode, picture.size, picture.info) == ("PNG", "RGB", (64, 64), {})
            for place, wanted in zip(((4, 4), (59, 59)), pixels, strict=True):
                assert picture.getpixel(place) == pytest.approx(wanted, abs=4)


def test_bad_uploads_at_once_give_their_places_back(quiet):
    """Fifty, through every way out: of the form, the fields, the image."""
    bodies = [
        form(PROMPT_PART, file(b"image", encoded(NOISE)[:-200])),
        form(PROMPT_PART, file(b"image", b"GIF89a" + bytes(40))),
        form(PROMPT_PART, file(b"image", says(60000, 60000, "PNG"))),
        form(PROMPT_PART, file(b"image", encoded(NOISE)))[:-20],
        form(text(b"prompt", b"a red dragon"), file(b"image", encoded(NOISE))),
    ]

    def slots() -> dict[bytes, bytes | None]:
        with redis.Redis.from_url(quiet.redis.url) as connection:
            return {key: connection.dump(key) for key in connection.scan_iter("flg:slots*")}

    before = slots()
    with nothing_left(quiet), ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(lambda number: post(quiet, "/generate", FORM, bodies[number % 5]).status, range(50)))
    assert {422, 415, 400} == set(statuses)
    assert slots() == before


# --- a service that needs keys and fetches images ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def redirector():
    """A server whose host is allowed, and that leads elsewhere; what has been asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", self.path.partition("?to=")[2])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def key(quiet) -> str:
    connection = connect(quiet.redis.url)
    made = new_key()
    Keys(connection).add(made, "bad input", ("generate", "read"))
    yield made
    Keys(connection).revoke(made.split("_")[1])
    connection.close()


@pytest.fixture(scope="module")
def locked(quiet, redirector):
    """A second service on the same Redis."""
    port, _ = redirector
    with quiet.second_service(AUTH="on", URL_IMAGES="on", PRIVATE_HOSTS=f"127.0.0.1:{port}") as url:
        yield url


def test_keys_that_are_none_are_401(quiet, locked, subtests, key):
    port = httpx.URL(locked).port
    where = type("Where", (), {"port": port})

    def ask(**headers: bytes) -> Answer:
        return talk(where, head("GET", "/generate", {name.replace("_", "-"): value for name, value in headers.items()}))

    wrong = {
        "none": {},
        "latin-1": {"Authorization": b"Bearer fl_\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9_" + 43 * b"\xe9"},
        "utf-8": {"X_API_Key": ("fl_" + 8 * "ä" + "_" + 43 * "ö").encode()},
        "long": {"Authorization": b"Bearer fl_aaaaaaaa_" + 30_000 * b"x"},
        "other": {"Authorization": b"Bearer fl_aaaaaaaa_" + 43 * b"x"},
        "almost": {"Authorization": f"Bearer {key[:-1]}".encode()},
        "more": {"Authorization": f"Bearer {key}x".encode()},
        "upper": {"Authorization": f"Bearer {key.upper()}".encode()},
        "basic": {"Authorization": b"Basic " + base64.b64encode(key.encode())},
        "empty": {"Authorization": b"Bearer "},
        "star": {"Authorization": b"Bearer fl_*_*"},
        "redis-key": {"X_API_Key": b"flg:key:*"},
    }
    with nothing_left(quiet):
        for name, headers in wrong.items():
            with subtests.test(name):
                answer = ask(**headers)
                assert (answer.status, answer.error["type"]) == (401, "authentication_error")
                assert "www-authenticate" in answer.headers
                assert key.encode() not in answer.body
    assert ask(Authorization=f"Bearer {key}".encode()).status == 200


def test_no_url_leads_inside(quiet, locked, subtests, key, redirector):
    port, asked = redirector
    blocked = [
        f"http://127.0.0.1:{quiet.port}/examples/red-circle.png",
        "http://127.0.0.1/x.png",
        "http://localhost/x.png",
        "http://169.254.169.254/latest/meta-data",
        "http://2130706433/x.png",
        "http://0x7f.1/x.png",
        "http://[::1]/x.png",
        "http://[::ffff:127.0.0.1]/x.png",
        "http://[64:ff9b::7f00:1]/x.png",
        "http://0.0.0.0/x.png",
        "https://user:password@127.0.0.1/x.png",
        f"http://localhost:{quiet.redis.port}/",
    ]
    lead = f"http://127.0.0.1:{port}/?to="
    led = [lead + blocked[0], lead + "http://169.254.169.254/", lead + "file:///etc/passwd", lead + "gopher://x"]
    with nothing_left(quiet), httpx.Client(base_url=locked, headers={"X-API-Key": key}, timeout=60) as client:
        for url in blocked + led:
            with subtests.test(url):
                answer = client.post("/generate", json={"image": url, "prompt": PROMPT})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (422, "image"), error
                assert error["code"] in ("image_url_blocked", "image_url_failed")
        openai = client.post("/v1/videos", json={"input_reference": {"image_url": blocked[0]}, "prompt": PROMPT})
        assert (openai.status_code, openai.json()["error"]["param"]) == (422, "input_reference")
    assert len(asked) == len(led)  # it was followed there, and no further


def test_urls_are_off_unless_they_are_on(quiet):
    with nothing_left(quiet), httpx.Client(base_url=quiet.url) as client:
        for url in ("http://127.0.0.1/x.png", "HTTPS://example.org/x.png", "https://example.org/" + 5000 * "x"):
            answer = client.post("/generate", json={"image": url, "prompt": PROMPT})
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "image_url_off")


# --- below the application --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare():
    """A server that says yes to whatever request reaches it, and how many did."""
    reached = []

    async def app(scope, receive, send) -> None:
        reached.append(scope["path"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, http=HttpProtocol, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started, 20, "the server")
    yield type("Bare", (), {"port": port, "reached": reached})
    server.should_exit = True
    thread.join()


def test_what_comes_before_a_body_is_bounded(bare):
    """Each of these would be kept, however long; a URL's cost grows with its square."""
    endless = {
        "headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", 100 * b"X-Header: x\r\n"),
        "one-header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Header: ", 1000 * b"x"),
        "url": (b"GET /", 1000 * b"x"),
        "trailers": (head("POST", "/", {"Transfer-Encoding": "chunked"}) + b"0\r\n", 100 * b"X-Header: x\r\n"),
        "chunk-extension": (head("POST", "/", {"Transfer-Encoding": "chunked"}) + b"1;x=", 1000 * b"x"),
        "empty-lines": (b"\r\n", 1000 * b"\r\n"),
    }
    for name, (start, more) in endless.items():
        answer = talk(bare, start, *[more] * 20_000)
        assert answer.status in (400, 431), name
        assert answer.error["type"] == "invalid_request_error"
        assert answer.sent < 15 * MIB, name
    assert set(bare.reached) <= {"/"}  # of those that had a head


def test_what_may_be_is_not_cut_off(bare):
    """Long heads, one after the other on one connection, and bodies in small chunks."""
    long = head("GET", "/long", {f"X-{number}": 1000 * "x" for number in range(50)})
    small = head("POST", "/small", {"Transfer-Encoding": "chunked"}) + 50_000 * b"2\r\nxx\r\n" + b"0\r\n\r\n"
    large = head("POST", "/large", length=5 * MIB) + bytes(5 * MIB)
    with socket.create_connection(("127.0.0.1", bare.port), timeout=30) as connection:
        for request in (long, small, large, long, large, small):
            connection.sendall(request)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 204
            response.read()


def test_what_is_no_http_is_refused_in_the_envelope(bare):
    answer = talk(bare, b"hello\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (400, "bad_request")
