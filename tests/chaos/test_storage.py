"""The disk is full, the object store is down: what is short costs nothing, what lasts fails clearly."""

import os
import select
import socket
import subprocess
import threading
import time

import pytest

from tests.chaos.stack import PATIENCE_S, chaos_in
from tests.stack import free_port, wait_for
from worker.contract import Status

pytestmark = pytest.mark.chaos


@pytest.fixture
def small_disk(tmp_path_factory):
    """A file system of 1 MB."""
    folder = tmp_path_factory.mktemp("small")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounts a file system: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder) -> None:
    """Leave no room there."""
    with (folder / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(bytes(4096))


def met_by_a_full_disk(chaos, stage: str, disk) -> str:
    """A job during whose ``stage`` there comes to be no room left on that disk."""
    chaos.hold(stage, 1)
    job = chaos.submit(1)
    chaos.reach(stage, 1)
    fill(disk)
    chaos.release(stage, 1)
    return job


def test_a_disk_that_is_full_when_the_video_is_saved_costs_nothing_once_there_is_room(tmp_path, small_disk, picture):
    with chaos_in(tmp_path, picture, STORAGE_URL=str(small_disk)) as chaos:
        chaos.stack.storage = small_disk
        chaos.start_service()
        name = chaos.start_worker("--seconds", "0.05")
        job = met_by_a_full_disk(chaos, "saving", small_disk)
        wait_for(lambda: "No space left" in chaos.log(name), PATIENCE_S, f"the disk to be full:\n{chaos.log(name)}")
        assert not list((small_disk / "videos").iterdir())
        assert chaos.record(job).status is Status.RUNNING
        (small_disk / "ballast").unlink()
        (record,) = chaos.succeeded(job)
        assert (record.worker, record.attempt) == (name, 1)
        chaos.wait_idle()


@pytest.mark.slow
def test_a_disk_that_stays_full_fails_the_job_and_nothing_else(tmp_path, small_disk, picture):
    with chaos_in(tmp_path, picture, STORAGE_URL=str(small_disk)) as chaos:
        chaos.stack.storage = small_disk
        chaos.start_service()
        name = chaos.start_worker("--seconds", "0.05", "--patience", "1")
        job = met_by_a_full_disk(chaos, "saving", small_disk)
        (record,) = chaos.wait_over(job)
        assert (record.status, record.error_code, record.deaths) == (Status.FAILED, "storage_failed", 0)
        assert not list((small_disk / "videos").iterdir())
        (small_disk / "ballast").unlink()
        chaos.succeeded(chaos.submit(2))
        assert chaos.is_ready(name)
        chaos.wait_idle()


@pytest.mark.slow
def test_a_full_disk_under_ffmpeg_fails_the_job_and_nothing_else(tmp_path, small_disk, picture):
    with chaos_in(tmp_path, picture) as chaos:
        chaos.start_service()
        name = chaos.start_worker("--seconds", "0.05", TMPDIR=str(small_disk))
        chaos.succeeded(chaos.submit(3))  # by now it has found where its temporary files go
        job = met_by_a_full_disk(chaos, "denoising", small_disk)
        (record,) = chaos.wait_over(job)
        assert (record.status, record.error_code) == (Status.FAILED, "generation_failed")
        assert not list((chaos.stack.storage / "videos").glob(f"*{job}*"))
        (small_disk / "ballast").unlink()
        assert not list(small_disk.iterdir())
        chaos.succeeded(chaos.submit(2))
        assert chaos.is_ready(name)


class Wire:
    """Between a program and a server on this machine; it can be cut."""

    def __init__(self, to_port: int) -> None:
        self.port = free_port()
        self._to_port = to_port
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        if self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for end in self._open:
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to_port))
            except OSError:
                return
            self._open += [near, far]
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    @staticmethod
    def _carry(near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        try:
            while True:
                for end in select.select([near, far], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    other[end].sendall(data)
        except (OSError, ValueError):
            return
        finally:
            near.close()
            far.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from tests.s3 import S3Server  # not above: other modules take its fixtures as a plugin, which has to come first

    made = S3Server(tmp_path_factory.mktemp("s3"))
    made.start()
    yield made
    made.stop()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 20])
def test_an_object_store_that_is_away_for_a_while_costs_no_job(tmp_path, server, picture, seconds):
    wire = Wire(server.port)
    wire.mend()
    url = server.make_bucket(f"chaos-{seconds}")
    environment = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}", "STORAGE_URL": url}
    with chaos_in(tmp_path, picture, **environment) as chaos:
        chaos.start_service()
        chaos.start_worker("--seconds", "0.05")
        chaos.hold("saving", 1)
        job = chaos.submit(1)
        chaos.reach("saving", 1)
        wire.cut()
        answer = chaos.post(2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        chaos.release("saving", 1)
        time.sleep(seconds)
        wire.mend()
        (record,) = chaos.wait_over(job)
        assert record.status is Status.SUCCEEDED
        names = {entry["Key"] for entry in server.client().list_objects_v2(Bucket=f"chaos-{seconds}")["Contents"]}
        assert names == {f"inputs/{job}.png", *(f"videos/{job}.{suffix}" for suffix in ("mp4", "jpg", "json"))}
        second = chaos.submit(2)
        assert chaos.wait_over(second)[0].status is Status.SUCCEEDED
        wait_for(chaos.is_idle, PATIENCE_S, "nothing to be left")
    wire.cut()
