"""What is said of the wait: places, seconds, and how often Redis is asked for it."""

import pytest

from distill.prompt import Prompt
from service.fleet import Fleet, Lookout
from tests.stack import new_record
from worker.contract import SECONDS_KEY, Heartbeat, ModelCard, Status, VideoSize, WorkerState
from worker.records import now, publish_models


def card(name: str, frames: int = 17) -> ModelCard:
    return ModelCard(
        name=name,
        sha256="0" * 64,
        task="ti2v",
        num_inference_steps=4,
        video=VideoSize(width=64, height=64, num_frames=frames, fps=8),
        prompt=Prompt(kind="free", help="", examples=("x",)),
    )


def worker(name: str, *models: ModelCard) -> Heartbeat:
    models = models or (card("m"), card("slow"))
    known = {"model": models[0].name, "model_sha256": models[0].sha256, "models": tuple(one.id for one in models)}
    known |= {"engine": "none", "state": WorkerState.READY}
    return Heartbeat(name=name, started_at=now(), seen_at=now(), **known)


def fleet(num_workers: int = 1, **changes) -> Fleet:
    known = {"models": (card("m"), card("slow")), "seconds": {card("m").pace: 2.0, card("slow").pace: 30.0}}
    ready = tuple(worker(str(number)) for number in range(num_workers))
    return Fleet(**{**known, "ready": ready, "num_slots": 0, "backlog_s": 0.0, **changes})


QUEUED = new_record(model="m")


@pytest.mark.parametrize(
    ("num_workers", "position", "seconds"),
    # Half of what runs now, each round before it, and itself.
    [(1, 1, 1 + 2), (1, 4, 1 + 3 * 2 + 2), (2, 1, 1 + 2), (2, 2, 1 + 2), (2, 3, 1 + 2 + 2), (0, 1, 1 + 2)],
)
def test_the_wait_is_that_of_the_rounds_before_it(num_workers, position, seconds):
    assert fleet(num_workers).eta_s(QUEUED, position) == seconds


def test_those_before_it_may_be_of_slower_models():
    crowded = fleet(num_slots=4, backlog_s=92.0)  # three of 30 s, and itself
    assert crowded.eta_s(QUEUED, 3) == 23 * 2.5 + 2


def test_what_runs_needs_the_rest_of_its_time():
    running = QUEUED.model_copy(update={"status": Status.RUNNING, "progress": 0.75})
    assert fleet().eta_s(running, None) == 0.5


def test_of_what_is_over_or_not_known_nothing_is_said():
    assert fleet().eta_s(QUEUED.model_copy(update={"status": Status.SUCCEEDED}), None) is None
    assert fleet(seconds={}).eta_s(QUEUED, 1) is None
    assert fleet(models=()).eta_s(QUEUED, 1) is None
    assert fleet().eta_s(QUEUED, None) is None


def test_seconds_are_those_of_the_student_and_the_size():
    known = fleet()
    assert known.seconds_of(card("m")) == 2.0
    assert known.seconds_of(card("m", frames=33)) is None
    assert known.seconds_of(card("m").model_copy(update={"sha256": "1" * 64})) is None
    assert known.expected_s(card("m", frames=33)) == 5.0


def test_many_who_ask_within_a_second_cost_one_look(records):
    publish_models(records.redis, [card("m")])
    records.redis.hset(SECONDS_KEY, card("m").pace, "2.5")
    lookout = Lookout(records.redis)
    before = records.redis.info("commandstats").get("cmdstat_hgetall", {"calls": 0})["calls"]
    assert [lookout.fleet().expected_s(card("m")) for _ in range(50)] == [2.5] * 50
    after = records.redis.info("commandstats")["cmdstat_hgetall"]["calls"]
    assert after - before == 1


# --- which model a request means -------------------------------------------------------------------------------------

NEW, OLD = card("m"), card("m").model_copy(update={"sha256": "1" * 64})
FIXED = card("teacher")


@pytest.mark.parametrize(
    ("name", "meant"),
    [(None, NEW), ("m", NEW), ("teacher", FIXED), (OLD.id, OLD), (NEW.id, NEW), ("m@222222222222", None), ("x", None)],
)
def test_a_name_means_the_active_one_first_and_an_id_exactly_one(name, meant):
    models = (NEW, FIXED, OLD)
    known = fleet(models=models, ready=(worker("1", *models),), previous=OLD.sha256)
    assert known.model(name) == meant
    assert list(known.listed) == ["m", "teacher", OLD.id]
    assert known.names == ["m", "teacher", NEW.id, FIXED.id, OLD.id]


def test_while_not_every_worker_has_it_it_can_be_had_but_not_exactly():
    under_way = fleet(models=(NEW, OLD), ready=(worker("1", NEW, OLD), worker("2", OLD)))
    assert under_way.model("m") == under_way.model(None) == NEW
    assert under_way.model(NEW.id) is None
    assert under_way.model(OLD.id) == OLD


def test_a_job_is_timed_by_the_student_that_makes_it():
    known = fleet(models=(NEW, OLD), seconds={NEW.pace: 2.0, OLD.pace: 30.0})
    follows = QUEUED.model_copy(update={"model": "gone by now", "follows": True})
    pinned = QUEUED.model_copy(update={"pin": OLD.sha256})
    assert (known.eta_s(follows, 1), known.eta_s(pinned, 1)) == (3.0, 45.0)
    assert known.eta_s(QUEUED.model_copy(update={"pin": "2" * 64}), 1) is None
