"""Several processes of one machine end as one does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import launch
from distill.__main__ import main

TOGETHER = (
    "import sys; from distill.launch import together; "
    "sys.exit(together([sys.executable, *sys.argv[2:]], int(sys.argv[1])))"
)


def start(processes: int, program: str) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", TOGETHER, str(processes), "-c", program], cwd=root)


def test_each_process_is_told_which_one_it_is(tmp_path):
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS')"
    program = (
        f"import os, pathlib; told = [os.environ[name] for name in {names}];"
        f"(pathlib.Path({str(tmp_path)!r}) / told[0]).write_text(' '.join(told))"
    )
    assert launch.together([sys.executable, "-c", program], 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [one[:4] for one in told] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({one[4] for one in told}) == 1
    assert all(int(one[5]) >= 1 for one in told)


@pytest.mark.parametrize("code", [2, 75])
def test_the_exit_code_of_one_is_that_of_all_and_nobody_waits_for_it(code):
    program = (
        "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0));"
        f"time.sleep(.5 if os.environ['RANK'] == '1' else 60); raise SystemExit({code})"
    )
    started = time.monotonic()
    assert launch.together([sys.executable, "-c", program], 2) == code
    assert time.monotonic() - started < 30


def test_a_stop_is_handed_on_and_waited_for(tmp_path):
    """Longer than torchrun would wait is too long for a test; that each may end in its own time is not."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_):\n"
        "    time.sleep(float(os.environ['RANK']))\n"
        "    (folder / ('saved-' + os.environ['RANK'])).touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(folder / ('begun-' + os.environ['RANK'])).touch()\n"
        "time.sleep(60)\n"
    )
    process = start(2, program)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("begun-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_where_one_is_killed_so_is_what_started_it():
    program = (
        "import os, signal, time; os.environ['RANK'] == '0' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    )
    assert start(2, program).wait(30) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it there")
def test_they_do_not_outlive_what_started_them(tmp_path):
    program = (
        "import os, pathlib, time\n"
        f"(pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    process = start(2, program)
    deadline = time.monotonic() + 30
    while not all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_processes_at_all_is_refused(tmp_path, capsys):
    assert main(["run", "shapes", str(tmp_path), "--processes", "0"]) == 2
    assert "--processes 0: there is one at least" in capsys.readouterr().err


def test_a_process_that_was_started_by_others_starts_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(launch, "together", lambda *_: pytest.fail("it did"))
    assert main(["run", "shapes", str(tmp_path / "run"), "--processes", "2", "--set", "teacher=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
