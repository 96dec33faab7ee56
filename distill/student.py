"""The student folder: a plain diffusers pipeline folder, and beside it one JSON card (docs/design.md).

`student.json` (or `teacher.json` for a teacher) says what the folder is, how to call it, what prompts it understands
and the sha256 of every file it depends on. Reading checks all of it: a wrong hash, a missing file or a transformer
whose `num_layers` does not fit its weights is an error that says which.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from distill.prompt import Prompt

CARD_NAMES = ("student.json", "teacher.json")
OWN = ("transformer", "transformer_2", "scheduler", "guider")
"""Components that a student has of its own. All others it takes from its teacher unchanged: links, not copies."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = {
    "WanTransformer3DModel": {"num_layers": "blocks"},
    "HunyuanVideoTransformer3DModel": {
        "num_layers": "transformer_blocks",
        "num_single_layers": "single_transformer_blocks",
    },
    "HunyuanVideo15Transformer3DModel": {"num_layers": "transformer_blocks"},
}
"""Of each class of transformer, what in its configuration says how many blocks there are of which list."""


class FolderError(ValueError):
    """A model folder that cannot be used; the message says which file and why."""


class Video(BaseModel):
    """What one call makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    height: int
    num_frames: int
    fps: int


class Origin(BaseModel):
    """The folder that another one was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str


class Blocks(BaseModel):
    """Which blocks of the teacher a student has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    block_ratio: float
    """Block parameters left over the teacher's block parameters."""
    ratio: float
    """Transformer parameters left over the teacher's."""


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
    """How it was made, an entry for each stage. Those of a student's also hold what the stage was given
    (``parent_sha256``) and what it left (``sha256``), by the file's name within the run (`distill.lineage`)."""
    metrics: dict[str, float]
    files: dict[str, str]
    """sha256 of every other file, by path within the folder."""
    teacher: Origin | None = None
    blocks: Blocks | None = None
    guidance: dict[str, Any] | None = None
    """Of the real score that it was trained with."""
    code: dict[str, str] | None = None
    """Version and commit of what made it."""
    parent_sha256: dict[str, str] | None = None
    """Of what a student was written from, by the file's name within its run."""

    @property
    def sha256(self) -> str:
        """Identity of the whole folder: the files' hashes and everything said here."""
        return hashlib.sha256(self.model_dump_json(exclude_none=True).encode()).hexdigest()


def weights_sha256(files: Mapping[str, str], part: str) -> str:
    """Of the weights and configuration of one part (`transformer`) of a card's files, 32 digits: what engines are built
    from."""
    own = {name: sha256 for name, sha256 in files.items() if name.startswith(f"{part}/")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:32]


