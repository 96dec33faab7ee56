"""`python -m distill run RECIPE FOLDER`: from a teacher to a few-step student with fewer blocks.

    1 latents      what the teacher's autoencoder makes of the clips
    2 importance   stage I: which blocks matter least
    3 pruning      stage II: weights that work at many depths
    4 matching     stage III: the few-step student
    5 student      FOLDER/student, written aside and renamed

Each step is skipped where its result is in the folder: the same command resumes. Under `torchrun` its processes share
the work (`distill.distributed`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill import distributed, lineage, report, schedule, student
from distill.backbones import base
from distill.config import ConfigError, DistillConfig
from distill.distributed import ALONE, World
from distill.loop import Run, remember, write_json
from distill.stages import importance, matching, pruning, watch
from distill.stages.given import Given, check


def distil(folder: Path, config: DistillConfig, begun: Path | None = None, world: World = ALONE) -> Path:
    """Run all three stages, or what is left of them, and return the student's folder.

    Args:
        folder: the run's.
        config: see ``DistillConfig``.
        begun: another run's folder, whose stages are taken over as far as they had the same inputs.
        world: the processes that share the work, each of which calls this.

    Raises:
        ConfigError: the folder was begun with another configuration or teacher, or the configuration cannot work.
        FolderError: the teacher's folder is broken.
        Interrupted: a signal came; the same command goes on.
        Diverged: a stage had no good weights to keep.
    """
    out = folder / "student"
    with opened(folder, config, begun, world) as (run, given):
        scheduler = schedule.few_step_scheduler(given.backbone, config.student)
        found = importance.run(run, given, config.importance, config.pruning.unimportant)
        whole = pruning.run(run, given, found, config.pruning)
        watched = watch.Watch(run, given, scheduler)
        few = None if config.experts == "both" else student_of(given, whole, found.pruned)
        transformer = matching.run(run, given, found.pruned, whole, config.matching, scheduler, watched, few)
        if not world.exists(folder / "report.md"):  # written last
            seen = watched.look(transformer, folder / "samples" / "student.png")
            with world.first_alone():
                if world.is_first:
                    _finish(run, given, found, transformer, scheduler, seen)
    return out


def _finish(
    run: Run, given: Given, found: importance.Importance, transformer: Any, scheduler: Any, seen: dict[str, float]
) -> None:
    """Write the student's folder, and what became of the run."""
    out = run.folder / "student"
    if run.world.is_sharded:  # of whose weights only a part is here
        transformer = _whole(run, given, found.pruned)
    card = save(out, given, found, transformer, scheduler, run)
    run.event("student", 1, done=out.name, sha256=card.sha256, **seen)
    lines = {
        "student": f"{card.name}, sha256 {card.sha256[:12]}",
        "teacher": f"{given.card.name}, sha256 {given.card.sha256[:12]}",
        "blocks gone": ", ".join(map(str, found.pruned)),
        "block parameters left": f"{found.block_ratio:.1%}",
        "transformer parameters left": f"{found.ratio:.1%}",
        "noise levels": ", ".join(f"{sigma:g}" for sigma in card.sigmas),
    }
    report.run_report(run.folder, lines)


def _whole(run: Run, given: Given, pruned: Collection[int]) -> Any:
    """The student on this process alone, from what stage III left."""
    network = given.without_blocks(given.empty_teacher(), pruned)
    if given.config.experts != "both":
        network = given.backbone.one_expert(network, given.config.experts)
    distributed.materialise(network, distributed.Stored.of_file(run.folder / lineage.MATCHED))
    return network


def prepare(folder: Path, config: DistillConfig, begun: Path | None, prune: bool) -> None:
    """The part of a run that others take over: the latents, and stages I and II if ``prune``. Raises as ``distil``."""
    with opened(folder, config, begun) as (run, given):
        if prune:
            found = importance.run(run, given, config.importance, config.pruning.unimportant)
            pruning.run(run, given, found, config.pruning)
        run.check_stop()  # or a signal after the last look would be lost


@contextmanager
def opened(
    folder: Path, config: DistillConfig, begun: Path | None, world: World = ALONE
) -> Iterator[tuple[Run, Given]]:
    """A run's folder, begun or found again, with what every stage is given. Raises as ``distil``."""
    teacher = student.read_card(Path(config.teacher))
    if teacher.kind != "teacher":
        raise ConfigError(f"{config.teacher} is a {teacher.kind}; give the folder of a teacher")
    base.load(teacher.backbone, teacher.task)
    check(config, teacher)
    distributed.check(config, world)
    run = Run(folder, config.seed, world)
    with run.handling_signals():
        with world.first_alone():
            if world.is_first:
                _begin(folder, config, teacher.sha256, begun)
        yield run, Given(run, config)


def student_of(given: Given, whole: Any, pruned: Collection[int]) -> Any:
    """What a student of one expert starts as: the network without these blocks and without the other expert."""
    return given.backbone.one_expert(given.without_blocks(whole, pruned), given.config.experts)


