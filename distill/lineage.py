"""`python -m distill lineage STUDENT`: how a student came about, and whether that still holds (docs/lineage.md).

    teacher -> latents, importance, pruning, matching -> student -> gate -> engine -> storage -> release

A run writes into the student's card what every stage was given and what it left, by sha256 (`stages`, `parents`).
`trace` follows the card through the folders that are at hand, from the teacher to the release, and compares. What is
not at hand is said to be recorded and not checked. No torch: this is read where nothing is trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from distill import student
from distill.config import SHAPES, Config, ConfigError, DistillConfig, GateConfig
from distill.student import Card, FolderError, file_sha256

LEAVES = {
    "latents": ("latents-train.safetensors", "latents-dev.safetensors"),
    "importance": ("importance.json", "importance.png"),
    "pruning": ("pruning.safetensors",),
    "matching": ("matching.safetensors",),
}
"""What each stage leaves in the run's folder."""

GIVEN = {
    "latents": ("teacher",),
    "importance": ("teacher", "latents-dev.safetensors"),
    "pruning": ("teacher", "latents-train.safetensors", "latents-dev.safetensors", "importance.json"),
    "matching": (
        "teacher", "latents-train.safetensors", "latents-dev.safetensors", "importance.json", "pruning.safetensors",
    ),
}  # fmt: skip
"""What each stage is given: the teacher, and what earlier stages left."""

RUN_FILES = ("config.json", "stages.json")
"""A folder that holds them is a run's."""
DATA = "data.json"
"""Which prepared data set a run learns from, in place of latents of its own."""
MATCHED = "matching.safetensors"
EXPERTS = {"transformer": "high.", "transformer_2": "low."}
"""What the weights of two experts are called in what a stage leaves (`distill.backbones.experts`)."""


# --- what a run writes down -----------------------------------------------------------------------------------------


def inputs(config: DistillConfig, teacher_sha256: str) -> dict[str, str]:
    """A hash of all values that each stage's result depends on; `stages.json` of a run."""
    shared: list[Any] = [teacher_sha256, config.seed, config.num_clips, config.precision]
    if config.data != SHAPES:
        shared.insert(0, config.data)
    apart = [] if config.experts == "both" else [config.experts]
    stage_one = [*shared, config.shift, config.importance.sha256, config.pruning.unimportant]
    stage_two = [*stage_one, config.text_drop, config.pruning.sha256]
    stage_three = [*stage_two, config.student.sha256, config.matching.sha256, config.watched, *apart]
    read = {"latents": shared[:-1], "importance": stage_one, "pruning": stage_two, "matching": stage_three}
    return {name: hashlib.sha256(json.dumps(values).encode()).hexdigest() for name, values in read.items()}


def stages(run: Path, config: DistillConfig, teacher_sha256: str) -> list[dict[str, Any]]:
    """The card's entries for the stages of a run that has done them all, but for how long they took."""
    known = {"teacher": teacher_sha256}
    entries = []
    for name, hashed in inputs(config, teacher_sha256).items():
        prepared = config.data != SHAPES
        left = {file: file_sha256(run / file) for file in _leaves(name, prepared)}
        part = {"config_sha256": getattr(config, name).sha256} if name != "latents" else {}
        given = {file: known[file] for file in _given(name, prepared)}
        entries.append(
            {"name": name, **part, "inputs_sha256": hashed, "seed": config.seed, "parent_sha256": given, "sha256": left}
        )
        known |= left
    return entries


def parents(run: Path) -> dict[str, str]:
    """sha256 of what the student's folder is written from."""
    return {file: file_sha256(run / file) for file in (*RUN_FILES, MATCHED)}


def _leaves(name: str, prepared: bool) -> tuple[str, ...]:
    return (DATA,) if prepared and name == "latents" else LEAVES[name]


def _given(name: str, prepared: bool) -> tuple[str, ...]:
    """What a stage is given; latents that were prepared before the run stand as one file that says which."""
    if not prepared:
        return GIVEN[name]
    return tuple(dict.fromkeys(DATA if file in LEAVES["latents"] else file for file in GIVEN[name]))


