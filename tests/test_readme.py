"""The README's first screen is run: its make targets exist, its curl gives a video."""

import json
import re
import shutil
import subprocess

import httpx
import pytest

from distill.data.shapes import GRAMMAR
from tests.stack import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = README.split("```")[1].strip().splitlines()


def test_the_first_screen_has_the_three_commands():
    assert [command.split("#")[0].split()[0] for command in COMMANDS] == ["make", "make", "curl"]
    for target in ["up", "test", *re.findall(r"`(?:PORT=\d+ )?make ([a-z-]+)`", README)]:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="needs the program curl")
def test_the_curl_answers_with_a_video(stack):
    command = COMMANDS[2].replace("curl", "curl --silent --show-error --fail-with-body", 1)
    command = command.replace("http://127.0.0.1:8000", stack.url)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "succeeded"
    video = httpx.get(record["video_url"])
    assert video.headers["content-type"] == "video/mp4"
    assert len(video.content) > 2000


def test_its_example_sentences_are_understood():
    sentences = re.findall(r"^    (a \w+ \w+ (?:moves|spins|grows).*)$", README, re.MULTILINE)
    assert len(sentences) >= 2
    for sentence in sentences:
        assert GRAMMAR.canonical(sentence) == sentence


def test_its_files_exist():
    for path in re.findall(r"`((?:docs|benchmarks|models)/[\w./-]*|[A-Z]+\.md)`", README):
        assert (ROOT / path).exists(), path
