"""A person's path through the playground, in Chromium against the real stack: from the open page to a playing video."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.stack import Stack

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
VIDEO_S = 60
"""How long one video may take on a busy machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("needs a browser: install the package `chromium`")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """The page of a new visitor, with what the browser complained about and asked for."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.goto(url)
        expect(self.page.get_by_role("radio", name="moves right")).to_be_checked()  # the model's chips and an example

    def _note(self, url: str) -> None:
        if not url.startswith((self.url + "/", f"blob:{self.url}/", "data:image/")):
            self.elsewhere.append(url)


@pytest.fixture
def visit(browser: Browser, stack: Stack) -> Iterator[Callable[..., Visit]]:
    """Opens the playground; at the end nobody may have complained, save about the refusals that a test asked for."""
    visits: list[Visit] = []

    def start(**context: Any) -> Visit:
        visits.append(Visit(browser, stack.url, **context))
        return visits[-1]

    yield start
    for one in visits:
        one.context.close()
        assert one.elsewhere == []
        assert [text for text in one.complaints if "the server responded with a status of" not in text] == []


@pytest.fixture
def page(visit: Callable[..., Visit]) -> Page:
    return visit(viewport={"width": 1280, "height": 900}).page


def prompt_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Prompt")


def choose(page: Page, part: str, choice: str) -> None:
    page.get_by_role("radiogroup", name=part).get_by_role("radio", name=choice, exact=True).check(force=True)


def keep_busy(stack: Stack) -> None:
    """Some jobs ahead of the page's: the model alone is done before a person, or a test, sees the button to cancel."""
    body = {"prompt": "a green ring grows slowly, static camera"}
    image = (stack.root / "models" / "examples" / "green-ring.png").read_bytes()
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        for _ in range(8):
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


def test_the_page_opens_whole(visit: Callable[..., Visit]) -> None:
    opened = visit(viewport={"width": 1280, "height": 900})
    page = opened.page
    expect(page).to_have_title("FastLightGen playground")
    expect(page.get_by_text("shapes-4step")).to_be_visible()
    assert page.get_by_role("list", name="Example images").get_by_role("button").count() >= 10
    for part in ("colour", "shape", "motion", "pace", "camera", "second"):
        expect(page.get_by_role("radiogroup", name=part)).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert opened.complaints == []


def test_every_control_has_a_name(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.get_by_text("Options").click()
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
    choose(page, "shape", "circle")
    expect(page.locator("#prompt-error")).to_be_hidden()

    page.get_by_text("Options").click()
    seed = page.get_by_label("Seed")
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
            const note = () => window.seen.push([
                document.querySelector("[aria-current=step]")?.textContent, document.querySelector("progress").value]);
            new MutationObserver(note).observe(document.getElementById("phases"), { childList: true });
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

    until(lambda: video.evaluate("video => video.readyState >= 2 && video.currentTime > 0.2"), "the video to play")
    before = video.evaluate("video => video.currentTime")
    until(lambda: video.evaluate("video => video.currentTime") != before, "the video to go on", 5)
    assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [64, 64]
    expect(page.locator("#facts")).to_contain_text(re.compile(r"Seed\s*\d+"))
    expect(page.locator("#facts")).to_contain_text("shapes")
    expect(page.locator("#timings")).to_contain_text(re.compile(r"denoising\s*\d+\.\d+ s"))
    expect(page.get_by_role("link", name="Download")).to_have_attribute("download", re.compile(r"^vid_\w+\.mp4$"))

    # The address is the video's own, and the gallery has it first.
    entry = page.get_by_role("region", name="Recent").get_by_role("link").first
    expect(entry).to_have_attribute("aria-current", "true")
    expect(entry).to_have_attribute("href", re.compile(r"^#vid_"))
    assert page.url.endswith(entry.get_attribute("href") or "?")
    page.reload()
    expect(page.locator("video")).to_be_visible()
    sentence = "a red circle moves right slowly, camera zooms in"
    expect(page.locator("#done-prompt")).to_have_text(sentence)

    # Once more: after a reload it starts from the first frame of the video. The first one stays a step back.
    first, seed = page.url, page.locator("#facts dd").first.inner_text()
    keep_busy(stack)
    page.get_by_role("button", name="Again with a new seed").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    expect(video).to_be_visible(timeout=VIDEO_S * 1000)
    expect(page.locator("#done-prompt")).to_have_text(sentence)
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
    expect(page.locator("#ended-title")).to_have_text("Cancelled", timeout=VIDEO_S * 1000)
    expect(page.locator("#status")).to_contain_text("Cancelled")


def test_what_is_missing_is_said_until_it_is_there(page: Page) -> None:
    causes = {"status": "not ready", "causes": ["no worker is running"]}
    page.route("**/readyz", lambda route: route.fulfill(status=503, json=causes))
    page.reload()
    banner = page.locator("#banner")
    expect(banner).to_contain_text("no worker is running")
    page.unroute("**/readyz")
    expect(banner).to_be_hidden(timeout=10_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit: Callable[..., Visit], scheme: str) -> None:
    phone = {"width": 360, "height": 740}
    page = visit(viewport=phone, color_scheme=scheme, has_touch=True, reduced_motion="reduce").page
    page.get_by_text("Options").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.get_by_role("button", name="Generate")).to_be_in_viewport()