def iterations(events: list[dict[str, Any]]) -> dict[str, int]:
    """Steps of each stage by a run's events; none of the latents, which are only encoded."""
    return {event["stage"]: event["step"] for event in events if event["stage"] != "latents"}


# --- what is found --------------------------------------------------------------------------------------------------


@dataclass
class Link:
    """One link of the chain."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    """What is recorded of it."""
    checked: list[str] = field(default_factory=list)
    """What was compared and is as recorded."""
    unchecked: list[str] = field(default_factory=list)
    """What is recorded at most, and why it was not compared."""
    broken: list[str] = field(default_factory=list)
    """A line for each thing that is not as recorded."""

    @property
    def state(self) -> Literal["ok", "recorded, not checked", "broken"]:
        """ok where something was compared, and all of it holds."""
        return "broken" if self.broken else "ok" if self.checked else "recorded, not checked"

    def same(self, what: str, got: object, recorded: object, by: str) -> None:
        """Compare two values; ``by`` is who recorded the second."""
        if got == recorded:
            self.checked.append(what)
        else:
            self.broken.append(f"{what} is {_told(got)}, and {by} recorded {_told(recorded)}")

    def file(self, path: Path, recorded: str, by: str) -> None:
        """Compare a file with its recorded sha256."""
        self.same(f"sha256 of {path}", file_sha256(path) if path.is_file() else None, recorded, by)


def _told(value: object) -> object:
    return "missing" if value is None else value


@dataclass(frozen=True)
class Lineage:
    """A student with all links of its chain."""

    card: Card
    folder: Path
    links: tuple[Link, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is other than recorded."""
        return not any(link.broken for link in self.links)


@dataclass(frozen=True)
class Places:
    """Where to look for what is not in the student's folder. None: where it usually is, or nowhere."""

    run: Path | None = None
    teacher: Path | None = None
    gate: Path | None = None
    """A verdict's file, or the folder that holds it."""
    engines: Path | None = None
    storage: Path | None = None
    releases: Path | None = None


def trace(folder: Path, places: Places) -> Lineage:
    """Follow a student's chain and compare every link that is at hand.

    Raises:
        FolderError: ``folder`` is no student's, or the teacher that ``places`` names is no model folder.
        ConfigError: another place that ``places`` names is not there.
    """
    card = student.parse_card(student.card_path(folder))
    if card.kind != "student":
        raise FolderError(f"{folder} is a {card.kind}; give the folder of a student")
    for path in (places.run, places.gate, places.storage, places.releases):
        if path is not None and not path.exists():
            raise ConfigError(f"{path} is not there; name what is, or leave the option out")
    beside = folder.resolve().parent
    begun = places.run or (beside if all((beside / name).is_file() for name in RUN_FILES) else None)
    run, run_link = _run(begun, card) if begun else (None, _absent("run", "no run folder", "--run RUN"))
    teacher_link, teacher = _teacher(folder, card, run, places.teacher)
    gate = places.gate or (begun / "gate" if begun else None)
    report, gate_link = _gate(card, gate / "gate.json" if gate and gate.is_dir() else gate)
    links = [
        teacher_link,
        run_link,
        *_stages(card, run),
        _student(folder, card, teacher, run),
        gate_link,
        _engines(card, places.engines),
        _storage(card, places.storage),
        _releases(card, places.releases, report),
    ]
    return Lineage(card, folder, tuple(links))


def _absent(name: str, what: str, option: str) -> Link:
    return Link(name, unchecked=[f"{what} at hand ({option})"])


T = TypeVar("T")


def _read(kind: type[T], path: Path, link: Link) -> T | None:
    """A JSON file as ``kind``; None, and a line in ``link``, where it is missing or something else."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        link.broken.append(f"{path} cannot be read: {error.strerror}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        link.broken.append(f"{path}: {where + ': ' if where else ''}{first['msg']}")
    return None


# --- from the teacher to the student --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Begun:
    """A run's folder and what could be read of it."""

    folder: Path
    config: DistillConfig | None
    inputs: dict[str, str] | None
    """As this version of the code computes them from ``config``; None where it reads it otherwise."""
    iterations: dict[str, int]


