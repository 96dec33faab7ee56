"""The programs in `examples/` are run as a reader would run them, and so is what `docs/clients.md` shows."""

import ast
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, get_args

import httpx
import pytest
from standardwebhooks import Webhook

from service import images, transcode, webhooks
from service.auth import Keys, new_key
from service.schema import MAX_METADATA, Generation
from service.settings import Settings
from tests.clips import decode
from tests.stack import ROOT, free_port, new_record, stop, wait_for
from worker.contract import MAX_DEATHS, METRICS_KEY, active_key
from worker.records import connect
from worker.releases import NotPromoted

EXAMPLES = ROOT / "examples"
GUIDE = (ROOT / "docs" / "clients.md").read_text()
CLIENTS = ("generate.sh", "generate.py", "openai_client.py", "generate.mjs")
PROMPT = "a red circle moves right quickly, static camera"


@pytest.fixture(scope="module")
def hook_port() -> int:
    """Where the receiver of webhooks listens."""
    return free_port()


@pytest.fixture(scope="module")
def guarded(stack, hook_port):
    """The address of a service that needs keys and sends to the receiver, on the stack's worker."""
    with stack.second_service(AUTH="on", PRIVATE_HOSTS=f"127.0.0.1:{hook_port}") as url:
        yield url


@pytest.fixture(scope="module")
def key(stack):
    """Text and webhook secret of a key, as `python -m service keys add` prints them."""
    text = new_key()
    connection = connect(stack.redis.url)
    yield text, Keys(connection).add(text, "examples", ("generate", "read")).webhook_secret
    connection.close()


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=90
    )


def command_of(name: str) -> list[str | Path]:
    """What runs an example."""
    program = {".py": sys.executable, ".sh": "bash", ".mjs": "node"}[Path(name).suffix]
    if program != sys.executable and not shutil.which(program):
        pytest.skip(f"needs the program {program}")
    return [program, EXAMPLES / name]


# --- the programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_writes_a_video(stack, name, example_image, tmp_path):
    done = run([*command_of(name), example_image, PROMPT], tmp_path, FASTLIGHTGEN_URL=stack.url)
    assert done.returncode == 0, done.stderr
    assert_is_video(done.stdout, tmp_path)


def assert_is_video(said: str, folder: Path) -> None:
    [path] = said.splitlines()
    assert Path(path).parent == folder.resolve()
    assert decode(Path(path).read_bytes(), folder).shape == (17, 64, 64, 3)


@pytest.mark.parametrize("name", ["generate.sh", "generate.py", "generate.mjs"])
def test_a_refusal_is_said_in_the_servers_words(stack, name, example_image, tmp_path):
    done = run([*command_of(name), example_image, "a red dragon"], tmp_path, FASTLIGHTGEN_URL=stack.url)
    assert done.returncode != 0
    assert "came 'dragon'" in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_with_a_key_waits_when_it_is_told_to_and_sends_again(stack, guarded, name, example_image, tmp_path):
    text, connection = new_key(), connect(stack.redis.url)
    key = Keys(connection).add(text, "one at a time", ("generate", "read"), max_jobs=1)
    connection.zadd(active_key(key.id), {"another": math.inf})

    def num_refused() -> int:
        return int(connection.hget(METRICS_KEY, "admission_rejected_total|reason=jobs") or 0)

    before = num_refused()
    with started(name, example_image, tmp_path, FASTLIGHTGEN_URL=guarded, FASTLIGHTGEN_KEY=text) as process:
        wait_for(lambda: num_refused() > before or process.poll() is not None, 30, "a refusal")
        connection.zrem(active_key(key.id), "another")
        said, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert_is_video(said, tmp_path)
    assert num_refused() > before
    connection.close()


@pytest.mark.parametrize("name", ["generate.py", "generate.mjs"])
def test_a_client_goes_on_after_the_last_event_that_came(stack, client, name, example_image, tmp_path):
    for _ in range(3):  # ahead of its own, which does not end with the first event then
        body = {"data": {"prompt": PROMPT}, "files": {"image": example_image.read_bytes()}}
        client.post("/generate", **body).raise_for_status()
    with Cutter(stack.port) as cutter, started(name, example_image, tmp_path, FASTLIGHTGEN_URL=cutter.url) as process:
        said, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert_is_video(said, tmp_path)
    assert b"last-event-id: " in cutter.sent.lower()
    assert complaints.endswith("succeeded 100%\n")


