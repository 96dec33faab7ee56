"""Records change by compare-and-set: whoever comes late is refused and told why. Real Redis."""

import json
import re

import pytest

from service.ids import new_id
from worker.contract import Phase, Status, events_key, record_key
from worker.records import Refused


def test_ids_are_unique_and_sort_by_age():
    ids = [new_id("vid") for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert all(re.fullmatch(r"vid_[0-9a-z]{26}", i) for i in ids)
    assert [i[:10] for i in ids] == sorted(i[:10] for i in ids)


def test_a_record_comes_back_as_it_was_written(records, record):
    assert records.get(record.id) == record
    assert records.get("vid_" + "0" * 26) is None


def test_a_change_is_written_with_its_event(records, record):
    after = records.change(record, (Status.QUEUED,), status=Status.RUNNING, phase=Phase.DENOISING, progress=0.25)
    assert records.get(record.id) == after
    [(_, entry)] = records.redis.xrange(events_key(record.id))
    assert json.loads(entry["data"]) == {"status": "running", "phase": "denoising", "progress": 0.25}
    assert 0 < records.redis.ttl(events_key(record.id)) <= 24 * 3600


def test_a_change_from_another_state_is_refused_and_writes_nothing(records, record):
    records.change(record, (Status.QUEUED,), status=Status.CANCELLED)
    with pytest.raises(Refused) as refused:
        records.change(record, (Status.QUEUED, Status.RUNNING), status=Status.RUNNING)
    assert refused.value.found == "cancelled"
    assert records.get(record.id).status is Status.CANCELLED
    assert records.redis.xlen(events_key(record.id)) == 1


def test_a_late_attempt_is_fenced_off(records, record):
    first = records.change(record, (Status.QUEUED,), fence=True, status=Status.RUNNING, attempt=1)
    second = records.change(first, (Status.RUNNING,), fence=True, attempt=2)  # another worker took it over
    with pytest.raises(Refused) as refused:
        records.change(first, (Status.RUNNING,), fence=True, status=Status.SUCCEEDED)
    assert refused.value.found == "fenced"
    records.change(second, (Status.RUNNING,), fence=True, status=Status.SUCCEEDED)
    assert records.get(record.id).status is Status.SUCCEEDED


def test_a_deleted_record_does_not_come_back(records, record):
    records.delete(record.id)
    with pytest.raises(Refused) as refused:
        records.change(record, (Status.QUEUED,), status=Status.RUNNING)
    assert refused.value.found == "missing"
    assert not records.redis.exists(record_key(record.id))


def test_a_record_outlives_its_files_by_a_week(records, record):
    assert 3600 < records.redis.ttl(record_key(record.id)) <= 3600 + 7 * 24 * 3600
