"""A person's path through the playground, in Chromium against the real stack: from the open page to a playing video."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect

from service import auth
from tests.stack import Stack, run_with
from worker.contract import input_path, record_key
from worker.records import connect

pytestmark = pytest.mark.browser

VIDEO_S = 60
"""How long one video may take on a busy machine."""
COPY = ["clipboard-read", "clipboard-write"]
DESKTOP = {"width": 1280, "height": 900}
TWO = ["shapes-4step", "shapes-teacher"]


class Visit:
    """The page of a new visitor, with what the browser complained about and asked for.

    Opens the playground, or what the address goes on with ``at``.
    """

    def __init__(self, browser: Browser, url: str, *, at: str = "", locked: bool = False, **context: Any) -> None:
        self.url = url
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.goto(url + at)
        if locked:
            expect(self.page.get_by_label("API key")).to_be_focused()
        elif not at:
            expect_open(self.page)

    def close(self) -> None:
        """Nobody may have complained, save about refusals, which a test asks for."""
        self.context.close()
        assert self.elsewhere == []
        assert [text for text in self.complaints if "the server responded with a status of" not in text] == []

    def _note(self, url: str) -> None:
        if not url.startswith((self.url + "/", f"blob:{self.url}/", "data:image/")):
            self.elsewhere.append(url)


@pytest.fixture
def visit(browser: Browser, stack: Stack) -> Iterator[Callable[..., Visit]]:
    """Opens the playground."""
    visits: list[Visit] = []

    def start(url: str = stack.url, **context: Any) -> Visit:
        visits.append(Visit(browser, url, **context))
        return visits[-1]

    yield start
    for one in visits:
        one.close()


@pytest.fixture
def page(visit: Callable[..., Visit]) -> Page:
    return visit(viewport=DESKTOP).page


@pytest.fixture
def bare_page(browser: Browser, stack: Stack) -> Iterator[Page]:
    """A page of the same origin that runs nothing, to try the playground's modules in."""
    page = browser.new_page()
    page.goto(f"{stack.url}/livez")
    yield page
    page.close()


class Guarded:
    """A stack that needs keys, and whose worker has a student and its teacher."""

    def __init__(self, folder: Path) -> None:
        # PyTorch as it is: an engine would have to be built for the teacher first.
        self.stack = Stack(folder, MODEL=",".join(TWO), AUTH="on", ENGINE="eager")
        self.url = self.stack.url
        self.key = ""

    def start(self) -> None:
        self.stack.start()
        self.key = run_with("service", self.stack.environment, "keys", "add", "tester").stdout.strip()

    def new_key(self, scopes: tuple[str, ...] = ("generate", "read"), per_minute: int | None = None) -> str:
        text = auth.new_key()
        with connect(self.stack.redis.url) as redis:
            auth.Keys(redis).add(text, "another", scopes, per_minute=per_minute)
        return text

    def unlock(self, page: Page, key: str) -> None:
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    running = Guarded(tmp_path_factory.mktemp("guarded"))
    try:
        running.start()
        yield running
    finally:
        running.stack.stop()


@pytest.fixture
def guarded_page(visit: Callable[..., Visit], guarded: Guarded) -> Page:
    """The page of somebody who has given a key."""
    page = visit(guarded.url, locked=True, viewport=DESKTOP, permissions=COPY).page
    guarded.unlock(page, guarded.key)
    expect_open(page)
    return page


def expect_open(page: Page) -> None:
    """The model's chips are there, and the first example: its sentence and its picture."""
    expect(page.get_by_role("radio", name="moves right")).to_be_checked()
    expect(page.locator("#crop")).to_contain_text("red-circle.png, 64")


def assert_accessible(page: Page) -> None:
    """axe finds nothing, its "best practices" included."""
    violations = Axe().run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in violations] == []


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def copied(page: Page, language: str) -> str:
    """What a press on Copy puts on the clipboard."""
    page.locator("#code").evaluate("details => details.open = true")
    page.get_by_role("radio", name=language).check(force=True)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


def run_python(code: str, folder: Path, **environment: str) -> str:
    """What the program prints."""
    command = [sys.executable, "-c", code]
    ours = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=ours, capture_output=True, text=True, timeout=VIDEO_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_videos(page: Page) -> list[bytes]:
    """The files that play on the stage; their addresses are all that it takes to have them."""
    addresses = page.locator("video").evaluate_all("videos => videos.map((video) => video.src)")
    return [httpx.get(address).raise_for_status().content for address in addresses]