class _Stage(BaseModel):
    """An entry of a card's `stages`. What older cards do not have is None."""

    model_config = ConfigDict(extra="allow")

    name: str
    config_sha256: str | None = None
    inputs_sha256: str | None = None
    seed: int | None = None
    iterations: int | None = None
    parent_sha256: dict[str, str] | None = None
    sha256: dict[str, str] | None = None


class _Importance(BaseModel):
    pruned: tuple[int, ...]
    drop: list[float]
    block_ratio: float
    ratio: float


def _run(folder: Path, card: Card) -> tuple[_Begun, Link]:
    link = Link("run", {"folder": str(folder)})
    for name in RUN_FILES:
        if card.parent_sha256 is not None:
            link.file(folder / name, card.parent_sha256.get(name, ""), "student.json")
    path = folder / "config.json"
    config = _read(DistillConfig, path, link)
    computed = None
    if config:
        link.facts |= {"recipe": config.name, "preset": config.preset, "seed": config.seed, "sha256": _written(config)}
        recorded = _read(dict[str, str], folder / "stages.json", link)
        # But for the gate's limits, which no stage reads, and what runs before it was there did by default.
        apart = {"gate"} | {name for name in ("data", "experts", "looked_at") if name not in config.model_fields_set}
        if config.model_dump(exclude=apart, exclude_unset=True) != config.model_dump(exclude=apart):
            link.unchecked.append(f"{path} was written by another version: what stages read is not computed anew")
        elif card.teacher:
            computed = inputs(config, card.teacher.sha256)
            for name, wanted in (recorded or {}).items():
                what = f"hash of what {name} read, by {path} and the teacher,"
                link.same(what, computed.get(name), wanted, f"{folder / 'stages.json'}")
    events = _events(folder / "events.jsonl", link)
    made = [event.get("sha256") for event in events if event.get("stage") == "student"]
    if not made:
        link.unchecked.append(f"{folder / 'events.jsonl'} tells of no student: the identity is only the card's own")
    else:
        known = {card.sha256, _renamed(card, config.name).sha256 if config else ""}
        what = f"identity of the student that {folder / 'events.jsonl'} tells of"
        link.same(what, card.sha256 if made[-1] in known else made[-1], card.sha256, "this student's card")
    return _Begun(folder, config, computed, iterations(events)), link


def _events(path: Path, link: Link) -> list[dict[str, Any]]:
    """Every complete line of a run's `events.jsonl`."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("}")]
    except ValueError:
        link.broken.append(f"{path} holds lines that are no JSON")
        return []


def _written(config: Config) -> str:
    """A configuration's hash as the version that wrote it took it: without fields that it did not have."""
    return hashlib.sha256(config.model_dump_json(exclude_unset=True).encode()).hexdigest()


def _renamed(card: Card, name: str) -> Card:
    """`python -m distill publish` gives a student its folder's name, and so another identity."""
    return card.model_copy(update={"name": name})


def _is(card: Card, name: str, sha256: str) -> bool:
    """Whether somebody who speaks of ``name`` with this sha256 means this student."""
    return sha256 in (card.sha256, _renamed(card, name).sha256)


def _teacher(folder: Path, card: Card, run: _Begun | None, given: Path | None) -> tuple[Link, Card | None]:
    """Its link, and its card where it is at hand and the right one."""
    if card.teacher is None:
        return Link("teacher", broken=[f"{folder / 'student.json'} names no teacher"]), None
    link = Link("teacher", card.teacher.model_dump())
    usual = [Path(run.config.teacher)] if run and run.config else []
    usual.append((folder / "vae").resolve().parent)
    found = [place for place in usual if (place / "teacher.json").is_file()]
    if not given and not found:
        link.unchecked.append("no teacher folder at hand (--teacher FOLDER)")
        return link, None
    paths = {place: student.card_path(place) for place in ([given] if given else found)}
    try:
        cards = {place: student.parse_card(path) for place, path in paths.items()}
    except FolderError as error:
        link.broken.append(str(error))
        return link, None
    right = [place for place, other in cards.items() if other.sha256 == card.teacher.sha256]
    place = (right or list(cards))[0]
    of = cards[place]
    link.facts["folder"] = str(place)
    link.facts["stages"] = list(of.stages)
    _folder(link, place, of)
    link.same(f"identity of {place} ({of.name})", of.sha256, card.teacher.sha256, "student.json")
    for name in card.files:
        if "/" in name and not name.startswith(tuple(f"{part}/" for part in student.OWN)):
            link.same(f"sha256 of {name} in {of.kind}.json", of.files.get(name), card.files[name], "student.json")
    return link, of if right else None


