"""A Redis, its replica and three Sentinels on free loopback ports, to be broken by a test."""

from __future__ import annotations

import hashlib
import re
import secrets
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from tests.stack import ROOT, free_port, redis_binary, stop, wait_for

MASTER = "mymaster"
DOWN_AFTER_MS = 4000
"""Longer than the service waits for a Redis."""


@dataclass
class Sentinels:
    """``url`` names the three. They and the replica have the users of deploy/redis/sentinel.acl.template."""

    folder: Path
    password: str = field(default_factory=lambda: secrets.token_hex(8))
    sentinel_password: str = field(default_factory=lambda: secrets.token_hex(8))
    ports: list[int] = field(default_factory=lambda: [free_port(), free_port()])
    sentinel_ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(3)])
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://:{self.password}@{hosts}/{MASTER}/0?sentinel_password={self.sentinel_password}"

    def start(self) -> None:
        first, second = self.ports
        self.start_redis(first)
        self.start_redis(second, f"replicaof 127.0.0.1 {first}\n")
        for port in self.sentinel_ports:
            self._start(
                port,
                f"requirepass {self.sentinel_password}\nsentinel sentinel-pass {self.sentinel_password}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {first} 2\n"
                f"sentinel auth-user {MASTER} sentinel\nsentinel auth-pass {MASTER} {self.sentinel_password}\n"
                f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}\n"
                f"sentinel failover-timeout {MASTER} 6000\nsentinel parallel-syncs {MASTER} 1\n",
                "--sentinel",
            )
        wait_for(lambda: all(self._know_each_other(port) for port in self.sentinel_ports), 30, "the Sentinels")
        wait_for(self.has_replica, 30, "the replica")

    def start_redis(self, port: int, more: str = "") -> None:
        self._start(
            port,
            f"requirepass {self.password}\nmasteruser replica\nmasterauth {self.password}\n{self._users()}"
            f'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n{more}',
        )
        wait_for(lambda: self._info(port), 20, "Redis to answer")

    def kill_master(self) -> int:
        """`kill -9`; its port."""
        port = self.master()
        self.processes[port].kill()
        self.processes[port].wait()
        return port

    def master(self) -> int:
        """The port of who says that it is the master, as the first Sentinel that answers has it."""
        for port in self.sentinel_ports:
            with self._client(port, self.sentinel_password) as client:
                try:
                    return int(client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", MASTER)[1])
                except RedisError:
                    continue
        raise AssertionError("no Sentinel answers")

    def has_replica(self) -> bool:
        """Whether a change of master would lose nothing: until then it would lose everything."""
        replica = self._info(self.master()).get("slave0")
        return isinstance(replica, dict) and replica["state"] == "online"

    def stop(self) -> None:
        for process in self.processes.values():
            stop(process)

    def _users(self) -> str:
        text = (ROOT / "deploy" / "redis" / "sentinel.acl.template").read_text()
        passwords = {"REPLICA": self.password, "SENTINEL": self.sentinel_password}
        return re.sub(r"@(\w+)_SHA256@", lambda name: hashlib.sha256(passwords[name[1]].encode()).hexdigest(), text)

    def _start(self, port: int, text: str, *arguments: str) -> None:
        folder = self.folder / str(port)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "redis.conf"  # Redis and Sentinels write down in it what they have become
        if not config.exists():
            config.write_text(f"bind 127.0.0.1\nport {port}\ndir {folder}\n{text}")
        with (folder / "log").open("ab") as log:
            command = [redis_binary(), str(config), *arguments]
            self.processes[port] = subprocess.Popen(command, stdout=log, stderr=log)

    def _client(self, port: int, password: str) -> Redis:
        return Redis(port=port, password=password, decode_responses=True, socket_timeout=2)

    def _info(self, port: int) -> dict[str, object]:
        with self._client(port, self.password) as client:
            try:
                return client.info("replication")
            except RedisError:
                return {}

    def _know_each_other(self, port: int) -> bool:
        with self._client(port, self.sentinel_password) as client:
            try:
                state = client.sentinel_master(MASTER)
            except RedisError:
                return False
        return state["num-other-sentinels"] == 2 and state["num-slaves"] == 1