def prompt_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Prompt")


def choose(page: Page, part: str, choice: str) -> None:
    page.get_by_role("radiogroup", name=part).get_by_role("radio", name=choice, exact=True).check(force=True)


def keep_busy(stack: Stack, jobs: int = 8) -> None:
    """Some jobs ahead of the page's: the model alone is done before a person, or a test, sees the button to cancel."""
    body = {"prompt": "a green ring grows slowly, static camera"}
    image = (stack.root / "models" / "examples" / "green-ring.png").read_bytes()
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        for _ in range(jobs):
            client.post("/generate", data=body, files={"image": image}).raise_for_status()


def until(condition: Callable[[], object], what: str, seconds: float = VIDEO_S) -> None:
    """Poll from here: the page's own policy forbids the `eval` that `wait_for_function` needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)


def refusal(page: Page, act: Callable[[], None]) -> str:
    """What the server says against the request that `act` makes."""
    with page.expect_response(lambda response: response.url.endswith("/generate")) as answer:
        act()
    assert 400 <= answer.value.status < 500
    message: str = answer.value.json()["error"]["message"]
    return message


def test_the_page_opens_whole(visit: Callable[..., Visit], stack: Stack) -> None:
    opened = visit(viewport=DESKTOP)
    page = opened.page
    expect(page).to_have_title("FastLightGen playground")
    expect(page.locator("#makes")).to_contain_text("shapes-4step · student, 4 steps")
    assert page.get_by_role("list", name="Example images").get_by_role("button").count() >= 10
    for part in ("colour", "shape", "motion", "pace", "camera", "second"):
        expect(page.get_by_role("radiogroup", name=part)).to_be_visible()
    expect(page.get_by_label("Model", exact=True)).to_be_hidden()  # there is nothing to choose from
    page.wait_for_load_state("networkidle")
    assert opened.complaints == []
    assert_accessible(page)
    # A page of one version with a script of another would be neither.
    assert page.request.get(f"{stack.url}/web/app.js").headers["cache-control"] == "no-cache"


def test_every_control_has_a_name(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.get_by_text("Code for this").click()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and any(p["name"] == "focusable" and p["value"]["value"] for p in node["properties"])
    ]
    controls = [(role, name) for role, name in controls if role != "RootWebArea"]
    assert {role for role, _ in controls} >= {"button", "radio", "textbox", "link"}
    assert [role for role, name in controls if not name] == []


def test_chips_and_the_sentence_follow_each_other(page: Page) -> None:
    prompt = prompt_of(page)
    page.get_by_role("button", name="Example: blue star").click()
    expect(page.get_by_role("radio", name="star", exact=True)).to_be_checked()
    choose(page, "motion", "moves up")
    choose(page, "shape", "circle")
    choose(page, "colour", "green")
    choose(page, "pace", "leave open")
    choose(page, "camera", "camera zooms out")
    choose(page, "second", "a ring enters")
    expect(prompt).to_have_value("a green circle moves up, camera zooms out, and a ring enters")
    expect(page.get_by_role("radio", name="spins clockwise")).to_be_disabled()  # nobody can see a circle turn
    prompt.fill("An orange  square spins slowly.")
    expect(page.get_by_role("radio", name="orange")).to_be_checked()
    expect(page.get_by_role("radio", name="spins", exact=True)).to_be_checked()
    expect(page.get_by_role("radiogroup", name="camera").get_by_role("radio", name="leave open")).to_be_checked()
    expect(page.get_by_role("radio", name="circle", exact=True)).to_be_disabled()
    prompt.fill("a white dragon")
    expect(page.get_by_role("radio", name="white")).to_be_checked()
    choose(page, "shape", "triangle")  # mends the sentence, with the rest as it last was
    expect(prompt).to_have_value("a white triangle spins slowly")


def test_what_the_server_refuses_is_said_beside_the_field(page: Page) -> None:
    generate = page.get_by_role("button", name="Generate")
    prompt = prompt_of(page)
    prompt.fill("a red dragon moves right")
    message = refusal(page, generate.click)
    assert "dragon" in message
    expect(page.locator("#prompt-error")).to_have_text(message)
    expect(prompt).to_have_accessible_description(re.compile(re.escape(message)))
    expect(prompt).to_have_attribute("aria-invalid", "true")
    expect(prompt).to_be_focused()
    assert_accessible(page)
    choose(page, "shape", "circle")
    expect(page.locator("#prompt-error")).to_be_hidden()

    seed = page.get_by_label("Seed", exact=True)
    seed.fill("minus one")
    message = refusal(page, lambda: seed.press("Enter"))
    expect(seed).to_have_accessible_description(message)
    seed.fill("")

    # Not a picture, once chosen and once dropped beside the zone.
    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not a picture"}
    page.get_by_label("Your image").set_input_files([text])
    message = refusal(page, generate.click)
    upload = page.locator("#image")
    expect(upload).to_have_accessible_description(message)
    page.get_by_role("button", name="Example: red circle").click()
    expect(page.locator("#image-error")).to_be_hidden()
    drop(page, "notes.txt", "not a picture")
    assert refusal(page, generate.click) == message
    expect(page.locator("#image-error")).to_have_text(message)


def drop(page: Page, name: str, content: str) -> None:
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const data = new DataTransfer();
            data.items.add(new File([content], name));
            return data;
        }""",
        [name, content],
    )
    page.locator("main").dispatch_event("drop", {"dataTransfer": transfer})


