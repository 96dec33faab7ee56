"""`/docs` and the document behind it: each route is explained, with examples that are what they say they are."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator, FormatChecker
from playwright.sync_api import expect, sync_playwright
from starlette.routing import BaseRoute

from service.app import create_app
from service.deps import Requires
from service.settings import Settings

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
APP = create_app(Settings())
DOCUMENT: dict[str, Any] = APP.openapi()
WITHOUT_BODY = {"DELETE /generate/{job_id}", "POST /admin/webhooks/{job_id}/replay"}
TAGS = {"generate", "openai", "videos", "health", "playground", "admin"}

Operation = dict[str, Any]


def operations() -> Iterator[tuple[str, Operation]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


OPERATIONS = dict(operations())


def routes_of(routes: list[BaseRoute]) -> Iterator[APIRoute]:
    for route in routes:
        if (router := getattr(route, "original_router", None)) is not None:
            yield from routes_of(router.routes)
        elif isinstance(route, APIRoute) and route.include_in_schema:
            yield route


SCOPES = {
    f"{method} {route.path}": one.call.scope
    for route in routes_of(APP.routes)
    for method in route.methods
    for one in route.dependant.dependencies
    if isinstance(one.call, Requires)
}


def examples_in(media: dict[str, Any]) -> list[Any]:
    """Of a body, or of its fields where a form is shown field by field."""
    found = [one["value"] for one in media.get("examples", {}).values()]
    return [*found, media["example"]] if "example" in media else found


def with_schemas(where: object, place: str = "") -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """Everything in the document that has a schema and examples: place, schema, examples."""
    if isinstance(where, list):
        for index, one in enumerate(where):
            yield from with_schemas(one, f"{place}/{index}")
    elif isinstance(where, dict):
        if "schema" in where and (found := examples_in(where)):
            yield place, where["schema"], found
        if isinstance(where.get("examples"), list):  # those of a schema itself
            yield place, where, where["examples"]
        for name, one in where.items():
            if name not in ("examples", "example"):
                yield from with_schemas(one, f"{place}/{name}")


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_says_what_it_does(name):
    operation = OPERATIONS[name]
    assert set(operation["tags"]) < TAGS
    assert 2 <= len(operation["summary"].split()) <= 8
    assert operation["description"]
    assert operation["description"].splitlines()[0] not in operation["summary"]


def test_no_two_routes_say_the_same_of_themselves():
    summaries = [operation["summary"] for operation in OPERATIONS.values()]
    assert len(set(summaries)) == len(summaries)
    assert len(OPERATIONS) > 30


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_shows_what_to_send_and_what_comes_back(name):
    operation = OPERATIONS[name]
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        if kind == "multipart/form-data":  # which pages show field by field
            assert media["schema"]["properties"]["prompt"]["examples"]
        elif "$ref" in media["schema"]:
            fields = DOCUMENT["components"]["schemas"][media["schema"]["$ref"].rpartition("/")[2]]
            assert examples_in(media) or fields["examples"]
        else:
            assert examples_in(media)
    for status, answer in operation["responses"].items():
        for kind, media in answer.get("content", {}).items():
            if kind.startswith(("video/", "image/")):
                assert media["schema"] == {"type": "string", "format": "binary"}
            else:
                assert examples_in(media), (status, kind)
    done = [operation["responses"].get(status, {}) for status in ("200", "202")]
    assert any("content" in answer for answer in done) or name in WITHOUT_BODY


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_says_whom_it_refuses(name):
    operation, scope = OPERATIONS[name], SCOPES.get(name)
    answers = operation["responses"]
    assert ("security" in operation) == bool(scope)
    if scope:
        assert {"401", "403", "503"} <= answers.keys()
        assert f"`{scope}`" in answers["403"]["description"]
    for status, answer in answers.items():
        if int(status) >= 400 and (name, status) != ("GET /readyz", "503") and status != "416":
            media = answer["content"]["application/json"]
            assert media["schema"] == {"$ref": "#/components/schemas/ErrorEnvelope"}, (name, status)
    if {"429", "507"} & answers.keys():
        assert "Retry-After" in answers["429"]["headers"]
    if operation.get("parameters") or operation.get("requestBody"):
        assert "422" in answers
    if operation.get("requestBody"):
        assert "413" in answers


def test_every_example_fits_its_schema():
    num_checked = 0
    for place, schema, examples in with_schemas(DOCUMENT):
        validator = Draft202012Validator(
            {**schema, "components": DOCUMENT["components"]}, format_checker=FormatChecker()
        )
        for example in examples:
            assert [error.message for error in validator.iter_errors(example)] == [], place
            num_checked += 1
    assert num_checked > 200


@pytest.mark.parametrize(("path", "status"), [("/generate", 202), ("/v1/videos", 200), ("/admin/distillations", 202)])
def test_what_is_shown_to_be_sent_is_taken(client, path, status):
    media = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = media["schema"].get("$ref", "").rpartition("/")[2]
    for example in examples_in(media) or DOCUMENT["components"]["schemas"][name]["examples"]:
        answer = client.post(path, json=example)
        assert answer.status_code == status, answer.text
        this = f"{path}/{answer.json()['id']}"
        undone = client.post(f"{this}/cancel") if "distillations" in path else client.delete(this)
        assert undone.is_success


@pytest.mark.browser
def test_the_page_opens_whole_and_sends_its_example(stack):
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("needs a browser: install the package `chromium`")
    complaints: list[str] = []
    elsewhere: list[str] = []

    def is_here(url: str) -> bool:
        return url.startswith((f"{stack.url}/", "data:image/"))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: elsewhere.append(request.url) if not is_here(request.url) else None)
        page.goto(f"{stack.url}/docs")
        create = page.locator("#operations-generate-create_generate_post")
        expect(create).to_be_visible(timeout=30_000)
        assert page.locator(".opblock").count() == len(OPERATIONS)
        create.locator(".opblock-summary").click()
        with page.expect_response(lambda response: response.url == f"{stack.url}/generate") as answer:
            create.get_by_role("button", name="Execute").click()
        assert answer.value.status == 202, answer.value.text()
        expect(create.locator(".live-responses-table").get_by_text("vid_").first).to_be_visible()
        create.get_by_label("Request content type").select_option("multipart/form-data")
        expect(create.locator("input[type=file]")).to_have_count(2)  # image and video
        browser.close()
    assert (complaints, elsewhere) == ([], [])
