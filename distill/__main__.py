"""`python -m distill`: teach a teacher, distil a student from one, evaluate a model folder.

Exit codes: 0 done, 2 a user's error (one line says what), 3 refused by the gate or, of `lineage`, not as recorded, or,
of `plan`, does not fit, 75 interrupted and resumable by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from distill import launch, recipes
from distill.config import AdoptConfig, Config, ConfigError, DistillConfig, PrepareConfig, override
from distill.launch import RESUMABLE

REFUSED = 3

# Before torch is imported: threads that spin while they wait halve the speed as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distill", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    teach = commands.add_parser("teach", help="train a small teacher from nothing; the same command resumes")
    teach.add_argument("world", help=f"one of: {', '.join(recipes.TEACHERS)}")
    teach.add_argument("folder", type=Path, help="run folder; the teacher is FOLDER/teacher")
    teach.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting")
    teach.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    run = commands.add_parser("run", help="distil a student from a teacher; the same command resumes")
    run.add_argument("recipe", help=f"one of: {', '.join(recipes.RECIPES)}")
    run.add_argument("folder", type=Path, help="run folder; the student is FOLDER/student")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help=f"change one setting; preset={'|'.join(recipes.PRESETS)}",
    )
    run.add_argument(
        "--from", dest="begun", type=Path, metavar="RUN", help="take over stages that RUN did the same way"
    )
    run.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of this machine that share the work, one a GPU (1)"
    )
    run.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    publish = commands.add_parser("publish", help="copy a student to where it is served from, linked to its teacher")
    publish.add_argument("folder", type=Path, help="for example RUN/student")
    publish.add_argument("out", type=Path, help="for example models/shapes-4step")
    publish.add_argument(
        "--teacher", type=Path, required=True, help="its teacher's folder, for example models/shapes-teacher"
    )
    evaluate = commands.add_parser("evaluate", help="measure a model folder on clips that it has never seen")
    evaluate.add_argument("folder", type=Path, help="a model folder, for example models/shapes-teacher")
    evaluate.add_argument("--out", type=Path, help="where the report goes (var/evaluations/NAME)")
    evaluate.add_argument("--split", choices=("test", "dev"), default="test", help="choices are made on dev")
    evaluate.add_argument("--clips", type=int, help="half of them with closed captions (256)")
    evaluate.add_argument("--seeds", type=int, help="of the noise (3)")
    evaluate.add_argument("--steps", type=int, nargs="+", help="one or more numbers of steps (the folder's own)")
    evaluate.add_argument("--guidance", type=float, nargs="+", help="one or more guidance scales (the folder's own)")
    evaluate.add_argument("--pairs", type=int, help="open pairs that diversity is measured on (32; 0: not at all)")
    evaluate.add_argument("--precision", choices=("float32", "bfloat16"), help="of the transformer (bfloat16)")
    evaluate.add_argument(
        "--store-best", action="store_true", help="write the setting with the best score into the card (dev only)"
    )
    _add_compare(commands.add_parser("compare", help="every method on the same work; the same command goes on"))
    _add_tune(commands.add_parser("tune", help="choose guidance on the dev split; the same command goes on"))
    gate = commands.add_parser("gate", help="decide whether a new student may replace the active one")
    gate.add_argument("folder", type=Path, metavar="NEW", help="the new student's folder")
    gate.add_argument("--against", type=Path, required=True, metavar="ACTIVE", help="the folder that is served now")
    gate.add_argument("--teacher", type=Path, required=True, help="the new student's teacher")
    gate.add_argument("--recipe", default="shapes", help=f"whose limits: one of {', '.join(recipes.RECIPES)} (shapes)")
    gate.add_argument("--out", type=Path, help="where the report goes (var/gates/NAME)")
    gate.add_argument(
        "--set", action="append", default=[], metavar="gate.A=C", help="change one limit; preset=smoke: three clips"
    )
    gate.add_argument(
        "--catch-table", action="store_true", help="spoil NEW's clips in every known way; print what is refused by what"
    )
    lineage = commands.add_parser("lineage", help="how a student came about, and whether that still holds")
    lineage.add_argument("folder", type=Path, metavar="STUDENT", help="for example models/shapes-4step or RUN/student")
    lineage.add_argument("--run", type=Path, help="the run that made it (the folder around it, if that is one)")
    lineage.add_argument("--teacher", type=Path, help="its teacher's folder (the run's, or what it is linked to)")
    lineage.add_argument("--gate", type=Path, metavar="FILE", help="the verdict on it (RUN/gate/gate.json)")
    engines = Path(os.environ.get("ENGINES", "var/engines"))
    lineage.add_argument("--engines", type=Path, default=engines, help=f"where workers keep engines ({engines})")
    lineage.add_argument("--storage", type=Path, metavar="FOLDER", help="the object storage, where it is a folder")
    lineage.add_argument("--releases", type=Path, metavar="FILE", help="what GET /admin/release answered")
    lineage.add_argument("--json", action="store_true", help="for programs")
    _add_prepare(commands.add_parser("prepare", help="encode videos and captions once; the same command goes on"))
    merge = commands.add_parser("merge", help="join what several machines prepared, or several sources")
    merge.add_argument("out", type=Path, help="a new folder")
    merge.add_argument("folders", type=Path, nargs="+", metavar="PART", help="what `prepare` wrote")
    _add_plan(
        commands.add_parser("plan", help="what a run will take of memory and time, before anything is downloaded")
    )
    bench = commands.add_parser("vbench", help="what the VBench benchmark says of videos, where it is installed")
    bench.add_argument("videos", type=Path, help="folder of .mp4 files")
    bench.add_argument("--images", type=Path, metavar="FOLDER", help="their first pictures, of the same names")
    bench.add_argument("--out", type=Path, help="where the report goes (var/evaluations/NAME)")
    bench.add_argument("--python", default=sys.executable, help="of the environment that has vbench (this one)")
    adopt = commands.add_parser("adopt", help="check a downloaded pipeline folder and make it a teacher")
    adopt.add_argument("folder", type=Path, help="with model_index.json; teacher.json is written into it")
    adopt.add_argument(
        "--set", action="append", default=[], metavar="A=C", help="fps=24, num_frames=121, negative_prompt=..."
    )
    features = commands.add_parser("features", help="train the small classifier whose features fvd_shapes compares")
    features.add_argument("folder", type=Path)
    features.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting")
    examples = commands.add_parser("examples", help="draw the playground's example pictures")
    examples.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "examples":
        return _examples(options.folder)
    if options.command == "evaluate":
        return _evaluate(options)
    if options.command == "gate":
        return _gate(options)
    if options.command == "adopt":
        return _adopt(options)
    if options.command == "publish":
        return _publish(options)
    if options.command == "lineage":
        return _lineage(options)
    if options.command in ("prepare", "merge"):
        return _prepare(options) if options.command == "prepare" else _merge(options)
    if options.command == "plan":
        return _plan(options)
    if options.command in ("compare", "tune"):
        return _compare(options) if options.command == "compare" else _tune(options)
    if options.command == "vbench":
        vbench = import_module("distill.vbench").vbench
        out = options.out or Path("var/evaluations") / options.videos.resolve().name
        return _train(lambda: vbench(options.videos, out, options.python, options.images, _say), options.videos)
    try:
        if options.command == "features":
            seeing = override(recipes.features_shapes(), options.set)
            return _train(lambda: import_module("distill.features").teach(options.folder, seeing), options.folder)
        config: Config
        if options.command == "run":
            config = distillation = recipes.load(options.recipe, options.set)
        else:
            config = teaching = override(recipes.load_teacher(options.world), options.set)
        if options.dry_run:
            print(json.dumps(config.model_dump(mode="json"), indent=2))
            return 0
        if options.command == "run":
            if options.processes < 1:
                raise ConfigError(f"--processes {options.processes}: there is one at least")
            if options.processes > 1 and not all(name in os.environ for name in launch.LAUNCHED):
                given = sys.argv[1:] if arguments is None else arguments
                return launch.together([sys.executable, "-m", "distill", *given], options.processes)
            return _train(lambda: _distil(options, distillation), options.folder)
        return _train(lambda: import_module("distill.teach").teach(options.folder, teaching), options.folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _adopt(options: argparse.Namespace) -> int:
    from distill.adopt import adopt
    from distill.student import FolderError

    try:
        card = adopt(options.folder, override(AdoptConfig(), options.set))
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder / 'teacher.json'}: {card.backbone}, task {card.task}, sha256 {card.sha256[:12]}")
    return 0


def _distil(options: argparse.Namespace, config: DistillConfig) -> Path:
    distil = import_module("distill.run").distil
    with import_module("distill.distributed").joined(config.context_parallel) as world:
        out: Path = distil(options.folder, config, options.begun, world)
    return out


def _train(train: Callable[[], Path], folder: Path) -> int:
    # Imported here: the commands that only read must not pay for torch, and a bad setting fails at once.
    from distill.loop import Diverged, Interrupted
    from distill.student import FolderError

    # Of several processes, which all end the same way, the first one of each machine says how.
    said = sys.stderr if os.environ.get("LOCAL_RANK", "0") == "0" else None
    try:
        done = train()
    except Interrupted:
        if said:
            print(f"interrupted; the same command goes on from {folder}", file=said)
        return RESUMABLE
    except (ConfigError, Diverged, FloatingPointError, FolderError) as error:
        if said:
            print(f"error: {error}", file=said)
        return 2
    if said:
        print(done)
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"one of: {', '.join(recipes.RECIPES)}")
    parser.add_argument("folder", type=Path, help="keeps every row; the report is FOLDER/report.md")
    parser.add_argument("--tier", choices=tuple(recipes.COMPARE_PRESETS), default="cpu", help="how much (cpu)")
    parser.add_argument("--quick", action="store_const", const="quick", dest="tier", help="--tier quick: does it run?")
    parser.add_argument("--budget", type=float, help="of each trained method, in updates of the unpruned DMD2 student")
    parser.add_argument("--seeds", type=int, help="of the training")
    parser.add_argument("--clips", type=int, help="of the test split, for the methods")
    parser.add_argument("--noise-seeds", type=int)
    parser.add_argument("--pairs", type=int, dest="diversity_pairs", help="for diversity; 0: not at all")
    parser.add_argument("--groups", nargs="+", help="of: methods grid ablations")
    parser.add_argument("--rows", nargs="+", help="only these, by name")
    parser.add_argument("--tuned", action="store_true", help="with what `distill tune` chose in FOLDER")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting of the recipe")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"one of: {', '.join(recipes.RECIPES)}")
    parser.add_argument("folder", type=Path, help="keeps every row, best the one of `distill compare`")
    parser.add_argument("--method", default="fastlightgen", help="whose settings (fastlightgen)")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--budget", type=float, help="of the last rung, in updates of the unpruned DMD2 student")
    parser.add_argument("--rungs", type=int)
    parser.add_argument("--clips", type=int, help="of the dev split")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting of the recipe")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="folder of videos with a .txt beside each; .csv or .parquet; .txt of captions"
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="whose encoders: a teacher's, say")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read videos (2)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="I-th of N machines; `merge` joins them (1/1)")
    parser.add_argument("--from-teacher", action="store_true", help="captions only: the teacher samples the clips")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"one of: {', '.join(recipes.RECIPES)}")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="processors, with a process for each")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="of each of them, for example 80GB or 141GB")
    parser.add_argument(
        "--gpu", default="h100", help="whose dense bf16 peak is taken: a100, h100, h200, b200, l40s (h100)"
    )
    parser.add_argument("--peak-tflops", type=float, help="another peak than that of --gpu")
    parser.add_argument(
        "--efficiency", type=float, default=0.4, help="share of it that is kept up: an assumption (0.4)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the processors are (cuda)")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="whose shape is taken (the recipe's)")
    parser.add_argument("--clip", metavar="WxHxFRAMES", help="of another size than it makes")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting")
    parser.add_argument("--json", action="store_true", help="for programs")


def _plan(options: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # of processors of images, which no plan needs
    from distill.student import FolderError

    try:
        config = recipes.load(options.recipe, options.set)
        plan = import_module("distill.plan")
        machine = plan.machine(
            options.gpus, options.memory, options.gpu, options.peak_tflops, options.efficiency, options.device
        )
        teacher = plan.teacher_of(options.teacher or Path(config.teacher), options.teacher is None)
        if options.clip is not None:
            teacher = plan.with_clips_of(teacher, options.clip)
        calls = plan.calls_of(config, machine, teacher)
        made = plan.make(config, machine, teacher, calls)
        found = None if made.fits else plan.remedy(config, machine, teacher, calls)
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(plan.as_json(made, found), indent=2))
    else:
        print(plan.text(made, found))
    return 0 if made.fits else REFUSED


def _prepare(options: argparse.Namespace) -> int:
    try:
        config = override(PrepareConfig(from_teacher=options.from_teacher), options.set)
        shard = _shard(options.shard)
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers}: videos are read by one process at least")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
        return 0
    prepare = import_module("distill.prepare").prepare
    return _train(
        lambda: prepare(options.source, options.out, options.model, config, options.workers, shard), options.out
    )


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard {text}: give the how-maniest machine of how many, for example 2/4")
    return int(number), int(count)


def _merge(options: argparse.Namespace) -> int:
    merge = import_module("distill.prepare").merge
    return _train(lambda: merge(options.out, options.folders), options.out)


def _given(options: argparse.Namespace, *names: str) -> list[str]:
    values = {name: getattr(options, name) for name in names}
    return [f"{name}={json.dumps(value)}" for name, value in values.items() if value is not None]


def _compare(options: argparse.Namespace) -> int:
    from distill.student import FolderError

    try:
        quick = recipes.QUICK_RECIPE if options.tier == "quick" else []
        asked = recipes.load(options.recipe, options.set)
        recipe = recipes.load(options.recipe, [*quick, *options.set])
        given = _given(options, "budget", "seeds", "clips", "noise_seeds", "diversity_pairs", "groups", "rows")
        config = override(recipes.compare_shapes(), [*recipes.COMPARE_PRESETS[options.tier], *given])
        if options.tuned:
            tune = import_module("distill.tune")
            choices, searches = tune.choices(options.folder, asked), tune.searches(options.folder)
            if not choices:
                raise ConfigError(
                    f"--tuned: nothing was chosen in {options.folder}; run `distill tune` there first, or leave it out"
                )
            config = config.model_copy(update={"choices": choices, "searches": searches})
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compare = import_module("distill.compare").compare
    return _train(lambda: compare(options.folder, recipe, config, _say), options.folder)


def _tune(options: argparse.Namespace) -> int:
    try:
        recipe = recipes.load(options.recipe, options.set)
        config = override(recipes.tune_shapes(), _given(options, "trials", "budget", "rungs", "clips"))
        tune = import_module("distill.tune")
        if options.method not in tune.SPACES:
            known = ", ".join(tune.SPACES)
            raise ConfigError(f"--method {options.method}: nothing of it is searched; there are: {known}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _train(lambda: tune.tune(options.folder, options.method, recipe, config, _say), options.folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _publish(options: argparse.Namespace) -> int:
    from distill.student import FolderError, publish

    try:
        card = publish(options.folder, options.out, options.teacher)
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {card.name}, sha256 {card.sha256[:12]}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    given = {
        "split": options.split,
        "clips": options.clips,
        "seeds": options.seeds,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "diversity_pairs": options.pairs,
        "precision": options.precision,
    }
    from distill.student import FolderError

    try:
        if options.store_best and options.split != "dev":
            raise ConfigError("--store-best is a choice, and choices are made on the dev split: add --split dev")
        settings = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
        config = override(recipes.evaluate_shapes(), settings)
        from distill import evaluate

        out = options.out or Path("var/evaluations") / options.folder.resolve().name
        results = evaluate.evaluate(options.folder, out, config, _say)
        print((out / "report.md").read_text())
        if options.store_best:
            best = evaluate.store_best(options.folder, results)
            print(f"stored in {options.folder}: {best}")
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _gate(options: argparse.Namespace) -> int:
    try:
        config = recipes.load_gate(options.recipe, options.set)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from distill import gate
    from distill.student import FolderError

    try:
        if options.catch_table:
            verdicts = gate.failures(gate.Trial(options.folder, options.against, options.teacher, config, _say))
            print(gate.catch_table(verdicts))
            return 0 if gate.all_caught(verdicts) else REFUSED
        out = options.out or Path("var/gates") / options.folder.resolve().name
        verdict = gate.gate(options.folder, options.against, options.teacher, out, config, _say)
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((out / "gate.md").read_text())
    return 0 if verdict.passed else REFUSED


def _lineage(options: argparse.Namespace) -> int:
    from distill import lineage
    from distill.student import FolderError

    names = ("run", "teacher", "gate", "engines", "storage", "releases")
    try:
        found = lineage.trace(options.folder, lineage.Places(**{name: getattr(options, name) for name in names}))
    except (ConfigError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(lineage.as_json(found), indent=2) if options.json else lineage.as_text(found))
    return 0 if found.whole else REFUSED


def _examples(folder: Path) -> int:
    from distill.data.examples import write

    write(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