def test_from_an_image_and_a_sentence_to_a_playing_video(page: Page, stack: Stack) -> None:
    page.get_by_label("Your image").set_input_files(stack.root / "models" / "examples" / "red-circle.png")
    expect(page.get_by_alt_text("The image that the video starts from")).to_be_visible()
    choose(page, "pace", "slowly")
    choose(page, "camera", "camera zooms in")
    page.evaluate(
        """() => {
            window.seen = [];
            window.said = [];
            const note = () => {
                const [step, progress] = ["[aria-current=step]", "progress"].map((one) => document.querySelector(one));
                if (step && progress.checkVisibility()) window.seen.push([step.textContent, progress.value]);
                if (step) window.said.push(document.querySelector(".doing").textContent);
            };
            const whatever = { childList: true, subtree: true, characterData: true };
            new MutationObserver(note).observe(document.getElementById("panes"), whatever);
        }"""
    )
    keep_busy(stack)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    video = page.locator("video")
    expect(video).to_be_visible(timeout=VIDEO_S * 1000)
    phases = list(dict.fromkeys(phase for phase, _ in page.evaluate("window.seen")))
    progress = [value for _, value in page.evaluate("window.seen")]
    assert len(set(phases) & {"encoding", "denoising", "decoding", "saving"}) >= 2
    assert progress == sorted(progress)
    assert len(set(progress)) > 3
    said = list(dict.fromkeys(page.evaluate("window.said")))
    assert any(re.match(r"Number \d+ in line", text) for text in said), said
    left = [int(found[1]) for text in said if (found := re.search(r"about (\d+) s left", text))]
    assert left == sorted(left, reverse=True), said

    until(lambda: video.evaluate("video => video.readyState >= 2 && video.currentTime > 0.2"), "the video to play")
    before = video.evaluate("video => video.currentTime")
    until(lambda: video.evaluate("video => video.currentTime") != before, "the video to go on", 5)
    assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [64, 64]
    expect(page.locator("#facts")).to_contain_text(re.compile(r"Seed\s*\d+"))
    expect(page.locator("#facts")).to_contain_text("shapes")
    expect(page.locator(".timings")).to_contain_text(re.compile(r"denoising\s*\d+\.\d+ s"))
    expect(page.get_by_role("link", name="Download")).to_have_attribute("download", re.compile(r"^vid_\w+\.mp4$"))

    # The address is the video's own, and the gallery has it first.
    entry = page.get_by_role("region", name="Recent").get_by_role("link").first
    expect(entry).to_have_attribute("aria-current", "true")
    expect(entry).to_have_attribute("href", re.compile(r"^#vid_"))
    assert page.url.endswith(entry.get_attribute("href") or "?")
    page.reload()
    expect(page.locator("video")).to_be_visible()
    sentence = "a red circle moves right slowly, camera zooms in"
    expect(page.locator("#shown-prompt")).to_have_text(sentence)
    assert_accessible(page)

    # Once more: after a reload it starts from the first frame of the video. The first one stays a step back.
    first, seed = page.url, page.locator("#facts dd").first.inner_text()
    keep_busy(stack)
    page.get_by_role("button", name="Again with a new seed").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    expect(video).to_be_visible(timeout=VIDEO_S * 1000)
    expect(page.locator("#shown-prompt")).to_have_text(sentence)
    expect(page.locator("#facts dd").first).not_to_have_text(seed)
    assert page.url != first
    page.go_back()
    expect(page.locator("#facts dd").first).to_have_text(seed)
    assert page.url == first

    deletes = page.get_by_role("button", name=f"Delete: {sentence}")
    expect(deletes).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    deletes.last.click()
    expect(deletes).to_have_count(1)
    expect(page.get_by_text("This picture is where the video starts.")).to_be_visible()
    assert "#" not in page.url


