"""`python -m distill`: teach a teacher, draw the example pictures.

Exit codes: 0 done, 2 a user's error (one line says what), 75 interrupted and resumable by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from distill import recipes
from distill.config import ConfigError, TeachConfig, override

RESUMABLE = 75

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
    examples = commands.add_parser("examples", help="draw the playground's example pictures")
    examples.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "examples":
        return _examples(options.folder)
    try:
        config = override(recipes.load_teacher(options.world), options.set)
        if options.dry_run:
            print(json.dumps(config.model_dump(mode="json"), indent=2))
            return 0
        return _teach(options.folder, config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _teach(folder: Path, config: TeachConfig) -> int:
    # Imported here: the commands that only read must not pay for torch, and a bad setting fails at once.
    from distill.loop import Interrupted
    from distill.teach import teach

    try:
        print(teach(folder, config))
    except Interrupted:
        print(f"interrupted; the same command goes on from {folder}", file=sys.stderr)
        return RESUMABLE
    return 0


def _examples(folder: Path) -> int:
    from distill.data.examples import write

    write(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
