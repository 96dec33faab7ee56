"""A picture to animate, and the browser that the tests of the page share."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


expect.set_options(timeout=10_000)  # the machine may be busy


@pytest.fixture(scope="module")
def image(example_image) -> bytes:
    """A picture that the model can animate."""
    return example_image.read_bytes()


@pytest.fixture(scope="module")
def data_url(image) -> str:
    """The same as JSON can carry it."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; a test that needs it is left out where there is none."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("needs a browser: install the package `chromium`")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield chromium
        chromium.close()
