"""A machine's clock is an hour off, or jumps by one while it works: no job is lost, doubled or given away."""

import time

import pytest

from tests.chaos.stack import LEASE_S, PATIENCE_S, chaos_in
from tests.stack import wait_for
from worker.contract import Record

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
HOUR = 3600


@pytest.fixture(params=[HOUR, -HOUR])
def offset_s(request) -> int:
    return request.param


def owners(chaos, *jobs: str) -> list[tuple[str | None, int]]:
    return [(record.worker, record.attempt) for record in map(chaos.record, jobs)]


def test_a_worker_whose_clock_is_off_makes_its_jobs_and_takes_nobody_elses(chaos, clock, offset_s):
    """Nor does anybody take its: workers with both clocks have nothing else to do than to look for lost jobs."""
    clock.set(offset_s)
    chaos.hold("denoising", 1, 2)
    right = chaos.start_worker()
    first = chaos.submit(1)
    chaos.reach("denoising", 1)
    wrong = chaos.start_worker(**clock.environment)
    second = chaos.submit(2)
    chaos.reach("denoising", 2)
    chaos.start_worker()
    chaos.start_worker(**clock.environment)
    time.sleep(2 * LEASE_S)
    assert owners(chaos, first, second) == [(right, 1), (wrong, 1)]
    chaos.release("denoising", 1, 2)
    chaos.succeeded(first, second)
    assert owners(chaos, first, second) == [(right, 1), (wrong, 1)]
    chaos.wait_idle()


def test_a_job_of_a_dead_worker_whose_clock_was_off_is_taken_over(chaos, clock, offset_s):
    clock.set(offset_s)
    wrong = chaos.start_worker(**clock.environment)
    chaos.hold("denoising", 1)
    job = chaos.submit(1)
    chaos.reach("denoising", 1)
    chaos.kill(wrong)
    chaos.release("denoising", 1)
    right = chaos.start_worker()
    chaos.succeeded(job)
    assert owners(chaos, job) == [(right, 2)]


def test_a_clock_that_jumps_while_a_job_runs_costs_nothing(chaos, clock, offset_s):
    jumping = chaos.start_worker(**clock.environment)
    chaos.hold("denoising", 1)
    job = chaos.submit(1)
    chaos.reach("denoising", 1)
    chaos.start_worker()
    clock.set(offset_s)
    time.sleep(2 * LEASE_S)
    chaos.release("denoising", 1)
    chaos.succeeded(job)
    assert owners(chaos, job) == [(jumping, 1)]
    assert chaos.is_ready(jumping)
    chaos.wait_idle()


def test_a_service_whose_clock_is_off_takes_jobs_and_removes_none_that_should_stay(tmp_path, picture, clock):
    """Its clock is ahead by more than the time that videos are kept for."""
    with chaos_in(tmp_path, picture) as chaos:
        chaos.start_service()
        chaos.start_worker("--seconds", "0.05")
        job = chaos.submit(1)
        chaos.succeeded(job)
        clock.set(30 * 24 * HOUR)
        chaos.kill_program("service")
        chaos.redis.delete(f"{Record.index_key}:upkeep")  # it looks at once
        chaos.stack.environment |= clock.environment
        chaos.start_service()
        wait_for(lambda: chaos.redis.exists(f"{Record.index_key}:upkeep"), PATIENCE_S, "its upkeep")
        another = chaos.submit(2)
        chaos.wait_over(job, another)
        clock.set(0)
        chaos.succeeded(job, another)