def test_with_the_keyboard_alone(page: Page, stack: Stack) -> None:
    prompt_of(page).focus()
    stops = []
    for _ in range(20):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if stops[-1] == "generate":
            break
    assert stops[-1] == "generate"
    assert "part-motion" in stops
    keep_busy(stack)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator(".ended-title")).to_have_text("Cancelled", timeout=VIDEO_S * 1000)
    expect(page.locator("#status")).to_contain_text("Cancelled")
    expect(page.locator("#stage-title")).to_be_focused()  # the button has gone: the keyboard stays near it


def test_what_is_missing_is_said_until_it_is_there(page: Page) -> None:
    causes = {"status": "not ready", "causes": ["no worker is running"]}
    page.route("**/readyz", lambda route: route.fulfill(status=503, json=causes))
    page.reload()
    banner = page.locator("#banner")
    expect(banner).to_contain_text("no worker is running")
    page.unroute("**/readyz")
    expect(banner).to_be_hidden(timeout=10_000)


@pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("dark", 390)])
def test_a_phone_needs_no_sideways_scrolling(visit: Callable[..., Visit], scheme: str, width: int) -> None:
    phone = {"width": width, "height": 740}
    page = visit(viewport=phone, color_scheme=scheme, has_touch=True, reduced_motion="reduce").page
    expect(page.get_by_role("button", name="Generate")).to_be_in_viewport()
    generate(page)
    video = page.locator("video")
    expect(video).to_be_visible(timeout=VIDEO_S * 1000)
    page.get_by_text("Code for this").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    until(lambda: video.evaluate("video => video.readyState >= 2"), "the video to be there")
    assert video.evaluate("video => video.paused")  # who wants less motion starts it
    assert_accessible(page)


def test_the_time_left_never_goes_up(bare_page: Page) -> None:
    """What the server says, second by second, against what is shown ten times a second."""
    said = [10, 9, 15, 14, 2, 6, 5, 4, 3, 2, 1, 0.5]
    shown = bare_page.evaluate(
        """async (said) => {
            const { Countdown } = await import("/web/pane.js");
            const countdown = new Countdown();
            const shown = [];
            said.forEach((left, second) => {
                countdown.hear(left, 1000 * second);
                for (let tenth = 0; tenth < 10; tenth++) shown.push(countdown.left(1000 * second + 100 * tenth));
            });
            return shown;
        }""",
        said,
    )
    assert shown == sorted(shown, reverse=True)
    assert max(before - after for before, after in pairwise(shown)) < 3  # not in one leap
    assert shown[0] == 10
    assert 1 < shown[49] < 3  # it has come down to what was said at 4
    assert shown[-1] < 0.5


def test_events_are_read_as_they_come(bare_page: Page) -> None:
    """In pieces of any size, with any line ends; comments are no messages."""
    text = ": hello\r\nretry: 50\r\n\r\nid: 1-0\r\nevent: generation\r\ndata: {\r\ndata:}\r\n\r\n: ping\n\ndata: x\n\n"
    read = bare_page.evaluate(
        """async (text) => {
            const { EventParser } = await import("/web/api.js");
            return [1, 2, 7, 1000].map((size) => {
                const parser = new EventParser();
                const found = [];
                for (let at = 0; at < text.length; at += size) found.push(...parser.feed(text.slice(at, at + size)));
                return found.filter(({ data, retry }) => data !== undefined || retry);
            });
        }""",
        text,
    )
    messages = [
        {"event": "message", "retry": 50},
        {"event": "generation", "id": "1-0", "data": "{\n}"},
        {"event": "message", "data": "x"},
    ]
    assert read == [messages] * 4


def test_a_broken_connection_goes_on_where_it_was(page: Page) -> None:
    asked: list[str | None] = []

    def break_the_first(route: Route) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) == 1:
            route.fulfill(body="retry: 10\nid: 1-0\ndata: x\n\n", content_type="text/event-stream")
        elif len(asked) == 2:
            route.fulfill(status=503, json={"error": {"message": "later"}})
        else:
            route.continue_()

    page.route("**/events", break_the_first)
    generate(page)
    expect(page.locator("video")).to_be_visible(timeout=VIDEO_S * 1000)
    assert asked[:3] == [None, "1-0", "1-0"]


