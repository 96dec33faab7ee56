"""Stand-ins for `python -m distill run`, one behaviour each, and a trainer whose runs they are.

python -m tests.stand_in BEHAVIOUR RECIPE FOLDER --set preset=...
python -m tests.stand_in trainer BEHAVIOUR
"""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import time
from pathlib import Path

STEPS = 8


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
            while step == STEPS // 2 and not begin and not stopping and not (folder / "go").exists():
                time.sleep(0.05)
            if stopping:
                return 75
    (folder / "student").mkdir()
    return 0


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


BEHAVIOURS = {function.__name__: function for function in (works, is_deaf, refuses, crashes)}

if __name__ == "__main__":
    if sys.argv[1] == "trainer":
        from worker.trainer import main

        raise SystemExit(main((sys.executable, "-m", "tests.stand_in", sys.argv[2])))
    behaviour, _recipe, folder, *_settings = sys.argv[1:]
    raise SystemExit(BEHAVIOURS[behaviour](Path(folder)))
