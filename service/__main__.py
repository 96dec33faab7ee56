"""`python -m service`: the HTTP front end on HOST and PORT. `... keys`: who may use it. `... backup`, `... restore`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import uvicorn
from fastapi import FastAPI
from redis.exceptions import RedisError

from service import backup, links, webhooks
from service.app import create_app
from service.auth import ADMIN_KEY, SCOPES, BadKey, Keys, new_key
from service.settings import Settings, read
from service.wire import HttpProtocol
from worker import logs, tracing
from worker.contract import LOCAL
from worker.records import connect, connect_async
from worker.storage import Storage, StorageError

log = logging.getLogger("service")

_MOST_HOURS = 24 * 365


class Server(uvicorn.Server):
    """One that is told to end closes its port, answers what it has, and lets nobody wait for a job any longer."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after SIGTERM."""
        cast(FastAPI, self.config.app).state.context.hub.end()
        await super().shutdown(sockets)


def main() -> int:
    """Exit code 2: a setting or an argument is wrong."""
    options = _parser().parse_args()
    settings = read()
    try:
        if options.command == "keys":
            return _keys(options, settings)
        if options.command in ("backup", "restore"):
            redis, storage = connect(settings.redis_url, text=False, patience=2), Storage(settings.storage_url)
            without_files = options.command == "backup" and options.without_files
            return backup.run(options.command, redis, storage, options.folder, files=not without_files)
        return _serve(settings)
    except (BadKey, StorageError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RedisError as error:
        sys.stderr.write(f"error: REDIS_URL: Redis does not answer ({error})\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    keys = commands.add_parser("keys", help="API keys").add_subparsers(dest="action", required=True)
    saving = commands.add_parser("backup", help="write all records and files into a folder, while everything runs")
    message = "the storage is backed up by its own means, after this"
    saving.add_argument("--without-files", action="store_true", help=message)
    bringing = commands.add_parser("restore", help="bring them back, into an empty Redis")
    for one in (saving, bringing):
        one.add_argument("folder", type=Path)
    keys.add_parser("new", help="print a key that is kept nowhere, for ADMIN_KEY")
    add = keys.add_parser("add", help="make a key and print it, this once")
    add.add_argument("name", help="whose it is, for whoever reads the list")
    add.add_argument("--scopes", default="generate,read", help=f"of {', '.join(SCOPES)}; default: %(default)s")
    add.add_argument("--max-jobs", type=int, help="jobs under way at once (default: KEY_MAX_JOBS; 0: no limit)")
    add.add_argument("--per-minute", type=int, help="requests for a video (default: KEY_PER_MINUTE; 0: no limit)")
    keys.add_parser("list", help="all keys, without their secrets")
    keys.add_parser("revoke", help="forget a key").add_argument("id")
    rotate = keys.add_parser("rotate", help="print another secret for a key, which keeps its id and its jobs")
    rotate.add_argument("id")
    secret = keys.add_parser("webhook-secret", help="print what a key's webhooks are signed with")
    secret.add_argument("id", help=f"of the key; {LOCAL} for jobs that nobody's key asked for")
    new_secret = keys.add_parser("rotate-webhook-secret", help="print a new one, and sign with both for a while")
    new_secret.add_argument("id", help=f"of the key; {LOCAL} as above")
    for one in (rotate, new_secret):
        message = "how long what was there before works beside it; 0: not at all (default: %(default)s)"
        one.add_argument("--hours", type=_hours, default=24, help=message)
    new_links = keys.add_parser("rotate-link-secret", help="sign links to files with a new secret; old links work on")
    new_links.add_argument("--now", action="store_true", help="old links stop working at once")
    return parser


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 <= hours <= _MOST_HOURS:
        raise argparse.ArgumentTypeError(f"got {text}; wanted 0 to {_MOST_HOURS}")
    return hours


def _serve(settings: Settings) -> int:
    """Serve until SIGTERM."""
    logs.configure("service", settings.log_level, settings.log_format)
    tracing.configure("service")
    Storage(settings.storage_url).check()
    _make_first_key(settings)
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,  # open event streams would hold a stop up for ever
        server_header=False,
        http=HttpProtocol,
    )
    server = Server(config)
    server.run()
    return 0 if server.started else 1


def _make_first_key(settings: Settings) -> None:
    """See to it that there is somebody who may do everything. Raises ``BadKey``: ADMIN_KEY is none."""
    if not settings.needs_key and settings.admin_key is None:
        return
    redis = connect(settings.redis_url)
    keys = Keys(redis)
    if settings.admin_key is not None:
        try:
            keys.add(settings.admin_key.get_secret_value(), ADMIN_KEY, SCOPES)
        except BadKey as error:
            raise BadKey(f"ADMIN_KEY: {error}") from None
    elif not keys.list() and redis.set("flg:keys:first", "1", nx=True, ex=60):
        text = new_key()
        keys.add(text, "first", SCOPES)
        # Once, to whoever started this; the log is where they see it.
        sys.stderr.write(f"this service needs API keys; the first one, with every scope, shown this once:\n  {text}\n")
        sys.stderr.flush()
    redis.close()


def _keys(options: argparse.Namespace, settings: Settings) -> int:
    if options.action == "new":
        sys.stdout.write(new_key() + "\n")
        return 0
    redis = connect(settings.redis_url, patience=2)
    keys = Keys(redis)
    if options.action == "add":
        text = new_key()
        scopes = tuple(scope.strip() for scope in options.scopes.split(",") if scope.strip())
        key = keys.add(text, options.name, scopes, max_jobs=options.max_jobs, per_minute=options.per_minute)
        sys.stderr.write("shown this once; only its hash is kept\n")
        sys.stdout.write(f"{text}\n")
        sys.stderr.write(f"webhooks of its jobs are signed with {key.webhook_secret}\n")
    elif options.action == "list":
        for key in keys.list():
            made = datetime.fromtimestamp(key.created_at, UTC).strftime("%Y-%m-%d")
            sys.stdout.write(f"{key.id}  {made}  {','.join(key.scopes):<28}  {key.name}\n")
    elif options.action == "rotate-link-secret":
        # Links are signed up to the next full hour, and services look for a new secret every half a minute.
        links.rotate(redis, 0 if options.now else int(3600 * (settings.link_hours + 2)))
        sys.stdout.write("links are signed with a new secret\n")
    elif options.action == "rotate-webhook-secret" and options.id == LOCAL:
        sys.stdout.write(f"{webhooks.rotate_local_secret(redis, int(3600 * options.hours))}\n")
    elif options.action == "webhook-secret" and options.id == LOCAL:
        sys.stdout.write(f"{asyncio.run(_local_secret(settings))}\n")
    elif (found := keys.get(options.id)) is None:
        sys.stderr.write(f"error: there is no key {options.id!r}; `python -m service keys list` shows all\n")
        return 2
    elif options.action == "revoke":
        keys.revoke(options.id)
        sys.stdout.write(f"revoked: {found.name}\n")
    elif options.action == "rotate":
        sys.stdout.write(f"{keys.rotate(found, 3600 * options.hours)}\n")
    elif options.action == "rotate-webhook-secret":
        sys.stdout.write(f"{keys.rotate_webhook_secret(found, 3600 * options.hours)}\n")
    else:
        sys.stdout.write(f"{found.webhook_secret}\n")
    return 0


async def _local_secret(settings: Settings) -> str:
    redis = connect_async(settings.redis_url)
    try:
        return await webhooks.local_secret(redis)
    finally:
        await redis.aclose()


if __name__ == "__main__":
    raise SystemExit(main())
