"""Settings and start: what is wrong is said at once, in one line."""

import pytest

from tests.stack import run_with


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
    done = run_with("service", environment)
    assert done.returncode == 2
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1
