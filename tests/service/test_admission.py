"""Admission against a real Redis: idempotency, retries, limits of a key and of all, and places that come back."""

import math
import threading

import pytest

from service import admission
from service.admission import Admission, Request, Terms
from service.auth import Principal
from service.errors import ApiError
from service.ids import new_id
from tests.stack import new_record
from worker.contract import SLOTS_KEY, SLOTS_TOTAL_KEY, Status, active_key
from worker.records import now

ANNA, BERT = (Principal(name, frozenset(), max_jobs=3, per_minute=0) for name in ("anna", "bert"))


@pytest.fixture
def gate(records) -> Admission:
    return Admission(records.redis, max_queued=20, max_wait_s=100)


def ask(principal: Principal = ANNA, fingerprint: str | None = None, expected_s: float = 1.0, **terms) -> Request:
    job_id = new_id("vid")
    return Request(job_id, principal, fingerprint or job_id, expected_s, Terms(**terms))


def admit(gate: Admission, *requests: Request) -> None:
    for request in requests:
        assert gate.admit(request, 1).is_new


def become_a_job(records, request: Request):
    record = new_record().model_copy(update={"id": request.id, "owner": request.principal.id})
    records.create(record)
    return record


def refusal(gate: Admission, request: Request, num_workers: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        gate.admit(request, num_workers)
    return caught.value


def nothing_is_held(redis) -> bool:
    return not redis.exists(SLOTS_KEY, active_key("anna"), active_key("bert")) and redis.get(SLOTS_TOTAL_KEY) == "0"


# --- the same request again -------------------------------------------------------------------------------------------


def test_the_same_idempotency_key_and_body_are_one_job(gate, records):
    first = ask(fingerprint="body", idempotency_key="k")
    admit(gate, first)
    assert gate.admit(ask(fingerprint="body", idempotency_key="k"), 1).job_id == first.id  # not yet a job
    record = become_a_job(records, first)
    records.change(record, (Status.QUEUED,), status=Status.SUCCEEDED)
    again = gate.admit(ask(fingerprint="body", idempotency_key="k"), 1)
    assert (again.job_id, again.is_new) == (first.id, False)
    records.delete(first.id, "anna")
    assert gate.admit(ask(fingerprint="body", idempotency_key="k"), 1).is_new  # there is nothing to hand back


def test_an_idempotency_key_is_not_for_another_body(gate):
    admit(gate, ask(fingerprint="body", idempotency_key="k"))
    error = refusal(gate, ask(fingerprint="other", idempotency_key="k"))
    assert (error.status, error.code, error.param) == (422, "idempotency_key_reused", "Idempotency-Key")
    assert gate.admit(ask(BERT, fingerprint="other", idempotency_key="k"), 1).is_new  # his own


def test_only_a_retry_that_says_so_is_the_same_request(gate, records):
    first = ask(fingerprint="body")
    admit(gate, first)
    become_a_job(records, first)
    retry = gate.admit(ask(fingerprint="body", is_retry=True), 1)
    assert (retry.job_id, retry.is_new) == (first.id, False)
    second = ask(fingerprint="body")
    admit(gate, second)  # somebody who wants two
    assert gate.admit(ask(fingerprint="body", is_retry=True), 1).job_id == second.id
    assert gate.admit(ask(fingerprint="other", is_retry=True), 1).is_new
    assert gate.admit(ask(BERT, fingerprint="body", is_retry=True), 1).is_new
    assert 0 < records.redis.ttl("flg:same:anna:body") <= 60


def test_of_many_at_once_with_one_key_one_becomes_a_job(gate):
    found = []
    barrier = threading.Barrier(16)

    def one() -> None:
        barrier.wait()
        found.append(gate.admit(ask(fingerprint="body", idempotency_key="k"), 1))

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted.is_new for admitted in found) == 1
    assert len({admitted.job_id for admitted in found}) == 1


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_key_has_so_many_jobs_under_way_and_the_end_of_one_makes_room(gate, records):
    requests = [ask() for _ in range(3)]
    admit(gate, *requests)
    records_of = [become_a_job(records, request) for request in requests]
    error = refusal(gate, ask())
    assert (error.status, error.code) == (429, "too_many_jobs")
    assert 1 <= int(error.headers["Retry-After"]) <= 120
    assert gate.admit(ask(BERT), 1).is_new
    running = records.change(records_of[0], (Status.QUEUED,), status=Status.RUNNING, attempt=1)
    assert refusal(gate, ask()).code == "too_many_jobs"
    records.change(running, (Status.RUNNING,), status=Status.FAILED)
    assert gate.admit(ask(), 1).is_new


