"""Settings and start: what is wrong is said at once, in one line."""

import os
import subprocess
import sys

import pytest

from tests.stack import ROOT


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PORT": "http"}, "error: PORT=http: Input should be a valid integer"),
        ({"PORT": "70000"}, "error: PORT=70000: Input should be less than or equal to 65535"),
        ({"MAX_QUEUED": "0"}, "error: MAX_QUEUED=0"),
        ({"PUBLIC_URL": "example.com"}, "error: PUBLIC_URL=example.com"),
    ],
)
def test_a_wrong_setting_ends_the_service_with_2_and_one_line(environment, says):
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1