def _folder(link: Link, folder: Path, card: Card) -> None:
    """Compare every file of a model folder with its card."""
    changed = dict(student.altered(folder, card))
    for name, recorded in card.files.items():
        link.same(f"sha256 of {folder / name}", changed.get(name, recorded), recorded, f"{card.kind}.json")
    for name in student.unlisted(folder, card):
        link.broken.append(f"{folder / name} is not listed in {card.kind}.json: it was put there afterwards")


def _stages(card: Card, run: _Begun | None) -> list[Link]:
    try:
        entries = {entry.name: entry for entry in map(_Stage.model_validate, card.stages)}
    except ValidationError as error:
        return [Link("stages", broken=[f"student.json: stages: {error.errors()[0]['msg']}"])]
    # The older card has neither; one that has lost one of them was changed.
    older = card.parent_sha256 is None and not any(entry.sha256 for entry in entries.values())
    known = {"teacher": card.teacher.sha256} if card.teacher else {}
    links = []
    for name in LEAVES:
        if name not in entries:
            if not older or name != "latents":
                links.append(Link(name, broken=[f"student.json lists no stage {name}"]))
            continue
        entry = entries[name]
        link = Link(name, entry.model_dump(exclude_none=True))
        links.append(link)
        if older:
            link.unchecked.append("the card is older than hashes of what stages were given and left")
        else:
            parent, left = entry.parent_sha256 or {}, entry.sha256 or {}
            prepared = DATA in (entries["latents"].sha256 or {}) if "latents" in entries else False
            for file in _given(name, prepared):
                link.same(f"sha256 of {file} as given to {name}", parent.get(file), known.get(file, ""), "what left it")
            for file in set(_leaves(name, prepared)) - left.keys():
                link.broken.append(f"student.json has no sha256 of {file}, which {name} left")
            known |= left
        if run:
            _stage_in_run(link, entry, run, card)
        else:
            link.unchecked.append("no run folder at hand (--run RUN)")
    return links


def _stage_in_run(link: Link, entry: _Stage, run: _Begun, card: Card) -> None:
    """Compare an entry of the card with the run's folder."""
    name = entry.name
    for file, recorded in (entry.sha256 or {}).items():
        if name == "latents" and not (run.folder / file).exists():
            link.unchecked.append(f"{run.folder / file} is not there any more")
        else:
            link.file(run.folder / file, recorded, "student.json")
    if run.config and name != "latents":
        part: Config = getattr(run.config, name)
        link.facts["config"] = part.model_dump(mode="json")
        what = f"sha256 of {name}'s settings in {run.folder / 'config.json'}"
        link.same(what, _written(part), entry.config_sha256, "student.json")
        link.same(f"seed in {run.folder / 'config.json'}", run.config.seed, entry.seed, "student.json")
    if run.inputs and entry.inputs_sha256:
        what = f"hash of what {name} read, by {run.folder / 'config.json'} and the teacher,"
        link.same(what, run.inputs[name], entry.inputs_sha256, "student.json")
    if run.iterations and name != "latents":
        what = f"steps of {name} in {run.folder / 'events.jsonl'}"
        link.same(what, run.iterations.get(name, 0), entry.iterations, "student.json")
    if name == "importance" and (found := _read(_Importance, run.folder / "importance.json", link)) and card.blocks:
        link.facts["drop"] = found.drop
        path = run.folder / "importance.json"
        pruned = card.blocks.pruned
        if run.config and run.config.experts != "both":  # and all of the expert that the student is not of
            pruned = tuple(block for block in pruned if block in found.pruned)
            link.same(f"blocks gone by {path}", found.pruned, pruned, "student.json")
            return
        link.same(f"blocks gone by {path}", found.pruned, pruned, "student.json")
        ratios = (card.blocks.block_ratio, card.blocks.ratio)
        link.same(f"parameters left by {path}", (found.block_ratio, found.ratio), ratios, "student.json")


