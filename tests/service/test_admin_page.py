"""The administrators' part of the page, in Chromium against a real service: from the recipe's form to a release."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from redis import Redis

from distill.prompt import Prompt
from service import auth
from service.ids import new_id
from tests.service.test_playground import DESKTOP, Visit, assert_accessible, until
from tests.stack import ROOT, Stack, is_alive, stop, wait_for
from tests.stand_in import MODELS, STEPS, sha256_of
from worker.contract import (
    WORKERS_KEY,
    BlockImportance,
    Distillation,
    GateSummary,
    Heartbeat,
    ModelCard,
    Progress,
    Record,
    RunFile,
    Staging,
    Status,
    VideoSize,
    WorkerState,
    run_files_key,
    run_log_key,
    run_metrics_key,
    sample_path,
    worker_key,
)
from worker.records import Records, connect, now, publish_models
from worker.releases import Releases, Student
from worker.storage import Storage

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844}
RUN_MS = 30_000
"""How long a stand-in's run may take on a busy machine, in parts."""
PICTURE = ROOT / "models" / "examples" / "red-circle.png"
FIRST, GOOD, BAD = ("1a" * 32, "2b" * 32, "3c" * 32)
REFUSAL = "reference, motion: the videos stand still"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis and a service; trainers are started by the test that needs one, and workers are only heartbeats."""
    folder = tmp_path_factory.mktemp("admin")
    running = Stack(folder, RUNS=str(folder / "runs"), STUDENTS=str(folder / "students"))
    try:
        running.redis.start()
        running.spawn("service")
        wait_for(lambda: is_alive(running.url), 30, "the service to answer")
        yield running
    finally:
        running.stop()


@pytest.fixture(autouse=True)
def redis(service: Stack) -> Iterator[Redis]:
    """Empty at first."""
    with connect(service.redis.url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def visit(browser: Browser, service: Stack) -> Iterator[Callable[..., Page]]:
    """Opens the page at an address within it."""
    visits: list[Visit] = []

    def start(at: str = "/#admin", url: str = service.url, **context: Any) -> Page:
        visits.append(Visit(browser, url, at=at, **{"viewport": DESKTOP, **context}))
        return visits[-1].page

    yield start
    for one in visits:
        one.close()


class Written:
    """What trainers and workers write into Redis and the storage."""

    def __init__(self, stack: Stack, redis: Redis) -> None:
        self.redis, self.storage = redis, Storage(str(stack.storage))
        self.releases = Releases(redis)

    def student(self, sha256: str, gate: GateSummary | None = None, **changes: Any) -> Student:
        made = Student(
            sha256=sha256,
            name="shapes-4step",
            kind="student",
            backbone="wan",
            task="ti2v",
            num_inference_steps=4,
            parameters={},
            created_at="2026-01-01T00:00:00Z",
            added_at=now(),
            added_by="local",
            gate=gate,
        )
        return self.releases.register(made.model_copy(update=changes))

    def run(self, sha256: str, *refusals: str) -> Distillation:
        """One that is over, with a student that the gate has judged, and all that it has reported."""
        gate = GateSummary(passed=not refusals, refusals=list(refusals), against=FIRST, recipe="shapes", at=now())
        record = Distillation(
            id=new_id("dist"),
            status=Status.SUCCEEDED,
            recipe="shapes",
            preset="quick",
            overrides={"pruning.fit.steps": 80},
            teacher="shapes-teacher",
            dataset="shapes",
            created_at=now() - 600,
            started_at=now() - 590,
            finished_at=now(),
            attempt=1,
            progress=Progress(stage="student", step=1),
            importance=BlockImportance(drop=[1.5, 0.12, 0.08, 0.2], pruned=[2]),
            student_sha256=sha256,
            gate=gate,
        )
        Records(self.redis, Distillation).create(record)
        self.student(sha256, gate, distillation=record.id)
        self.metrics(record.id)
        for name, kind in {"importance.png": "plot", "matching-000450.png": "sheet", "gate.md": "report"}.items():
            self.file(record.id, name, kind)
        return record

    def metrics(self, job_id: str) -> None:
        lines = [("pruning", step, 80, {"loss": 0.4 / step}) for step in range(1, 81)]
        for step in range(25, 451, 25):
            gaps = {f"critic_gap_s{quarter}": (quarter + 1) / step for quarter in range(4)}
            lines.append(("matching", step, 450, {"loss": 30 / step, "critic_loss": 0.1, **gaps}))
        for at, (stage, step, steps, values) in enumerate(lines, 1):
            line = json.dumps({"time": now(), "stage": stage, "step": step, "steps": steps, "values": values})
            self.redis.xadd(run_metrics_key(job_id), {"data": line}, id=f"{at}-0")
            self.redis.xadd(run_log_key(job_id), {"line": f"{stage} {step}/{steps}"}, id=f"{at}-0")

    def file(self, job_id: str, name: str, kind: Any) -> None:
        data = PICTURE.read_bytes() if name.endswith(".png") else b"# refused\n\n- the videos stand still\n"
        self.storage.write(sample_path(job_id, name), data)
        file = RunFile(kind=kind, at=now(), size_bytes=len(data))
        self.redis.hset(run_files_key(job_id), name, file.model_dump_json())

    def record(self, job_id: str) -> Record:
        found = Records(self.redis, Record).get(job_id)
        assert found is not None
        return found

    def worker(self, loaded: str, staging: Staging | None = None, *others: str) -> None:
        """One that serves these students."""
        cards = [
            ModelCard(
                name="shapes-4step",
                sha256=sha256,
                task="ti2v",
                num_inference_steps=4,
                video=VideoSize(width=64, height=64, num_frames=17, fps=8),
                prompt=Prompt(kind="free", help="", examples=("a red circle grows",)),
            )
            for sha256 in (loaded, *others)
        ]
        publish_models(self.redis, cards)
        beat = Heartbeat(
            name="worker-1",
            state=WorkerState.READY,
            model=cards[0].id,
            model_sha256=loaded,
            models=tuple(card.id for card in cards),
            engine="eager",
            release=staging,
            started_at=now(),
            seen_at=now(),
        )
        self.redis.sadd(WORKERS_KEY, beat.name)
        self.redis.set(worker_key(beat.name), beat.model_dump_json())

    def first_release(self) -> None:
        """A student is active, as if it had been from the first."""
        self.student(FIRST)
        self.releases.promote(FIRST, by="local", reason="the first", force=True)
        self.worker(FIRST, Staging(wanted=FIRST, state="loaded"))


@pytest.fixture
def written(service: Stack, redis: Redis) -> Written:
    return Written(service, redis)


def region(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def button(page: Page | Locator, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def get(service: Stack, path: str) -> Any:
    return httpx.get(f"{service.url}/admin/{path}").raise_for_status().json()


def assert_fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def model_of(sha256: str) -> str:
    return f"shapes-4step@{sha256[:12]}"


# --- the form --------------------------------------------------------------------------------------------------------


def test_a_run_is_asked_for_with_what_was_changed_alone(visit: Callable[..., Page], service: Stack) -> None:
    page = visit()
    page.get_by_role("link", name="New distillation").click()
    expect(page.get_by_role("heading", name="New distillation")).to_be_focused()
    steps = page.get_by_label("pruning.fit.steps")
    expect(steps).to_have_value("2400")
    expect(steps).to_have_accessible_description(re.compile("updates of the weights; at least 1, at most 1,000,000"))
    steps.fill("2500")
    page.get_by_label("Preset").select_option("quick")
    expect(steps).to_have_value("2500")  # what was touched stays
    expect(page.get_by_label("matching.fit.steps")).to_have_value("15")  # the rest is the preset's
    steps.fill("80")

    open_group(page, "Matching")
    page.get_by_label("scores.beta_1, to").fill("2")
    page.get_by_label("rollout").select_option("renoise")
    page.get_by_label("critic.updates").fill("5")
    page.get_by_label("critic.updates").fill("2")  # and back
    open_group(page, "Importance")
    page.get_by_label("greedy").select_option("yes")
    expect(page.locator("summary", has_text="Matching")).to_contain_text("2 changed")
    open_group(page, "Gate")
    page.get_by_label("reference.dead_frames").fill("0.5")
    assert_accessible(page)

    button(page, "Start").click()
    expect(page.get_by_role("heading", name="shapes, quick queued")).to_be_focused()
    job_id = page.url.partition("#admin/")[2]
    run = get(service, f"distillations/{job_id}")
    assert run["overrides"] == {
        "pruning.fit.steps": 80,
        "importance.greedy": True,
        "matching.scores.beta_1": [0.5, 2],
        "matching.rollout": "renoise",
    }
    assert (run["limits"], run["preset"], run["promote"]) == ({"reference.dead_frames": 0.5}, "quick", "manual")
    expect(page.locator("#admin .facts")).to_contain_text("matching.scores.beta_10.5 to 2")
    page.reload()
    expect(page.get_by_role("heading", name="shapes, quick queued")).to_be_visible()
    button(page, "Cancel the run").click()
    expect(page.get_by_role("heading", name="shapes, quick cancelled")).to_be_focused()  # the button has gone
    button(page, "Resume").click()
    expect(page.get_by_role("heading", name="shapes, quick queued")).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="All distillations").or_(page.get_by_role("link", name="Admin")).first.click()
    expect(region(page, "Distillations").get_by_role("link", name="shapes, quick")).to_contain_text("queued")


def test_what_the_server_refuses_is_said_at_its_field(visit: Callable[..., Page], service: Stack) -> None:
    page = visit("/#admin/new")
    open_group(page, "Importance")
    rho = page.get_by_label("rho")
    rho.fill("1")
    open_group(page, "Importance")  # closes it over the field
    button(page, "Start").click()
    expect(rho).to_be_focused()
    expect(rho).to_have_accessible_description(re.compile("overrides.importance.rho: got 1; .* less than 1"))
    expect(rho).to_have_attribute("aria-invalid", "true")
    assert_accessible(page)
    rho.fill("0.3")
    expect(page.locator(".error:visible")).to_have_count(0)

    limit = page.get_by_label("ground_truth.score")
    open_group(page, "Gate")
    limit.press_sequentially("e")  # no number yet: what a browser makes nothing of is for the server to refuse
    button(page, "Start").click()
    expect(limit).to_have_accessible_description(re.compile("wanted a number"))
    assert get(service, "distillations")["data"] == []


def open_group(page: Page, name: str) -> None:
    """Or close it."""
    page.locator("summary", has_text=name).click()


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_is_watched_judged_promoted_and_rolled_back(
    visit: Callable[..., Page], service: Stack, written: Written
) -> None:
    first = sha256_of(MODELS / "shapes-4step")
    written.student(first)
    written.releases.promote(first, by="local", reason="the first", force=True)
    body = {"recipe": "shapes", "preset": "smoke"}
    made = httpx.post(f"{service.url}/admin/distillations", json=body).raise_for_status().json()
    page = visit(f"/#admin/{made['id']}")
    expect(page.get_by_text("Queued", exact=True)).to_be_visible()

    trainer = service.spawn("tests.stand_in", "trainer", "works")
    try:
        half_way = f"Matching, step {STEPS // 2} of {STEPS}"
        expect(page.get_by_text(half_way)).to_be_visible(timeout=RUN_MS)
        expect(page.get_by_role("progressbar")).to_have_attribute("value", "0.5")
        expect(page.locator(".stages [aria-current=step]")).to_have_text("matching")
        loss = region_of_plot(page, "Loss")
        expect(loss.get_by_role("img")).to_have_accessible_name(
            f"Loss. matching: 1 at step 1, then 0.25 at step {STEPS // 2}"
        )
        expect(page.get_by_role("region", name="Lines of the log")).to_have_text("from 0")

        # What the run writes from now on comes by itself.
        folder = service.folder / "runs" / made["id"]
        (folder / "samples").mkdir()
        shutil.copy(PICTURE, folder / "samples" / "matching-000004.png")
        (folder / "importance.json").write_text(json.dumps({"drop": [1.0, 0.1, 0.2], "pruned": [1]}))
        expect(button(page, "matching-000004.png")).to_be_visible(timeout=RUN_MS)
        until(lambda: page.locator(".samples img").evaluate("image => image.naturalWidth") > 0, "the picture")
        expect(page.locator(".plot rect")).to_have_count(3)
        assert_accessible(page)

        (folder / "go").touch()
        expect(page.locator(".doing", has_text="Passed the gate")).to_be_visible(timeout=RUN_MS)
        expect(loss.locator(".legend")).to_have_text(f"matching{1 / STEPS} at step {STEPS}")
        expect(button(page, "Report")).to_be_visible()
    finally:
        stop(trainer)

    button(page, "Promote").click()
    expect(page.get_by_label("To confirm, type")).to_be_hidden()
    page.get_by_label("Reason, for the history").fill("sharper")
    button(page.get_by_role("dialog"), "Promote").click()
    verdict = region(page, "The gate's verdict")
    expect(verdict).to_contain_text("is the active student")
    expect(button(page, "Promote")).to_be_hidden()
    sha256 = get(service, f"distillations/{made['id']}")["student_sha256"]
    assert get(service, "release")["active"] == sha256

    page.get_by_role("link", name="All distillations").click()
    now_served = region(page, "Served now")
    expect(now_served).to_contain_text(f"stand-in@{sha256[:12]}")
    button(now_served, "Roll back").click()
    page.get_by_label("Reason, for the history").fill("it flickers")
    page.keyboard.press("Enter")
    expect(now_served).to_contain_text(model_of(first))
    expect(now_served).to_contain_text("There is nothing to roll back to")
    newest = region(page, "History").get_by_role("listitem").first
    expect(newest).to_contain_text(f"3 rolled back to {model_of(first)}")
    expect(newest).to_contain_text("by local")
    expect(newest).to_contain_text("it flickers")
    history = get(service, "release")["history"]
    assert [(one["action"], one["reason"]) for one in history[:2]] == [
        ("rollback", "it flickers"),
        ("promote", "sharper"),
    ]


def region_of_plot(page: Page, title: str) -> Locator:
    return page.locator(".plot", has=page.get_by_role("heading", name=title))


def test_plots_are_drawn_from_what_was_measured(visit: Callable[..., Page], written: Written) -> None:
    run = written.run(GOOD)
    page = visit(f"/#admin/{run.id}")
    loss = region_of_plot(page, "Loss")
    expect(loss.locator("path")).to_have_count(2)
    legend = loss.locator(".legend li")
    expect(legend).to_have_text(["pruning0.005 at step 80", "matching0.0667 at step 450"])
    picture = loss.get_by_role("img")
    box = picture.bounding_box() or {}
    picture.hover(position={"x": 52 + (box["width"] - 64) / 2, "y": 100})
    expect(legend).to_have_text(["pruning0.01 at step 40", "matching0.133 at step 225"])

    on_log = loss.get_by_role("switch", name="Log scale")
    expect(on_log).to_be_checked()  # the largest is a hundred times the smallest
    log_path = loss.locator("path").first.get_attribute("d")
    on_log.uncheck(force=True)
    assert loss.locator("path").first.get_attribute("d") != log_path
    loss.get_by_text("The same as a table").click()
    rows = loss.get_by_role("row")
    expect(rows.first.get_by_role("columnheader")).to_have_text(["Line", "Step", "Value"])
    expect(rows.last.get_by_role("cell")).to_have_text(["matching", "450", "0.0667"])
    assert 40 < rows.count() <= 81  # some of them

    gaps = region_of_plot(page, "The critic's error")
    expect(gaps.locator(".legend li")).to_have_count(4)
    expect(gaps.locator(".legend")).to_contain_text("75 to 100 %0.00889 at step 450")
    blocks = region_of_plot(page, "Importance of the blocks")
    expect(blocks.get_by_role("img")).to_have_accessible_name(re.compile("pruned: 2 of 4"))
    expect(blocks.locator("rect")).to_have_count(4)
    expect(blocks.locator("rect.marked")).to_have_count(1)
    blocks.locator("rect.marked").hover()
    expect(blocks.locator(".legend .marked")).to_have_text("prunedblock 2: 0.08")


def test_pictures_open_large_and_reports_as_text(visit: Callable[..., Page], written: Written) -> None:
    run = written.run(BAD, REFUSAL)
    page = visit(f"/#admin/{run.id}")
    thumbnail = button(page, "matching-000450.png")
    thumbnail.click()
    large = page.get_by_role("dialog", name="matching-000450.png")
    expect(large.get_by_role("img")).to_be_visible()
    assert_accessible(page)
    page.keyboard.press("Escape")
    expect(large).to_be_hidden()
    expect(thumbnail).to_be_focused()
    button(page, "Report").click()
    expect(page.get_by_role("dialog", name="gate.md")).to_contain_text("- the videos stand still")
    button(page, "Close").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


# --- releases --------------------------------------------------------------------------------------------------------


def test_against_the_gates_verdict_its_name_has_to_be_typed(
    visit: Callable[..., Page], service: Stack, written: Written
) -> None:
    written.first_release()
    run = written.run(BAD, REFUSAL)
    page = visit(f"/#admin/{run.id}")
    verdict = region(page, "The gate's verdict")
    expect(verdict).to_contain_text(REFUSAL)
    expect(verdict).to_contain_text(f"Held against {model_of(FIRST)}")
    button(verdict, "Promote against the gate's verdict").click()
    dialog = page.get_by_role("dialog", name=f"Promote {model_of(BAD)}")
    expect(dialog).to_contain_text(f"The gate refuses it: {REFUSAL}")
    promote = button(dialog, "Promote against the gate's verdict")
    dialog.get_by_label("Reason, for the history").fill("to see it on the screen")
    for typed in ("", "shapes"):
        dialog.get_by_label("To confirm, type").fill(typed)
        promote.click()
        expect(dialog).to_be_visible()
    assert_accessible(page)
    assert get(service, "release")["active"] == FIRST
    dialog.get_by_label("To confirm, type").fill("shapes-4step")
    promote.click()
    expect(verdict).to_contain_text("is the active student")

    # What the worker does about it comes by itself.
    written.worker(FIRST, Staging(wanted=BAD, state="staging"))
    expect(verdict).to_contain_text(f"It serves {model_of(FIRST)}, and is getting the active student ready")
    written.worker(FIRST, Staging(wanted=BAD, state="failed", message="it differs from PyTorch by 3 dB"))
    expect(verdict).to_contain_text("it differs from PyTorch by 3 dB")
    written.worker(BAD, Staging(wanted=BAD, state="loaded", seconds=4.25, how="refit"))
    expect(verdict).to_contain_text(f"It serves {model_of(BAD)}, ready in 4.25 s: its engine got the other weights")

    page.get_by_role("link", name="Admin").click()
    newest = region(page, "History").get_by_role("listitem").first
    expect(newest).to_contain_text(f"2 promoted {model_of(BAD)} against the gate")
    expect(newest).to_contain_text("to see it on the screen")
    students = region(page, "Students").get_by_role("listitem")
    expect(students.filter(has_text=model_of(BAD))).to_contain_text("active gate refused")
    expect(students.filter(has_text=model_of(FIRST))).to_contain_text("previous not judged")


def test_a_verdict_that_no_longer_holds_is_told_when_the_server_says_so(
    visit: Callable[..., Page], service: Stack, written: Written
) -> None:
    written.first_release()
    written.run(GOOD)
    page = visit()
    students = region(page, "Students")
    button(students, f"Promote {model_of(GOOD)}").click()
    written.student(BAD)
    written.releases.promote(BAD, by="local", force=True)  # meanwhile
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reason, for the history").fill("as good")
    button(dialog, "Promote").click()
    expect(dialog.get_by_role("alert")).to_contain_text(f"against {FIRST[:12]}, and {BAD[:12]} is active now")
    expect(button(dialog, "Promote against the gate's verdict")).to_be_visible()
    expect(dialog.get_by_label("To confirm, type")).to_be_visible()
    assert_accessible(page)
    button(dialog, "Cancel").click()
    expect(region(page, "Served now")).to_contain_text(model_of(BAD))  # the page has kept up
    assert get(service, "release")["number"] == 2


def test_the_playground_tells_students_of_one_name_apart(visit: Callable[..., Page], written: Written) -> None:
    written.first_release()
    written.student(GOOD)
    written.releases.promote(GOOD, by="local", force=True)
    written.worker(GOOD, Staging(wanted=GOOD, state="loaded"), FIRST)
    page = visit("/")
    expect(page.get_by_label("Model", exact=True)).to_have_value("shapes-4step")  # whichever is active
    page.get_by_role("switch", name="Compare two").check(force=True)
    expect(page.get_by_label("Model to compare with")).to_have_value(model_of(FIRST))
    expect(page.locator("#crop")).to_contain_text("red-circle.png, 64")
    page.get_by_role("button", name="Generate").click()
    labels = page.locator(".pane .label")
    expect(labels).to_have_text(["shapes-4step student, 4 steps", f"{model_of(FIRST)} student, 4 steps"])
    expect(page).to_have_url(re.compile(r"#vid_\w+\+vid_\w+$"))
    made = [written.record(job_id) for job_id in page.url.partition("#")[2].split("+")]
    assert [(record.follows, record.pin) for record in made] == [(True, None), (False, FIRST)]


# --- for whom, and how -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_is_accessible_and_fits(
    visit: Callable[..., Page], written: Written, viewport: dict[str, int], scheme: str
) -> None:
    written.first_release()
    good, bad = written.run(GOOD), written.run(BAD, REFUSAL)
    page = visit(viewport=viewport, color_scheme=scheme)
    for address, sign in [
        ("#admin", page.get_by_text("the first")),
        (f"#admin/{good.id}", button(page, "Promote")),
        (f"#admin/{bad.id}", button(page, "matching-000450.png")),
        ("#admin/new", button(page, "Start")),
    ]:
        page.evaluate("address => { location.hash = address }", address)
        expect(sign).to_be_visible()
        for summary in page.locator("summary:visible").all():
            summary.click()
        assert_fits(page)
        assert_accessible(page)
    page.go_back()
    button(page, "Promote against the gate's verdict").click()
    assert_fits(page)
    assert_accessible(page)


def test_with_the_keyboard_alone(visit: Callable[..., Page], written: Written) -> None:
    run = written.run(GOOD)
    page = visit("/")
    expect(page.get_by_role("link", name="Admin")).to_be_visible()
    tab_to(page, page.get_by_role("link", name="Admin"))
    page.keyboard.press("Enter")
    entry = region(page, "Distillations").get_by_role("link", name="shapes, quick")
    tab_to(page, entry)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="shapes, quick succeeded")).to_be_focused()
    assert page.url.endswith(f"#admin/{run.id}")
    promote = button(page, "Promote")
    tab_to(page, promote)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Reason, for the history")).to_be_focused()
    page.keyboard.press("Escape")
    expect(promote).to_be_focused()
    page.go_back()
    page.go_back()
    expect(button(page, "Generate")).to_be_visible()


def tab_to(page: Page, wanted: Locator) -> None:
    expect(wanted).to_be_visible()
    for _ in range(20):
        page.keyboard.press("Tab")
        if wanted.evaluate("node => node === document.activeElement"):
            return
    raise AssertionError(f"{wanted} is not reached")


def test_it_is_for_keys_with_the_scope_admin(
    visit: Callable[..., Page], service: Stack, redis: Redis, written: Written
) -> None:
    run = written.run(BAD, REFUSAL)
    keys = {scope: auth.new_key() for scope in ("read", "admin")}
    for scope, text in keys.items():
        auth.Keys(redis).add(text, scope, ("read",) if scope == "read" else ("read", "admin"))
    with service.second_service(AUTH="on") as url:
        page = visit(f"/#admin/{run.id}", url=url, locked=True)
        unlock(page, keys["read"])
        expect(page.get_by_role("heading", name="This part is for administrators")).to_be_visible()
        expect(page.get_by_text("this needs a key with the scope 'admin'; yours has read")).to_be_visible()
        expect(page.get_by_role("link", name="Admin")).to_be_hidden()
        assert_accessible(page)
        button(page, "Forget").click()
        page.goto(f"{url}/#admin/{run.id}")
        unlock(page, keys["admin"])
        expect(page.get_by_role("heading", name="shapes, quick succeeded")).to_be_visible()
        # No link could bring the key along.
        until(lambda: page.locator(".samples img").first.evaluate("image => image.naturalWidth") > 0, "the picture", 10)
        auth.Keys(redis).revoke(keys["admin"].split("_")[1])
        expect(page.get_by_label("API key")).to_be_visible()
        expect(page.get_by_role("heading", name="shapes, quick succeeded")).to_be_hidden()


def unlock(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    button(page, "Use this key").click()
