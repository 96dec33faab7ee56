"""The receiver of webhooks is down, the courier is killed: each message arrives, signed."""

import pytest

from service.webhooks import LEASE_S
from tests.chaos.receiver import Receiver
from tests.chaos.stack import PATIENCE_S, chaos_in
from tests.stack import wait_for
from worker.contract import WEBHOOK_SECRET_KEY, WEBHOOKS_DEAD_KEY, WEBHOOKS_DUE_KEY

pytestmark = pytest.mark.chaos
COURIER = "service.webhooks"


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.answer.set()
    made.down()


@pytest.fixture
def chaos(tmp_path, picture, receiver):
    """With a service that trusts this receiver."""
    with chaos_in(tmp_path, picture, PRIVATE_HOSTS=f"127.0.0.1:{receiver.port}") as made:
        made.start_service()
        yield made


def opened(chaos, receiver) -> list[tuple[str, str]]:
    """Id and type of what has arrived; each has the right signature."""
    secret = chaos.redis.get(WEBHOOK_SECRET_KEY)
    return [(one.headers["webhook-id"], one.open(secret)["type"]) for one in receiver.messages]


def settled(chaos) -> bool:
    return not chaos.redis.zcard(WEBHOOKS_DUE_KEY)


@pytest.mark.slow
def test_a_receiver_that_was_down_gets_its_message_when_it_is_back(chaos, receiver):
    chaos.stack.spawn(COURIER)
    chaos.start_worker("--seconds", "0.05")
    job = chaos.submit(1, webhook_url=receiver.url)
    chaos.succeeded(job)
    wait_for(lambda: _attempts(chaos, job) == 1, PATIENCE_S, "the first try")
    assert chaos.http.get(f"/generate/{job}").json()["webhook"]["status"] == "pending"
    receiver.up()
    wait_for(lambda: settled(chaos), PATIENCE_S, "the next try")
    assert opened(chaos, receiver) == [(f"msg_{job.removeprefix('vid_')}", "generation.succeeded")]
    assert _attempts(chaos, job) == 2
    assert not chaos.redis.zcard(WEBHOOKS_DEAD_KEY)


def _attempts(chaos, job: str) -> int:
    return (chaos.http.get(f"/generate/{job}").json()["webhook"] or {}).get("attempts", 0)


@pytest.mark.slow
def test_a_courier_killed_before_it_could_say_so_sends_the_message_again(chaos, receiver):
    receiver.up()
    receiver.answer.clear()
    chaos.stack.spawn(COURIER)
    chaos.start_worker("--seconds", "0.05")
    job = chaos.submit(1, webhook_url=receiver.url)
    wait_for(lambda: receiver.messages, PATIENCE_S, "the first message")
    chaos.kill_program(COURIER)
    receiver.answer.set()
    chaos.stack.spawn(COURIER)
    wait_for(lambda: settled(chaos), LEASE_S + PATIENCE_S, "the second")
    name = f"msg_{job.removeprefix('vid_')}"
    assert opened(chaos, receiver) == [(name, "generation.succeeded")] * 2


@pytest.mark.slow
def test_a_message_of_a_worker_whose_clock_is_ahead_comes_as_soon_as_any(chaos, receiver, clock):
    receiver.up()
    clock.set(3600)
    chaos.stack.spawn(COURIER)
    chaos.start_worker("--seconds", "0.05", **clock.environment)
    chaos.submit(1, webhook_url=receiver.url)
    wait_for(lambda: receiver.messages, PATIENCE_S, "the message")
