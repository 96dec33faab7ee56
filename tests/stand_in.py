"""Stand-ins for `python -m distill run` and `gate`, one behaviour each, and a trainer whose commands they are.

python -m tests.stand_in BEHAVIOUR run RECIPE FOLDER --set preset=...
python -m tests.stand_in BEHAVIOUR gate STUDENT --against ACTIVE --out FOLDER ...
python -m tests.stand_in trainer BEHAVIOUR

The student that comes out of each run is the bundled one, or another that is nothing but a card in front of its files.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import sys
import time
from pathlib import Path

STEPS = 8
MODELS = Path(__file__).resolve().parent.parent / "models"


def works(folder: Path) -> int:
    """Counts to STEPS with a checkpoint at each, says so, and stops at SIGTERM. Its first start waits half-way for the
    file FOLDER/go; a later one goes on from the checkpoint. Refuses to run beside another."""
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    with (folder / "lock").open("w") as lock, (folder / "events.jsonl").open("a", buffering=1) as events:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        checkpoint = folder / "checkpoint"
        begin = int(checkpoint.read_text()) if checkpoint.exists() else 0
        print(f"from {begin}", flush=True)
        for step in range(begin + 1, STEPS + 1):
            event = {"time": time.time(), "stage": "matching", "step": step, "steps": STEPS, "loss": 1 / step}
            events.write(json.dumps(event) + "\n")
            checkpoint.write_text(str(step))
            events.write(json.dumps({"time": time.time(), "stage": "matching", "step": step, "checkpoint": "x"}) + "\n")
            while step == STEPS // 2 and not begin and not stopping and not (folder / "go").exists():
                time.sleep(0.05)
            if stopping:
                return 75
    make_student(folder / "student")
    (folder / "report.md").write_text("# done\n")
    return 0


def make_student(out: Path) -> None:
    """The bundled one under another name, which makes it another."""
    shutil.copytree(MODELS / "shapes-4step", out)
    card = json.loads((out / "student.json").read_text())
    (out / "student.json").write_text(json.dumps({**card, "name": "stand-in"}))


def is_deaf(folder: Path) -> int:
    """Takes no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "events.jsonl").write_text('{"time": 1, "stage": "latents", "step": 1}\n')
    time.sleep(600)
    return 0


def refuses(_folder: Path) -> int:
    """Ends as for a user's error."""
    print("error: nowhere is no model folder", file=sys.stderr)
    return 2


def crashes(_folder: Path) -> int:
    """Ends with a traceback."""
    raise RuntimeError("the loss is not finite")


def crashes_once(folder: Path) -> int:
    """Half-way, the first time."""
    (folder / "go").touch()
    if not (folder / "checkpoint").exists():
        (folder / "checkpoint").write_text(str(STEPS // 2))
        (folder / "events.jsonl").write_text('{"time": 1, "stage": "matching", "step": 4, "loss": 0.5}\n')
        raise RuntimeError("the loss is not finite")
    return works(folder)


def fails_the_gate(folder: Path) -> int:
    """Works at once; the gate refuses its student."""
    (folder / "go").touch()
    return works(folder)


def waits_at_the_gate(folder: Path) -> int:
    """Works at once; the gate waits for the file RUN/pass."""
    return fails_the_gate(folder)


def gate(behaviour: str, student: Path, *options: str) -> int:
    """Writes a verdict as the gate does."""
    named = dict(zip(options[::2], options[1::2], strict=True))
    out, active = Path(named["--out"]), Path(named["--against"])
    print(f"gate against {active.name}", flush=True)
    while behaviour == "waits_at_the_gate" and not (student.parent / "pass").exists():
        time.sleep(0.05)
    passed = behaviour != "fails_the_gate"
    refusals = [] if passed else ["reference, motion: the videos stand still"]
    sides = {side: {"sha256": sha256_of(folder)} for side, folder in (("new", student), ("active", active))}
    out.mkdir(exist_ok=True)
    (out / "gate.md").write_text("# stand-in\n")
    (out / "gate.json").write_text(json.dumps({"passed": passed, "refusals": refusals, **sides}))
    return 0 if passed else 3


def sha256_of(folder: Path) -> str:
    from distill.student import card_path, parse_card

    return parse_card(card_path(folder)).sha256


BEHAVIOURS = {
    function.__name__: function
    for function in (works, is_deaf, refuses, crashes, crashes_once, fails_the_gate, waits_at_the_gate)
}

if __name__ == "__main__":
    if sys.argv[1] == "trainer":
        from worker.trainer import main

        raise SystemExit(main((sys.executable, "-m", "tests.stand_in", sys.argv[2])))
    behaviour, command, *arguments = sys.argv[1:]
    if command == "gate":
        raise SystemExit(gate(behaviour, Path(arguments[0]), *arguments[1:]))
    if "--processes" in arguments:
        print("run shares", arguments[arguments.index("--processes") + 1], "processes", flush=True)
    raise SystemExit(BEHAVIOURS[behaviour](Path(arguments[1])))