def _student(folder: Path, card: Card, teacher: Card | None, run: _Begun | None) -> Link:
    told = {"created_at", "backbone", "task", "blocks", "parameters", "call", "sigmas", "guidance", "metrics", "code"}
    link = Link("student", {"name": card.name, "sha256": card.sha256, "folder": str(folder)})
    link.facts |= card.model_dump(mode="json", include=told, exclude_none=True)
    _folder(link, folder, card)
    named = folder.resolve().name
    if re.fullmatch("[0-9a-f]{64}", named):  # as fetched from the object storage
        link.same("identity by student.json", card.sha256, named, "the folder's name")
    if teacher:
        of_teacher = card.stages[: len(teacher.stages)]
        link.same("the teacher's stages in student.json", of_teacher, teacher.stages, "teacher.json")
    if card.parent_sha256 is not None:
        left = [entry["sha256"] for entry in card.stages if entry.get("name") == "matching" and "sha256" in entry]
        wanted = left[-1].get(MATCHED) if left else ""
        link.same(f"sha256 of {MATCHED} as written from", card.parent_sha256.get(MATCHED), wanted, "matching")
    if run is None:
        link.unchecked.append("no run folder at hand (--run RUN): weights are not compared with stage III's")
        return link
    experts = (folder / "transformer_2").is_dir()
    for component, prefix in EXPERTS.items() if experts else [("transformer", "")]:
        _weights(link, run.folder / MATCHED, folder / component, prefix)
    if run.config:
        few, by = run.config.student, f"{run.folder / 'config.json'}"
        steps = card.call.get("num_inference_steps")
        link.same("number of steps in student.json", steps, few.num_inference_steps, by)
        link.same("guidance in student.json", card.guidance, run.config.matching.scores.model_dump(mode="json"), by)
        scheduler = _read(dict[str, Any], folder / "scheduler" / "scheduler_config.json", link) or {}
        for name in ("shift", "shift_terminal"):
            what = f"{name} in {folder / 'scheduler' / 'scheduler_config.json'}"
            link.same(what, scheduler.get(name), getattr(few, name), by)
    return link


def _weights(link: Link, whole: Path, component: Path, prefix: str) -> None:
    """Compare weights of the student's with those of stage III that begin so, which are theirs in full precision."""
    half, files = component / student.WEIGHTS, student.weight_files(component)
    if not all(path.is_file() for path in (*files, whole)):
        link.unchecked.append(f"{half} is not compared with {whole}: one of them is not there")
        return
    try:
        with ExitStack() as stack, np.errstate(over="ignore"):
            ours = stack.enter_context(safe_open(whole, "numpy"))
            opened = [stack.enter_context(safe_open(path, "numpy")) for path in files]
            theirs = {name: file for file in opened for name in file.keys()}
            mine = {name.removeprefix(prefix) for name in ours.keys() if name.startswith(prefix)}
            names = sorted({*mine, *theirs})
            apart = [name for name in names if not _cast_equals(name, prefix, ours, theirs)]
    except (SafetensorError, TypeError) as error:
        link.broken.append(f"{half} cannot be compared with {whole}: {error}")
        return
    if apart:
        link.broken.append(f"{half}: {len(apart)} of {len(names)} tensors are not those of {whole}: {apart[0]} ...")
    else:
        link.checked.append(f"{half} is {whole} in half precision")


def _cast_equals(name: str, prefix: str, ours: Any, theirs: dict[str, Any]) -> bool:
    if prefix + name not in ours.keys() or name not in theirs:
        return False
    kept = theirs[name].get_tensor(name)
    return np.array_equal(ours.get_tensor(prefix + name).astype(kept.dtype), kept, equal_nan=True)


# --- from the student to its release --------------------------------------------------------------------------------


class _Judged(BaseModel):
    name: str
    sha256: str


class _Check(BaseModel):
    form: str
    name: str
    ok: bool
    means: str


