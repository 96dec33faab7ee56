"""The student folder: a plain diffusers pipeline folder, and beside it one JSON card (design.md section 3).

`student.json` (or `teacher.json` for a teacher) says what the folder is, how to call it, what prompts it understands
and the sha256 of every file it depends on. Reading checks all of it: a wrong hash, a missing file or a transformer
whose `num_layers` does not fit its weights is an error that says which.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open

from distill.prompt import Prompt

CARD_NAMES = ("student.json", "teacher.json")


class FolderError(ValueError):
    """A model folder that cannot be used; the message says which file and why."""


class Video(BaseModel):
    """What one call makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    height: int
    num_frames: int
    fps: int


class Card(BaseModel):
    """What `student.json` and `teacher.json` hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Literal["teacher", "student"]
    name: str
    created_at: str
    backbone: str
    task: Literal["ti2v", "t2v", "v2v"]
    parameters: dict[str, int]
    """Number of parameters of each network."""
    call: dict[str, Any]
    """Keyword arguments of the stock pipeline, beside image, prompt and generator."""
    sigmas: tuple[float, ...]
    """Noise levels that ``call`` visits, the final 0 left out."""
    prompt: Prompt
    video: Video
    stages: tuple[dict[str, Any], ...]
    """How it was made, one entry for each optimisation."""
    metrics: dict[str, float]
    files: dict[str, str]
    """sha256 of every other file, by path within the folder."""

    @property
    def sha256(self) -> str:
        """Identity of the whole folder: the files' hashes and everything said here."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def now() -> str:
    """This moment as the card writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_card(folder: Path, card: Card) -> Card:
    """Hash the files of ``folder`` into ``card`` and write it, aside first. Returns the card as written."""
    card = card.model_copy(update={"files": {str(p.relative_to(folder)): file_sha256(p) for p in _files(folder)}})
    path = folder / f"{card.kind}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
    os.replace(aside, path)
    return card


def read_card(folder: Path) -> Card:
    """Read and check a model folder.

    Raises:
        FolderError: what is missing, changed or does not fit, and in which file.
    """
    path = next((folder / name for name in CARD_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise FolderError(f"{folder} is no model folder: it has neither {' nor '.join(CARD_NAMES)}")
    try:
        card = Card.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FolderError(f"{path}: field {where}: {first['msg']}") from None
    for name, wanted in card.files.items():
        if not (folder / name).is_file():
            raise FolderError(f"{folder / name} is missing, and {path.name} lists it; copy the whole folder again")
        got = file_sha256(folder / name)
        if got != wanted:
            raise FolderError(
                f"{folder / name} has sha256 {got[:12]}..., and {path.name} says {wanted[:12]}...: "
                "it was changed after the folder was written; copy the whole folder again"
            )
    _check_num_layers(folder)
    return card


def _check_num_layers(folder: Path) -> None:
    """diffusers fills blocks that have no weights with random ones and only warns: refuse that here."""
    configured = json.loads((folder / "transformer" / "config.json").read_text())["num_layers"]
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="numpy") as tensors:
        found = {int(name.split(".")[1]) for name in tensors.keys() if name.startswith("blocks.")}
    if found != set(range(configured)):
        raise FolderError(
            f"{folder / 'transformer/config.json'} says num_layers {configured}, and {weights.name} holds blocks "
            f"{sorted(found)}: the configuration is not the one that these weights were saved with"
        )


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    """Every file the pipeline may read: all but the card itself, notes and what is half-written."""
    skipped = {*CARD_NAMES, "README.md"}
    # `rglob` would not enter a student's links to its teacher's parts.
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(p for p in found if p.name not in skipped and p.suffix != ".tmp")