@contextmanager
def started(name: str, image: Path, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """An example that is running."""
    command, environment = [*command_of(name), image, PROMPT], {**os.environ, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


class Cutter:
    """Hands on what goes to and comes from a port of this machine, and cuts one connection: after the first event."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._has_cut = False
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = b""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._send, args=(near, far), daemon=True).start()
                threading.Thread(target=self._receive, args=(far, near), daemon=True).start()

    def _send(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError), far:
            while data := near.recv(65536):
                self.sent += data
                far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def _receive(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError), near:
            while data := far.recv(65536):
                near.sendall(data)
                if b"event: generation" in data and not self._has_cut:
                    self._has_cut = True
                    break
            near.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def receiver(key, hook_port, tmp_path):
    """`webhook_receiver.py` at work, and the folder that it writes into."""
    said, complaints = tmp_path / "said", tmp_path / "complaints"
    environment = {**os.environ, "FASTLIGHTGEN_WEBHOOK_SECRET": key[1]}
    command = [*command_of("webhook_receiver.py"), str(hook_port)]
    with said.open("wb") as out, complaints.open("wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=err)
    url = f"http://127.0.0.1:{hook_port}"
    wait_for(lambda: process.poll() is not None or is_listening(url), 20, "the receiver")
    yield url, said, complaints
    stop(process)


def is_listening(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 501
    except httpx.TransportError:
        return False


@pytest.fixture
def courier(stack, guarded, hook_port, tmp_path):
    """Sends webhooks, for links to the guarded service."""
    environment = {**stack.environment, "AUTH": "on", "PRIVATE_HOSTS": f"127.0.0.1:{hook_port}", "PUBLIC_URL": guarded}
    with (tmp_path / "courier.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "service.webhooks"], cwd=ROOT, env=environment, stderr=log)
    yield
    stop(process)


@pytest.mark.usefixtures("courier")
def test_the_receiver_verifies_fetches_and_does_nothing_twice(guarded, key, receiver, example_image, tmp_path):
    url, said, complaints = receiver
    with httpx.Client(base_url=guarded, headers={"Authorization": f"Bearer {key[0]}"}, timeout=60) as client:
        body = {"prompt": PROMPT, "webhook_url": f"{url}/hook"}
        job = client.post("/generate", data=body, files={"image": example_image.read_bytes()}).json()

        def attempts() -> int:
            webhook = client.get(f"/generate/{job['id']}").json()["webhook"]
            return webhook["attempts"] if webhook and webhook["status"] == "delivered" else 0

        wait_for(said.read_text, 60, "the video")
        wait_for(attempts, 20, "the delivery")
        video = tmp_path / f"{job['id']}.mp4"
        assert_is_video(said.read_text(), tmp_path)
        video.unlink()
        assert client.post(f"/generate/{job['id']}/webhook").status_code == 202
        wait_for(attempts, 20, "the second delivery")
    message = {"type": "generation.succeeded", "data": job}
    assert httpx.post(url, json=message, headers=forged_headers(json.dumps(message))).status_code == 400
    assert httpx.post(url, content=b"\xff", headers={"webhook-id": "x"}).status_code == 400
    assert complaints.read_text().count("refused: ") == 2
    assert not video.exists()  # the repeat was left alone, and the forgery


def forged_headers(body: str) -> dict[str, str]:
    """Signed with another secret."""
    moment = datetime.now(UTC)
    signature = Webhook("whsec_" + 32 * "A").sign("msg_forged", moment, body)
    timestamp = str(int(moment.timestamp()))
    return {"webhook-id": "msg_forged", "webhook-timestamp": timestamp, "webhook-signature": signature}


# --- the guide -------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("language", "suffix"), [("python", "py"), ("javascript", "mjs")])
def test_what_the_guide_shows_stands_in_an_example(language, suffix):
    sources = [path.read_text() for path in EXAMPLES.glob(f"*.{suffix}")]
    assert blocks(language)
    for block in blocks(language):
        assert any(block in source for source in sources), block


def test_the_commands_of_the_guide_work(guarded, key, example_image, tmp_path):
    """All of them, one after the other, in one shell."""
    if not shutil.which("curl"):
        pytest.skip("needs the program curl")
    shutil.copy(example_image, tmp_path / "image.png")
    script = "\n".join(["set -euo pipefail", *blocks("sh")])
    done = run(["bash", "-c", script], tmp_path, FASTLIGHTGEN_URL=guarded, FASTLIGHTGEN_KEY=key[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert decode((tmp_path / "video.mp4").read_bytes(), tmp_path).shape == (17, 64, 64, 3)


def test_the_answer_that_the_guide_shows_is_one():
    [text] = blocks("json")
    shown = Generation.model_validate_json(text, extra="forbid")
    assert shown.model_fields_set == Generation.model_fields.keys()


def test_the_guide_knows_every_error_and_no_other():
    rows = re.findall(r"^\| \d{3} \| (.*?) \|", GUIDE, re.MULTILINE)
    of_a_status = {"bad_request", "method_not_allowed", "request_header_fields_too_large"}
    of_a_field = {f"unknown_{name}" for name in ("recipe", "preset", "teacher", "dataset")}
    made_up = of_a_status | of_a_field | set(get_args(NotPromoted.Code))
    assert named(" ".join(rows)) == codes_of("service") | made_up
    ends = re.search(r"^A job that has failed(.*?)\n\n", GUIDE, re.DOTALL | re.MULTILINE)
    assert ends
    # Of jobs whose attempts were all lost, no call says it: `JobRecord.given_up` does.
    given_up = {new_record().given_up(cause)[0] for cause in ("redis", "storage", "lease")}
    given_up.add(new_record().model_copy(update={"deaths": MAX_DEATHS}).given_up()[0])
    assert named(ends[1]) - {"error"} == codes_of("worker") | given_up


def named(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def codes_of(package: str) -> set[str]:
    """Every text that stands where calls of `ApiError`, `Refusal`, `body` and `fail` have an error's code."""
    place = {"ApiError": 1, "Refusal": 0, "body": 1, "fail": 2}
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                codes = node.args[place[name] :][:1] if name in place else []
                found |= {code.value for code in codes if isinstance(code, ast.Constant)}
    return found


def test_the_limits_of_the_guide_are_those_of_the_service():
    settings, guide = Settings(), " ".join(GUIDE.split())
    pauses = [
        f"{pause // 3600} h" if pause >= 3600 else f"{pause // 60} min" for pause in webhooks.BACKOFF_S if pause >= 60
    ]
    pauses = [*(f"{pause} s" for pause in webhooks.BACKOFF_S if pause < 60), *pauses]
    for text in (
        f"| {settings.max_body_bytes / 2**20:g} MiB |",
        f"| {settings.max_pixels:,} pixels, {images.MIN_SIDE} to {images.MAX_SIDE:,} a side |",
        f"| {transcode.MAX_PIXELS:,} pixels a frame, {transcode.MIN_SIDE} a side at least; {transcode.MAX_SECONDS} s; ",
        f"| 2000 characters; {webhooks.MAX_URL}; {MAX_METADATA} as JSON |",
        f"| {settings.key_max_jobs}; {settings.key_per_minute} |",
        f"| {settings.max_queued}; {settings.max_wait_s:g} |",
        f"for `LINK_HOURS` ({settings.link_hours:g})",
        f"after about {', '.join(pauses[:-1])} and {pauses[-1]} ",
        f"Answer 2xx within {webhooks.TIMEOUT_S} s",
    ):
        assert text in guide


def test_its_files_exist():
    named_files = set(re.findall(r"\]\(\.\./(examples/[\w.]+)\)", GUIDE))
    assert named_files == {f"examples/{path.name}" for path in EXAMPLES.iterdir() if path.is_file()}
