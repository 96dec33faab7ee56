"""Settings and start: what is wrong is said at once, in one line."""

import pytest

from service.settings import Settings
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


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("video.example.org", False), ("", False)],
)  # fmt: skip
def test_only_loopback_is_local(host, local):
    assert Settings(host=host).is_local is local