def test_a_key_sends_so_many_requests_in_a_minute(gate, monkeypatch):
    moment = now()
    monkeypatch.setattr(admission, "now", lambda: moment)
    carl = Principal("carl", frozenset(), per_minute=5)
    admit(gate, *(ask(carl) for _ in range(5)))
    error = refusal(gate, ask(carl))
    assert (error.status, error.code, error.headers["Retry-After"]) == (429, "rate_limited", "12")
    moment += 12.1
    admit(gate, ask(carl))
    assert refusal(gate, ask(carl)).code == "rate_limited"
    moment += 61
    admit(gate, *(ask(carl) for _ in range(5)))


def test_all_together_wait_for_so_many_seconds_of_work(gate):
    carl = Principal("carl", frozenset())
    admit(gate, ask(carl, expected_s=80), ask(carl, expected_s=30))
    error = refusal(gate, ask(carl, expected_s=0.1))
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "queue_full", "10")
    assert gate.admit(ask(carl), 2).is_new  # with two workers it is half of that
    assert int(refusal(Admission(gate._redis, 20, 0.5), ask(carl)).headers["Retry-After"]) == 111


def test_no_more_wait_than_may(records):
    gate = Admission(records.redis, max_queued=2, max_wait_s=100)
    carl = Principal("carl", frozenset())
    first, second = ask(carl), ask(carl)
    admit(gate, first)
    become_a_job(records, first)
    admit(gate, second)
    assert refusal(gate, ask(carl)).code == "queue_full"


def test_what_cannot_meet_its_deadline_is_not_begun(gate):
    carl = Principal("carl", frozenset())
    admit(gate, ask(carl, expected_s=20))
    error = refusal(gate, ask(carl, start_within_s=15))
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "deadline_out_of_reach", "5")
    assert refusal(gate, ask(carl, expected_s=10, finish_within_s=25)).code == "deadline_out_of_reach"
    admit(gate, ask(carl, start_within_s=25, finish_within_s=math.inf), ask(carl, expected_s=2, finish_within_s=40))


# --- places come back -------------------------------------------------------------------------------------------------


def test_a_request_that_fails_leaves_nothing(gate, records):
    request = ask(fingerprint="body", idempotency_key="k")
    admit(gate, request)
    assert not nothing_is_held(records.redis)
    gate.release(request)
    assert nothing_is_held(records.redis)
    assert gate.admit(ask(fingerprint="other", idempotency_key="k"), 1).is_new  # the key was never used


def test_a_service_that_dies_holds_no_place_for_ever(gate, records, monkeypatch):
    admit(gate, ask(), ask(BERT), ask())
    later = now() + 91
    monkeypatch.setattr(admission, "now", lambda: later)
    last = ask()
    admit(gate, last, ask(), ask())
    assert records.redis.zcard(SLOTS_KEY) == 3
    assert records.redis.get(SLOTS_TOTAL_KEY) == "3000"


@pytest.mark.parametrize("end", ["ends", "is deleted"])
def test_a_job_holds_its_place_until_it(gate, records, end):
    request = ask()
    admit(gate, request)
    record = become_a_job(records, request)
    assert records.redis.zscore(SLOTS_KEY, request.id) == math.inf
    if end == "ends":
        records.change(record, (Status.QUEUED,), status=Status.CANCELLED)
    else:
        records.delete(record.id)
    assert nothing_is_held(records.redis)


def test_refusals_are_counted(gate, records):
    admit(gate, *(ask() for _ in range(3)))
    refusal(gate, ask())
    assert records.redis.hget("flg:metrics", "admission_rejected_total|reason=jobs") == "1"
