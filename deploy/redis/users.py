"""Redis users with new passwords: `python deploy/redis/users.py FOLDER [--redis redis:6379]`; nothing to install.

Fills users.acl.template and writes, for this user's eyes only, into FOLDER: `users.acl` for redis-server's `aclfile`
(it has hashes only), and `service.url`, `worker.url`, `admin.url`, each the REDIS_URL of one user. Passwords that are
there already are kept. `--sentinel` adds those of sentinel.acl.template: `replica.url`, `sentinel.url`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = Path(__file__).parent
USERS = ("service", "worker", "admin")
SENTINEL_USERS = ("replica", "sentinel")


def fill(template: str, passwords: dict[str, str]) -> str:
    """The template with the hash of each user's password in its place."""
    for user, password in passwords.items():
        template = template.replace(f"@{user.upper()}_SHA256@", hashlib.sha256(password.encode()).hexdigest())
    if left := re.search(r"@[A-Z_]+@", template):
        raise ValueError(f"no password was given for {left[0]}")
    return template


def write(folder: Path, address: str, *, sentinel: bool = False) -> tuple[str, ...]:
    """The files for a Redis at ``address`` (`host:port`); the names of its users."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    users = USERS + (SENTINEL_USERS if sentinel else ())
    template = (FOLDER / "users.acl.template").read_text()
    if sentinel:
        template += (FOLDER / "sentinel.acl.template").read_text()
    passwords = {}
    for user in users:
        file = folder / f"{user}.url"
        kept = urlsplit(file.read_text().strip()).password if file.exists() else None
        passwords[user] = kept or secrets.token_hex(32)
        _write_private(file, f"redis://{user}:{passwords[user]}@{address}/0\n")
    _write_private(folder / "users.acl", fill(template, passwords))
    return users


def _write_private(file: Path, text: str) -> None:
    file.touch(mode=0o600)
    file.chmod(0o600)  # also one that was there
    file.write_text(text)


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--redis", default="127.0.0.1:6379", help="where Redis answers (default: %(default)s)")
    parser.add_argument("--sentinel", action="store_true", help="with the users that replicas and Sentinels need")
    options = parser.parse_args()
    users = write(options.folder, options.redis, sentinel=options.sentinel)
    sys.stdout.write(f"{options.folder}: users.acl, {', '.join(f'{user}.url' for user in users)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