def test_a_seed_is_drawn_kept_and_taken_along_as_code(
    visit: Callable[..., Visit], stack: Stack, tmp_path: Path
) -> None:
    page = visit(viewport=DESKTOP, permissions=COPY).page
    shutil.copy(stack.root / "models" / "examples" / "blue-star.png", tmp_path / "my star's.png")
    page.get_by_label("Your image").set_input_files(tmp_path / "my star's.png")
    prompt_of(page).fill("a blue star moves up slowly")
    page.get_by_role("button", name="Draw a new one").click()
    seed = page.get_by_label("Seed", exact=True)
    drawn = seed.input_value()
    assert 0 <= int(drawn) < 2**32
    generate(page)
    expect(page.locator("#facts dd").first).to_have_text(drawn, timeout=VIDEO_S * 1000)
    seed.fill("")
    page.get_by_role("button", name="Keep this seed").click()
    expect(seed).to_have_value(drawn)

    [shown] = shown_videos(page)
    page.reload()  # the code still names the image
    expect(page.locator("video")).to_be_visible()
    command = copied(page, "curl")
    assert "Authorization" not in command
    answer = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=VIDEO_S, check=True)
    job = httpx.Response(200, content=answer.stdout).json()
    assert (job["status"], job["seed"], job["model"]) == ("succeeded", int(drawn), "shapes-4step")
    assert httpx.get(job["video_url"]).content == shown
    program = copied(page, "Python")
    assert "FASTLIGHTGEN_KEY" not in program
    assert (tmp_path / run_python(program, tmp_path).strip()).read_bytes() == shown


def test_each_end_is_said_with_a_way_on(page: Page, stack: Stack) -> None:
    keep_busy(stack, 4)
    generate(page)
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    (stack.storage / input_path(page.evaluate("location.hash.slice(1)"))).unlink()
    assert_accessible(page)
    title = page.locator(".ended-title")
    expect(title).to_have_text("This one did not work out", timeout=VIDEO_S * 1000)
    expect(page.locator(".ended-text")).to_have_text("the input image is no longer in the storage")
    assert_accessible(page)
    seed = page.locator("#facts dd").first.inner_text()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("video")).to_be_visible(timeout=VIDEO_S * 1000)
    expect(page.locator("#facts dd").first).to_have_text(seed)

    with connect(stack.redis.url) as redis:
        redis.hset(record_key(page.evaluate("location.hash.slice(1)")), "status", "expired")
    page.reload()
    expect(title).to_have_text("No longer kept")
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    page.get_by_role("button", name="Back to the request").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(seed)
    expect(page.get_by_text("This picture is where the video starts.")).to_be_visible()


def test_the_key_is_asked_for_kept_in_the_tab_and_forgotten(visit: Callable[..., Visit], guarded: Guarded) -> None:
    opened = visit(guarded.url, locked=True, viewport=DESKTOP)
    page, field = opened.page, opened.page.get_by_label("API key")
    expect(page.get_by_role("button", name="Generate")).to_be_hidden()
    assert_accessible(page)
    guarded.unlock(page, "fl_00000000_" + 43 * "x")
    expect(page.locator("#key-error")).to_contain_text("mistyped, or has been revoked")
    expect(field).to_have_accessible_description(re.compile("mistyped"))

    key = guarded.new_key(scopes=("read",))
    field.fill(key)
    field.press("Enter")
    expect_open(page)
    assert key in page.evaluate("Object.values(sessionStorage)")
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    expect_open(page)
    message = refusal(page, lambda: generate(page))
    assert "'generate'" in message
    expect(page.locator("#refused")).to_have_text(message)

    page.get_by_role("button", name="Forget").click()
    expect(field).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_who_asks_too_often_is_told_when_to_ask_again(visit: Callable[..., Visit], guarded: Guarded) -> None:
    page = visit(guarded.url, locked=True, viewport=DESKTOP).page
    key = guarded.new_key(per_minute=1)
    guarded.unlock(page, key)
    expect_open(page)
    body, image = {"prompt": "a red circle grows"}, (guarded.stack.root / "models/examples/red-circle.png").read_bytes()
    headers = {"Authorization": f"Bearer {key}"}
    httpx.post(f"{guarded.url}/generate", data=body, files={"image": image}, headers=headers).raise_for_status()
    message = refusal(page, lambda: generate(page))
    expect(page.locator("#refused")).to_have_text(message)
    button = page.get_by_role("button", name=re.compile(r"^Try again in \d+ s"))
    expect(button).to_have_attribute("aria-disabled", "true")
    first = button.inner_text()
    expect(button).not_to_have_text(first)  # it counts
    assert_accessible(page)