def gone(given: Given, pruned: Collection[int]) -> tuple[int, ...]:
    """The teacher's blocks that the student does not have: these, and all of an expert that it is not of."""
    groups = dict(zip(("high", "low"), given.backbone.groups(given.teacher), strict=False))
    left = {block for which, group in groups.items() if given.config.experts not in ("both", which) for block in group}
    return tuple(sorted({*pruned, *left}))


def save(
    out: Path, given: Given, found: importance.Importance, transformer: Any, scheduler: Any, run: Run
) -> student.Card:
    """Write the student: a stock pipeline folder in fp16 whose scheduler is its few steps, and `student.json`."""
    config = given.config
    return write_student(
        out,
        given,
        transformer,
        scheduler,
        gone(given, found.pruned),
        given.few_steps_call,
        lineage.stages(run.folder, config, given.card.sha256),
        name=config.name,
        guidance=config.matching.scores.model_dump(mode="json"),
        parent_sha256=lineage.parents(run.folder),
    )


def write_student(
    out: Path, given: Given, transformer: Any, scheduler: Any, pruned: Collection[int], call: dict[str, Any],
    stages: list[dict[str, Any]], **card: Any,
) -> student.Card:  # fmt: skip
    """Write a transformer made from the teacher as a stock pipeline folder in fp16, with `student.json`.

    Args:
        pruned: the teacher's blocks that it does not have.
        call: of the stock pipeline.
        stages: what the card says of each; how long it took and how many steps it had is added from the run's events.
        card: its other fields.
    """
    of, whole = given.card, given.teacher
    counts = [sum(p.numel() for p in block.parameters()) for block in given.backbone.blocks(whole)]
    removed = sum(counts[block] for block in pruned)
    kept = tuple(i for i in range(len(counts)) if i not in pruned)
    wall_s = report.seconds_by_stage(out.parent)
    done = {event["stage"]: event["step"] for event in report.events(out.parent)}
    stages = [
        {**entry, "iterations": done.get(entry["name"], 0), "wall_s": round(wall_s.get(entry["name"], 0.0))}
        for entry in stages
    ]

    def save_parts(aside: Path) -> None:
        made = given.backbone.with_parts(given.pipe, transformer, scheduler, call)
        made.save_config(aside)
        networks = given.backbone.networks(transformer)
        for component, model in networks.items():
            model.half().save_pretrained(aside / component)
            model.float()
        for component in made.components.keys() & set(student.OWN) - networks.keys():
            if (part := getattr(made, component)) is not None:
                part.save_pretrained(aside / component)

    return student.write_student(
        out,
        given.folder,
        student.Card(
            kind="student",
            created_at=student.now(),
            backbone=of.backbone,
            task=of.task,
            parameters=_parameters(given, transformer),
            call=call,
            sigmas=schedule.visited(given.backbone, scheduler, call["num_inference_steps"]),
            prompt=of.prompt,
            video=of.video,
            stages=(*of.stages, *stages),
            metrics={},
            files={},
            teacher=student.Origin(name=of.name, sha256=of.sha256),
            blocks=student.Blocks(
                kept=kept,
                pruned=tuple(sorted(pruned)),
                block_ratio=1 - removed / sum(counts),
                ratio=1 - removed / sum(p.numel() for p in whole.parameters()),
            ),
            code=student.code_version(),
            **card,
        ),
        save_parts,
    )


def _parameters(given: Given, transformer: Any) -> dict[str, int]:
    others = {name: count for name, count in given.card.parameters.items() if name not in student.OWN}
    networks = given.backbone.networks(transformer)
    return others | {name: sum(p.numel() for p in model.parameters()) for name, model in networks.items()}


def _begin(folder: Path, config: DistillConfig, teacher_sha256: str, begun: Path | None) -> None:
    """Write down what the run is, or check that it is the one that was begun here; take over another's stages."""
    remember(folder, config)
    inputs, path = lineage.inputs(config, teacher_sha256), folder / "stages.json"
    # With the configuration the same, only the teacher can differ.
    if path.exists() and json.loads(path.read_text()) != inputs:
        raise ConfigError(f"{folder} was begun with another version of {config.teacher}; take a new folder")
    if begun is not None:
        _take_over(begun, folder, inputs)
    write_json(path, inputs)


def _take_over(begun: Path, folder: Path, inputs: dict[str, str]) -> None:
    """Link (or copy) the results of another run's stages whose inputs are the same."""
    try:
        theirs = json.loads((begun / "stages.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"--from {begun}: there is no run; give the folder of an earlier `distill run`") from None
    taken = set()
    for name, wanted in inputs.items():
        for output in (
            (*lineage.LEAVES[name], *([lineage.DATA] if name == "latents" else [])) if theirs[name] == wanted else ()
        ):
            if (begun / output).exists() and not (folder / output).exists():
                try:
                    os.link(begun / output, folder / output)
                except OSError:  # another file system
                    shutil.copy(begun / output, folder / output)
                taken.add(name)
    # What they logged belongs to how the student came about.
    lines = [json.dumps(event) + "\n" for event in report.events(begun) if event["stage"] in taken]
    with (folder / "events.jsonl").open("a") as events:
        events.writelines(lines)
