"""The Dockerfile: hadolint's rules and ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.image_check import STAND_INS, can_be_had
from deploy.pin_images import FILES, pinned
from tests.stack import ROOT


def stages() -> dict[str, dict[str, list[str]]]:
    """The Dockerfile: stage -> instruction -> its arguments, those of the stages it is built FROM included."""
    found: dict[str, dict[str, list[str]]] = {}
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = found[alias] = {key: list(values) for key, values in found.get(base, {}).items()}
        stage.setdefault(name, []).append(" ".join(rest.split()))
    return found


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("there is no hadolint for this machine among Python's packages")
    return subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True)


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN pip install rq\n")
    assert {"DL3007", "DL3013"} <= set(re.findall(r"DL\d+", lint(tmp_path / "Dockerfile").stdout))
    found = lint(ROOT / "Dockerfile")
    assert (found.returncode, found.stdout) == (0, "")


def test_each_image_has_what_its_program_needs_and_no_more() -> None:
    installs = {
        name: [line for line in stage.get("RUN", []) if " pip install " in line] for name, stage in stages().items()
    }
    ends = {name: [line.split("constraints.txt ")[-1] for line in lines] for name, lines in installs.items() if lines}
    torch = "\"$(grep '^torch==' constraints.txt)\""
    assert ends == {
        "build-service": ["--editable '.[service,s3,otel]'"],  # no torch
        "build-board": ["'.[board]'"],
        "build-worker": [torch, '--editable ".[$EXTRAS]"'],
        "build-trainer": [torch, '--editable ".[$EXTRAS]"', "--editable '.[worker,distill]'"],
    }
    assert all("--constraint constraints.txt" in line for lines in installs.values() for line in lines)


def test_the_installer_stays_behind() -> None:
    """What runs is FROM a base that knows neither pip's cache nor the build context."""
    for name in ("service", "worker", "trainer", "board"):
        [venv] = [line for line in stages()[name]["COPY"] if line.endswith("/opt/venv /opt/venv")]
        assert venv == f"--from=build-{name} /opt/venv /opt/venv"
        assert not [line for line in stages()[name]["RUN"] if "pip" in line]


def test_whoever_runs_may_read_the_models_and_write_its_volumes() -> None:
    copied = [line for name in ("service", "worker", "trainer") for line in stages()[name]["COPY"] if " models" in line]
    assert copied == ["--chown=10001 models/examples models/examples", *["--chown=10001 models models"] * 2]
    made = {line.split()[-1] for stage in stages().values() for line in stage.get("RUN", []) if "--owner app" in line}
    assert made == {"/storage", "/engines", "/runs"}


def test_what_is_compiled_lies_in_a_volume() -> None:
    """Containers have a /tmp that no code may be loaded from."""
    for name, volume in {"worker": "/engines", "trainer": "/runs"}.items():
        words = dict(word.split("=", 1) for line in stages()[name]["ENV"] for word in line.split() if "=" in word)
        for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "STUDENTS"):
            assert words[cache].startswith(f"{volume}/")
        assert any(" g++ " in line for line in stages()[name]["RUN"])


def test_the_build_is_sent_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word.split("/")[0]
        for stage in stages().values()
        for line in stage.get("COPY", [])
        if "--from" not in line
        for word in [word for word in line.split() if not word.startswith("--")][:-1]
    }
    assert sent == copied


def test_digests_go_behind_the_tags_of_others_images_and_nowhere_else() -> None:
    asked: list[str] = []

    def digest_of(tag: str) -> str:
        asked.append(tag)
        return "sha256:" + f"{len(asked):064x}"

    for name in FILES:
        before = (ROOT / name).read_text()
        after = pinned(before, digest_of)
        assert re.sub(r"@sha256:0{40}[0-9a-f]{24}", "", after) == re.sub(r"@sha256:[0-9a-f]{64}", "", before)
        assert pinned(after, lambda _: "sha256:" + "f" * 64).count("@sha256:") == after.count("@sha256:")
    assert sorted({tag.split(":")[0] for tag in asked}) == [
        "grafana/grafana",
        "prom/prometheus",
        "python",
        "redis",
        "versity/versitygw",
    ]


def test_the_check_runs_all_but_what_it_says() -> None:
    """`make image-check`: every image has a base there, and every service but Grafana an image."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {name for name, service in services.items() if not can_be_had(service)} == {"grafana"}
    assert {
        base.split(":")[0] for base in re.findall(r"(?m)^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text())
    } <= set(STAND_INS)