def test_code_takes_the_key_from_the_environment(guarded_page: Page, guarded: Guarded, tmp_path: Path) -> None:
    page = guarded_page
    generate(page)
    expect(page.locator("video")).to_be_visible(timeout=VIDEO_S * 1000)
    [shown] = shown_videos(page)
    shutil.copy(guarded.stack.root / "models" / "examples" / "red-circle.png", tmp_path)
    program, command = copied(page, "Python"), copied(page, "curl")
    assert guarded.key not in program + command
    made = run_python(program, tmp_path, FASTLIGHTGEN_KEY=guarded.key).strip()
    assert (tmp_path / made).read_bytes() == shown
    assert '-H "Authorization: Bearer $FASTLIGHTGEN_KEY"' in command


def test_two_models_are_compared_on_one_seed(guarded_page: Page, guarded: Guarded) -> None:
    page = guarded_page
    page.get_by_role("switch", name="Compare two").check(force=True)
    expect(page.get_by_label("Model", exact=True)).to_have_value(TWO[0])
    expect(page.get_by_label("Model to compare with")).to_have_value(TWO[1])
    page.get_by_label("Model", exact=True).select_option(TWO[1])  # the other one gives way
    expect(page.get_by_label("Model to compare with")).to_have_value(TWO[0])
    page.get_by_label("Model", exact=True).select_option(TWO[0])
    generate(page)
    panes = page.locator(".pane")
    expect(panes).to_have_count(2)
    expect(panes.nth(1).get_by_role("progressbar")).to_be_visible()
    expect(panes.nth(1).get_by_role("button", name="Cancel shapes-teacher")).to_be_visible()
    expect(page.locator("#verdict")).to_be_visible(timeout=VIDEO_S * 1000)
    for pane, name, steps in zip((panes.nth(0), panes.nth(1)), TWO, ("student, 4", "teacher, 50"), strict=True):
        expect(pane.get_by_role("heading")).to_have_text(f"{name} {steps} steps")
        expect(pane.locator(".caption")).to_contain_text(re.compile(r"denoising \d+\.\d+ s"))
    assert float(page.locator("#verdict strong").inner_text().split()[0]) > 3
    expect(page.locator("#verdict")).to_contain_text("as long in denoising: shapes-teacher took")
    assert_in_step(page)
    assert_accessible(page)

    # The address holds both; what is on the screen can be taken along.
    assert re.search(r"#vid_\w+\+vid_\w+$", page.url)
    page.reload()
    expect(page.locator("#verdict")).to_be_visible()
    assert_in_step(page)
    program, command = copied(page, "Python"), copied(page, "curl")
    assert "for model in ['shapes-4step', 'shapes-teacher']:" in ast.unparse(ast.parse(program))
    subprocess.run(["sh", "-n", "-c", command], check=True)
    assert "for model in shapes-4step shapes-teacher; do" in command
    assert guarded.key not in program + command

    page.set_viewport_size({"width": 390, "height": 844})
    boxes = [panes.nth(index).bounding_box() or {} for index in range(2)]
    assert boxes[0]["x"] == boxes[1]["x"]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert_accessible(page)

    page.get_by_role("button", name="Again with a new seed").click()
    page.get_by_role("button", name="Cancel shapes-teacher").click()
    expect(panes.nth(1).locator(".ended-title")).to_have_text("Cancelled", timeout=VIDEO_S * 1000)
    expect(panes.nth(0).locator("video")).to_be_visible(timeout=VIDEO_S * 1000)


def assert_in_step(page: Page) -> None:
    """Both play, and one control stops both at the same place."""
    videos = page.locator("video")
    times = "videos => videos.map((video) => video.currentTime)"
    until(lambda: all(time > 0.2 for time in videos.evaluate_all(times)), "both videos to play", 10)
    first, second = videos.evaluate_all(times)
    assert abs(first - second) < 0.25
    page.get_by_role("button", name="Pause both videos").click()
    assert videos.evaluate_all("videos => videos.map((video) => video.paused)") == [True, True]
    first, second = videos.evaluate_all(times)
    assert first == second
    slider = page.get_by_role("slider", name="Position in both videos")
    slider.fill("0.5")
    assert [round(time, 1) for time in videos.evaluate_all(times)] == [1.1, 1.1]
    page.get_by_role("button", name="Play both videos").click()
