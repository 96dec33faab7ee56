"""The service, which a test can stop where it takes a job: `python -m tests.chaos.service FOLDER`.

As for `tests.chaos.worker`: where the file FOLDER/hold-PLACE-any is, requests wait. written: the image is stored, and
there is no record. recorded: there is one, and nothing in the queue.
"""

from __future__ import annotations

import sys
from pathlib import Path

from service import __main__
from service.jobs import JobStore
from tests.chaos.worker import Gates
from worker.records import Records


def main(folder: Path) -> int:
    gates = Gates(folder)
    create, enqueue = Records.create, JobStore._enqueue

    def held_create(*arguments: object) -> None:
        gates.hold("written", "any")
        create(*arguments)

    def held_enqueue(*arguments: object) -> None:
        gates.hold("recorded", "any")
        enqueue(*arguments)

    Records.create, JobStore._enqueue = held_create, held_enqueue
    del sys.argv[1]
    return __main__.main()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