class _Report(BaseModel):
    """`gate.json`."""

    created_at: str
    passed: bool
    refusals: list[str]
    new: _Judged
    active: _Judged
    teacher: _Judged
    config: GateConfig
    config_sha256: str | None = None
    checks: list[_Check]


class _Build(BaseModel):
    """An entry of the engines' `registry.json`: {key: {made_at, about, files: {name: sha256}}}."""

    made_at: str
    about: dict[str, Any]
    files: dict[str, str]


class _Summary(BaseModel):
    """What the gate said, as a release keeps it."""

    passed: bool
    refusals: list[str]
    against: str


class _Release(BaseModel):
    """An entry of `GET /admin/release`'s history."""

    number: int
    at: float
    action: str
    sha256: str
    name: str
    previous: str | None
    by: str
    reason: str
    forced: bool
    gate: _Summary | None


class _History(BaseModel):
    history: list[_Release]


def _gate(card: Card, path: Path | None) -> tuple[_Report | None, Link]:
    """Its link, and the verdict where it is this student's."""
    if path is None or not path.exists():
        return None, _absent("gate", "no verdict", "RUN/gate/gate.json, --gate FILE")
    link = Link("gate", {"file": str(path)})
    report = _read(_Report, path, link)
    if report is None:
        return None, link
    link.facts |= report.model_dump(mode="json", exclude={"checks", "config"})
    if _is(card, report.new.name, report.new.sha256):
        link.checked.append(f"{path} judged this student")
    else:
        judged = f"{report.new.name}, sha256 {report.new.sha256}"
        link.broken.append(f"{path} is the verdict on {judged}, and this student's sha256 is {card.sha256}")
    if card.teacher:
        link.same(f"teacher's sha256 in {path}", report.teacher.sha256, card.teacher.sha256, "student.json")
    if report.config_sha256:
        link.same(f"sha256 of the limits in {path}", _written(report.config), report.config_sha256, "the gate")
    refusals = [f"{check.form}, {check.name}: {check.means}" for check in report.checks if not check.ok]
    link.same(f"refusals in {path}", report.refusals, refusals, "its checks")
    link.same(f"passed in {path}", report.passed, not refusals, "its checks")
    return (None if link.broken else report), link


def _engines(card: Card, folder: Path | None) -> Link:
    """All builds of the student's weights, each with what it says about itself."""
    registry = folder / "registry.json" if folder else None
    if folder is None or registry is None or not registry.is_file():
        return _absent("engine", "no engines", "--engines FOLDER")
    link = Link("engine", {"folder": str(folder), "builds": []})
    parts = {student.weights_sha256(card.files, part) for part in ("transformer", "vae")}
    for key, build in (_read(dict[str, _Build], registry, link) or {}).items():
        weights = build.about.get("weights_sha256")
        if build.about.get("model_sha256") != card.sha256 and weights not in parts:
            continue
        link.facts["builds"].append({"key": key, **build.model_dump()})
        if weights is not None and weights not in parts:
            link.broken.append(f"{registry}: build {key} has weights {weights}, and those of this student are others")
        if not (folder / key).is_dir():
            link.unchecked.append(f"{folder / key} was removed; a worker builds it anew")
            continue
        for name, recorded in build.files.items():
            link.file(folder / key / name, recorded, f"{registry}")
        for path in (folder / key).rglob("*"):
            if path.is_file() and str(path.relative_to(folder / key)) not in build.files:
                link.broken.append(f"{path} is not listed in {registry}: it was put there afterwards")
    if not link.facts["builds"] and not link.broken:
        link.unchecked.append(f"{registry} lists no build of this student")
    return link


def _storage(card: Card, folder: Path | None) -> Link:
    """`students/<identity>.json`, a card, and `blobs/<sha256>`, its files."""
    if folder is None:
        return _absent("storage", "no object storage", "--storage FOLDER")
    path = folder / "students" / f"{card.sha256}.json"
    link = Link("storage", {"file": str(path)})
    if not path.exists():
        link.unchecked.append(f"{path} is not there: the student was not added to this storage")
        return link
    if stored := _read(Card, path, link):
        link.same(f"identity by {path}", stored.sha256, card.sha256, "student.json")
    for name, sha256 in card.files.items():
        link.file(folder / "blobs" / sha256, sha256, f"student.json, for {name},")
    return link


