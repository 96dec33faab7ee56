"""`python -m service`: the HTTP front end on HOST and PORT; `python -m service keys ...`: who may use it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from datetime import UTC, datetime

import uvicorn
from redis.exceptions import RedisError

from service import webhooks
from service.app import create_app
from service.auth import SCOPES, BadKey, Keys, new_key
from service.settings import Settings, read
from service.wire import HttpProtocol
from worker import logs, tracing
from worker.contract import LOCAL
from worker.records import connect, connect_async
from worker.storage import Storage, StorageError

log = logging.getLogger("service")


def main() -> int:
    """Exit code 2: a setting or an argument is wrong."""
    options = _parser().parse_args()
    settings = read()
    try:
        if options.command == "keys":
            return _keys(options, settings)
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
    keys.add_parser("new", help="print a key that is kept nowhere, for ADMIN_KEY")
    add = keys.add_parser("add", help="make a key and print it, this once")
    add.add_argument("name", help="whose it is, for whoever reads the list")
    add.add_argument("--scopes", default="generate,read", help=f"of {', '.join(SCOPES)}; default: %(default)s")
    add.add_argument("--max-jobs", type=int, help="jobs under way at once (default: KEY_MAX_JOBS; 0: no limit)")
    add.add_argument("--per-minute", type=int, help="requests for a video (default: KEY_PER_MINUTE; 0: no limit)")
    keys.add_parser("list", help="all keys, without their secrets")
    keys.add_parser("revoke", help="forget a key").add_argument("id")
    secret = keys.add_parser("webhook-secret", help="print what a key's webhooks are signed with")
    secret.add_argument("id", help=f"of the key; {LOCAL} for jobs that nobody's key asked for")
    return parser


def _serve(settings: Settings) -> int:
    """Serve until SIGTERM."""
    logs.configure("service", settings.log_level, settings.log_format)
    tracing.configure("service")
    Storage(settings.storage_url).check()
    _make_first_key(settings)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,  # open event streams would hold a stop up for ever
        server_header=False,
        http=HttpProtocol,
    )
    return 0


def _make_first_key(settings: Settings) -> None:
    """See to it that there is somebody who may do everything. Raises ``BadKey``: ADMIN_KEY is none."""
    if not settings.needs_key and settings.admin_key is None:
        return
    redis = connect(settings.redis_url)
    keys = Keys(redis)
    if settings.admin_key is not None:
        try:
            keys.add(settings.admin_key.get_secret_value(), "ADMIN_KEY", SCOPES)
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
    elif options.action == "webhook-secret" and options.id == LOCAL:
        sys.stdout.write(f"{asyncio.run(_local_secret(settings))}\n")
    elif (found := keys.get(options.id)) is None:
        sys.stderr.write(f"error: there is no key {options.id!r}; `python -m service keys list` shows all\n")
        return 2
    elif options.action == "revoke":
        keys.revoke(options.id)
        sys.stdout.write(f"revoked: {found.name}\n")
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
