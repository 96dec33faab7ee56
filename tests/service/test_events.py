"""Following a job: many at once, nothing twice, no step back. Real Redis."""

import asyncio
from contextlib import asynccontextmanager

from service.events import Hub, follow, wait
from service.fleet import Lookout
from service.reading import Reader
from worker.contract import Phase, Record, Status
from worker.records import Records, connect, connect_async, now


@asynccontextmanager
async def following(url):
    """What `follow` needs first: a client, a hub that runs, a reader."""
    redis, sync = connect_async(url), connect(url)
    reader = Reader(redis, Lookout(sync))
    hub = Hub(redis, reader)
    task = asyncio.create_task(hub.run())
    yield redis, hub, reader
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await redis.aclose()
    sync.close()


def run_to_the_end(records: Records, record: Record) -> None:
    record = records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1, phase=Phase.ENCODING)
    for progress in (0.2, 0.5, 0.9):
        record = records.change(record, (Status.RUNNING,), phase=Phase.DENOISING, progress=progress)
    records.change(record, (Status.RUNNING,), status=Status.SUCCEEDED, progress=1.0, finished_at=now())


def test_a_hundred_and_fifty_follow_one_job_to_its_end(records, record, redis_server):
    async def all_of_them() -> list[list[tuple[Status, float]]]:
        async with following(redis_server.url) as needed:
            began = asyncio.Event()

            async def one(number: int) -> list[tuple[Status, float]]:
                seen = []
                async for _, state in follow(*needed, record.id):
                    seen.append((state.record.status, state.record.progress))
                    if number == 149:
                        began.set()
                return seen

            tasks = [asyncio.create_task(one(number)) for number in range(150)]
            await began.wait()
            await asyncio.to_thread(run_to_the_end, records, record)
            return await asyncio.gather(*tasks)

    for seen in asyncio.run(all_of_them()):
        assert seen[-1] == (Status.SUCCEEDED, 1.0)
        assert [status for status, _ in seen].count(Status.SUCCEEDED) == 1
        progress = [share for status, share in seen if status is Status.RUNNING]
        assert progress == sorted(progress)


def test_the_whole_story_can_be_read_afterwards(records, record, redis_server):
    run_to_the_end(records, record)

    async def read() -> list[tuple[Status, float]]:
        async with following(redis_server.url) as needed:
            states = [seen.record async for _, seen in follow(*needed, record.id, "0-0")]
            return [(state.status, state.progress) for state in states]

    running = [(Status.RUNNING, share) for share in (0.0, 0.2, 0.5, 0.9)]
    assert asyncio.run(read()) == [*running, (Status.SUCCEEDED, 1.0)]


def test_a_deleted_job_ends_the_following(records, record, redis_server):
    async def delete_under_it() -> int:
        async with following(redis_server.url) as needed:
            count = 0
            async for _ in follow(*needed, record.id):
                count += 1
                records.delete(record.id)
            return count

    assert asyncio.run(delete_under_it()) == 1


def test_waiting_ends_with_its_time(record, redis_server):
    async def briefly() -> Record | None:
        async with following(redis_server.url) as needed:
            return await wait(*needed, record.id, 0.5)

    assert asyncio.run(briefly()).status is Status.QUEUED


def test_while_nothing_happens_nothing_is_asked(records, record, redis_server):
    async def idle() -> int:
        async with following(redis_server.url) as needed:
            stream = follow(*needed, record.id)
            await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.3)
            before = records.redis.info("stats")["total_commands_processed"]
            await asyncio.sleep(1)
            asked = records.redis.info("stats")["total_commands_processed"] - before
            waiting.cancel()
            return asked

    assert asyncio.run(idle()) <= 3  # our own question among them


def test_who_reads_slowly_is_caught_up_and_nothing_is_kept_for_them(records, record, redis_server):
    """400 changes while they look away: the stream keeps the last 256 or so, in Redis."""

    async def slowly() -> list[tuple[Status, float]]:
        async with following(redis_server.url) as needed:
            stream = follow(*needed, record.id)
            seen = [(await anext(stream))[1]]

            def work() -> None:
                running = records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1)
                for number in range(400):
                    running = records.change(running, (Status.RUNNING,), progress=number / 400)
                records.change(running, (Status.RUNNING,), status=Status.SUCCEEDED, progress=1.0)

            await asyncio.to_thread(work)
            seen += [state async for _, state in stream]
            return [(state.record.status, state.record.progress) for state in seen]

    seen = asyncio.run(slowly())
    assert len(seen) < 400
    assert seen[-1] == (Status.SUCCEEDED, 1.0)
    assert seen == sorted(seen, key=lambda state: state[1])