def _releases(card: Card, path: Path | None, report: _Report | None) -> Link:
    """When the student was promoted and rolled back to, by whom and on what verdict."""
    if path is None:
        return _absent("release", "no history of releases", "--releases FILE")
    link = Link("release", {"file": str(path), "history": []})
    found = _read(_History, path, link)
    history = sorted(found.history, key=lambda entry: entry.number) if found else []
    for before, entry in pairwise(history):
        link.same(f"number after release {before.number} in {path}", entry.number, before.number + 1, "the history")
        link.same(f"what release {entry.number} in {path} replaced", entry.previous, before.sha256, "the one before")
    for entry in history:
        if not _is(card, entry.name, entry.sha256):
            continue
        link.facts["history"].append(entry.model_dump(mode="json"))
        told = f"release {entry.number} in {path}"
        passed = entry.gate and entry.gate.passed and entry.previous in (None, entry.gate.against)
        if entry.action == "promote" and not passed and not entry.forced:
            link.broken.append(f"{told} has no verdict that passed against what it replaced, and was not forced")
        if report and entry.gate and entry.gate.against == report.active.sha256:
            said, found_now = (entry.gate.passed, entry.gate.refusals), (report.passed, report.refusals)
            link.same(f"verdict of {told}", said, found_now, "gate.json")
    if found and not link.facts["history"]:
        link.unchecked.append(f"{path} tells of no release of this student")
    elif found:
        link.checked.append(f"{len(link.facts['history'])} releases in {path}")
    return link


# --- what is told ---------------------------------------------------------------------------------------------------


def as_json(lineage: Lineage) -> dict[str, Any]:
    """The chain for programs."""
    return {
        "format": 1,
        "student": {"name": lineage.card.name, "sha256": lineage.card.sha256, "folder": str(lineage.folder)},
        "whole": lineage.whole,
        "links": [{"state": link.state, **asdict(link)} for link in lineage.links],
    }


def as_text(lineage: Lineage) -> str:
    """The chain for people: a line for each link, under it what is wrong and what was not checked."""
    lines = [f"{lineage.card.name}, sha256 {lineage.card.sha256}"]
    for link in lineage.links:
        lines.append(f"{link.name:<11} {'; '.join([link.state, *_facts(link)])}")
        lines += [f"{'':<11} broken: {line}" for line in link.broken]
        lines += [f"{'':<11} not checked: {line}" for line in link.unchecked]
    broken = [link.name for link in lineage.links if link.broken]
    lines.append(f"broken at: {', '.join(broken)}" if broken else "nothing is other than recorded")
    return "\n".join(lines)


def _facts(link: Link) -> list[str]:
    """Those that fit a line; hashes by their first 12 digits."""
    facts = {name: value for name, value in link.facts.items() if value not in (None, {}, [])}
    told = [f"{len(link.checked)} comparisons hold"] if link.checked else []
    told += [str(facts[name]) for name in ("name", "folder", "file") if name in facts and link.name not in LEAVES]
    for name in ("sha256", "config_sha256", "parent_sha256"):
        if name in facts:
            hashes = facts[name].items() if isinstance(facts[name], dict) else [("", facts[name])]
            told.append(f"{name} {', '.join(f'{file} {sha256[:12]}'.strip() for file, sha256 in hashes)}")
    told += [f"{name} {facts[name]}" for name in ("preset", "seed", "iterations", "wall_s", "metrics") if name in facts]
    if "blocks" in facts:
        told.append(f"without blocks {facts['blocks']['pruned']}, {facts['blocks']['ratio']:.1%} of the parameters")
    if "code" in facts:
        told.append("code " + " ".join(facts["code"].values()))
    if "passed" in facts:
        told.append(f"{'passed' if facts['passed'] else 'refused'} against {facts['active']['name']}")
    for build in facts.get("builds", ()):
        told.append(f"{build['about'].get('engine')} {build['about'].get('part')} {build['key'][:12]}")
    for entry in facts.get("history", ()):
        told.append(f"release {entry['number']}: {entry['action']} by {entry['by']}")
    return told