def now() -> str:
    """This moment as the card writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_card(folder: Path, card: Card) -> Card:
    """Hash the files of ``folder`` into ``card`` and write it, aside first. Returns the card as written."""
    card = card.model_copy(update={"files": {str(p.relative_to(folder)): file_sha256(p) for p in _files(folder)}})
    path = folder / f"{card.kind}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(card.model_dump(mode="json", exclude_none=True), indent=2) + "\n")
    os.replace(aside, path)
    return card


def read_card(folder: Path) -> Card:
    """Read and check a model folder.

    Raises:
        FolderError: what is missing, changed or does not fit, and in which file.
    """
    path = card_path(folder)
    card = parse_card(path)
    for name, got in altered(folder, card):
        if got is None:
            raise FolderError(f"{folder / name} is missing, and {path.name} lists it; copy the whole folder again")
        raise FolderError(
            f"{folder / name} has sha256 {got[:12]}..., and {path.name} says {card.files[name][:12]}...: "
            "it was changed after the folder was written; copy the whole folder again"
        )
    check_layers(folder)
    return card


def card_path(folder: Path) -> Path:
    """The card of a model folder. Raises ``FolderError`` where there is none."""
    path = next((folder / name for name in CARD_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise FolderError(f"{folder} is no model folder: it has neither {' nor '.join(CARD_NAMES)}")
    return path


def parse_card(path: Path) -> Card:
    """What a card says; its folder is not looked at. Raises ``FolderError`` that names the field that is wrong."""
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FolderError(f"{path}: field {where}: {first['msg']}") from None


def altered(folder: Path, card: Card) -> Iterator[tuple[str, str | None]]:
    """Each file that is not as ``card`` lists it, with its sha256; None where it is missing."""
    for name, wanted in card.files.items():
        got = file_sha256(folder / name) if (folder / name).is_file() else None
        if got != wanted:
            yield name, got


def unlisted(folder: Path, card: Card) -> list[str]:
    """Files that a pipeline may read and that ``card`` knows nothing of."""
    return [name for path in _files(folder) if (name := str(path.relative_to(folder))) not in card.files]


def components(folder: Path) -> dict[str, str]:
    """Parts of a pipeline folder with the class of each, by `model_index.json`; what it has none of is left out.

    Raises:
        FolderError: there is no such file, or it cannot be read.
    """
    path = folder / "model_index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        parts = {name: value[1] for name, value in index.items() if isinstance(value, list)}
    except (OSError, ValueError, IndexError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read ({error}); a diffusers pipeline folder has one") from None
    return {name: kind for name, kind in parts.items() if kind is not None}


def shapes_of(component: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a diffusers model, by name, from the files' headers.

    Raises:
        FolderError: a file is missing or no safetensors.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(component):
        try:
            with safe_open(file, framework="numpy") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise FolderError(f"{file} cannot be read: {error}") from None
    return found


def weight_files(component: Path) -> list[Path]:
    """The files that a diffusers model's weights are in, whether they are there or not."""
    index = component / f"{WEIGHTS}.index.json"
    if not index.exists():
        return [component / WEIGHTS]
    return [component / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def check_layers(folder: Path) -> None:
    """diffusers fills blocks that have no weights with random ones and only warns: refuse that here.

    Raises:
        FolderError: a configuration and the weights beside it do not fit, or the class is not known.
    """
    for component in OWN:
        path = folder / component / "config.json"
        if not path.exists():
            continue
        config = json.loads(path.read_text())
        lists = LAYERS.get(config.get("_class_name"))
        if lists is None:
            raise FolderError(f"{path} is of class {config.get('_class_name')}; known are {', '.join(LAYERS)}")
        names = shapes_of(path.parent)
        for setting, blocks in lists.items():
            found = {int(name.split(".")[1]) for name in names if name.startswith(f"{blocks}.")}
            if found != set(range(config[setting])):
                raise FolderError(
                    f"{path} says {setting} {config[setting]}, and the weights beside it hold {blocks} "
                    f"{sorted(found)}: the configuration is not the one that these weights were saved with"
                )


def load_pipeline(folder: Path, device: Any, parts: Mapping[str, Any] | None = None) -> Any:
    """The stock pipeline of a folder that was checked, frozen and in full precision.

    Args:
        parts: components that are taken as they are, without memory for their weights, and not read.
    """
    import torch
    from diffusers import DiffusionPipeline

    if parts:
        pipe = _pipeline_of(folder, parts)
    else:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            if not parts or name not in parts:
                part.to(device)
    return pipe


def _pipeline_of(folder: Path, parts: Mapping[str, Any]) -> Any:
    # `from_pretrained` reads components that are optional, as Wan's transformers are, even where it is given them.
    import diffusers
    import torch

    config = json.loads((folder / "model_index.json").read_text())
    made = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in made.items():
        if name in parts:
            made[name] = parts[name]
        elif isinstance(value, list):
            library, kind = value
            made[name] = None
            if kind is not None:
                of = getattr(import_module(library), kind)
                more = {"dtype": torch.float32} if issubclass(of, torch.nn.Module) else {}
                made[name] = of.from_pretrained(folder / name, local_files_only=True, **more)
    return getattr(diffusers, config["_class_name"])(**made)


def write_student(out: Path, teacher: Path, card: Card, save_parts: Callable[[Path], None]) -> Card:
    """Make a student's folder aside and rename it: its own parts, links to its teacher's, the card.

    Args:
        out: must not exist, or is replaced.
        teacher: the folder whose parts, but for ``OWN``, are linked, relatively, so both can move together.
        save_parts: writes `transformer/`, `scheduler/` and `model_index.json` into the folder it is given.
    """
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_parts(aside)
    for part in components(teacher).keys() - set(OWN):
        # What the teacher itself took from another is linked there.
        (aside / part).symlink_to(os.path.relpath((teacher / part).resolve(), out.resolve()))
    # A link is read from where the folder will stand; beside it stands the one that is written.
    card = write_card(aside, card)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)
    return card


def publish(folder: Path, out: Path, teacher: Path) -> Card:
    """Copy a student to where it is served from, linked to ``teacher``, which must be the one that it was made from.

    Raises:
        FolderError: a folder is broken, or this is not the student's teacher.
    """
    card, of = read_card(folder), read_card(teacher)
    if card.teacher is None or card.teacher.sha256 != of.sha256:
        made_from = f"{card.teacher.name} {card.teacher.sha256[:12]}" if card.teacher else "no teacher"
        raise FolderError(
            f"{folder} was made from {made_from}, and {teacher} is {of.name} {of.sha256[:12]}: name its own teacher"
        )

    def save_parts(aside: Path) -> None:
        for part in components(folder).keys() & set(OWN):
            shutil.copytree(folder / part, aside / part)
        shutil.copy(folder / "model_index.json", aside / "model_index.json")
        if (out / "README.md").exists():  # its model card, which only a person writes
            shutil.copy(out / "README.md", aside / "README.md")

    return write_student(out, teacher, card.model_copy(update={"name": out.name}), save_parts)


def code_version() -> dict[str, str]:
    """What made a folder: the package's version, and the commit where it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603, S607
    except (OSError, subprocess.CalledProcessError):  # an image has neither git nor a checkout
        return {"version": version("fastlightgen")}
    return {"version": version("fastlightgen"), "git": said.stdout.strip()}


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    """Every file the pipeline may read: all but the card itself, notes and what is half-written."""
    skipped = {*CARD_NAMES, "README.md"}
    # `rglob` would not enter a student's links to its teacher's parts.
    found = [Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names]
    # What begins with a dot is a tool's, as a downloader's cache.
    seen = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return sorted(p for p in seen if p.name not in skipped and p.suffix != ".tmp")
