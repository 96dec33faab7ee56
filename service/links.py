"""Links to videos that work without a key for a while: who has one may read that file, and no other.

A link says until when it works and whose key made it, and both are signed along with the path. Files of an object
store have links that the store itself checks (`worker.storage`).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Mapping
from typing import cast

from redis import Redis

from service.schema import Sign
from service.settings import Settings
from worker.contract import LINK_SECRET_BEFORE_KEY, LINK_SECRET_KEY, LOCAL, Record
from worker.records import now

_HOUR_S = 3600
_LOOK_S = 1.0
_EXPIRES = re.compile(r"[0-9]{1,12}")
_KEY_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_SECRET = re.compile(r"[0-9a-f]{64}")
_SIGNATURE_BYTES = 18
"""144 bits, which are 24 letters without padding."""


def sign(secret: bytes, path: str, expires: int, key_id: str) -> str:
    """The query string that makes a link of ``path``.

    Args:
        secret: from `link_secret`.
        path: of the URL, as the service sees it: without host and without what a proxy puts in front.
        expires: epoch seconds; the link works before then.
        key_id: of whoever is given the link.
    """
    assert _KEY_ID.fullmatch(key_id), key_id
    return f"exp={expires}&key={key_id}&sig={_signature(secret, path, str(expires), key_id)}"


def verify(secret: bytes, path: str, query: Mapping[str, str], now: float, expires_at: float) -> bool:
    """Whether a query string opens ``path`` now. Whatever stands in it, nothing is raised.

    Args:
        secret: from `link_secret`.
        path: of the URL that was asked for.
        query: its parameters ``exp``, ``key`` and ``sig``; others are not looked at.
        now: epoch seconds.
        expires_at: when what lies at the path expires; no link outlives it.
    """
    return is_genuine(secret, path, query) and now < int(query["exp"]) <= expires_at


def is_genuine(secret: bytes, path: str, query: Mapping[str, str]) -> bool:
    """Whether we have signed this for ``path``, whenever that was."""
    expires, key_id, signature = (query.get(name, "") for name in ("exp", "key", "sig"))
    if not (_EXPIRES.fullmatch(expires) and _KEY_ID.fullmatch(key_id)):
        return False
    wanted = _signature(secret, path, expires, key_id)
    # Bytes: a text that is not ASCII cannot be compared in constant time.
    return hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "surrogatepass"))


def _signature(secret: bytes, path: str, expires: str, key_id: str) -> str:
    # GET stands for HEAD too: it asks for less of the same.
    message = f"GET|{path}|{expires}|{key_id}".encode("utf-8", "surrogatepass")
    digest = hmac.new(secret, message, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest[:_SIGNATURE_BYTES]).decode()


def link_secret(redis: Redis) -> bytes:
    """What links are signed with: 32 random bytes that all services of one Redis share, made by the first.

    Raises:
        ValueError: what Redis holds is no such secret.
    """
    redis.set(LINK_SECRET_KEY, secrets.token_hex(32), nx=True)
    found = cast(str, redis.get(LINK_SECRET_KEY))
    if not _SECRET.fullmatch(found):
        raise ValueError(f"{LINK_SECRET_KEY} in Redis is not 64 hexadecimal digits; delete it, and a new one is made")
    return bytes.fromhex(found)


def rotate(redis: Redis, keep_s: int) -> None:
    """Have links signed with a new secret; those of the one before work for ``keep_s`` more, others no longer."""
    before = link_secret(redis)
    with redis.pipeline() as pipeline:
        pipeline.delete(LINK_SECRET_BEFORE_KEY)
        if keep_s:
            pipeline.set(LINK_SECRET_BEFORE_KEY, before.hex(), ex=keep_s)
        pipeline.set(LINK_SECRET_KEY, secrets.token_hex(32))
        pipeline.execute()


class Secrets:
    """What links are signed with now, and were before: both open files.

    They may be changed while we run (`rotate`), so they are looked up again by `refresh`, and when a link comes that
    was signed with none of them: another service may have known sooner.
    """

    def __init__(self, redis: Redis) -> None:
        """``redis`` decodes responses. Raises ``ValueError``: what it holds is no secret."""
        self._redis = redis
        self.refresh()

    def refresh(self) -> None:
        """Look them up. Raises ``RedisError``, ``ValueError``."""
        current, before = link_secret(self._redis), cast(str | None, self._redis.get(LINK_SECRET_BEFORE_KEY))
        self._known = (current, bytes.fromhex(before)) if before else (current,)
        self._looked_at = time.monotonic()

    @property
    def current(self) -> bytes:
        """For `sign`."""
        return self._known[0]

    def verify(self, path: str, query: Mapping[str, str], now: float, expires_at: float) -> bool:
        """As the function does."""
        return any(verify(secret, path, query, now, expires_at) for secret in self._which(path, query))

    def is_genuine(self, path: str, query: Mapping[str, str]) -> bool:
        """Likewise."""
        return bool(self._which(path, query))

    def _which(self, path: str, query: Mapping[str, str]) -> list[bytes]:
        """The secret that this was signed with, if it was."""
        found = [secret for secret in self._known if is_genuine(secret, path, query)]
        if not found and "sig" in query and time.monotonic() > self._looked_at + _LOOK_S:
            self.refresh()
            found = [secret for secret in self._known if is_genuine(secret, path, query)]
        return found


def signer(known: Secrets, settings: Settings) -> Sign:
    """Signs links to files, so that they work without a key: for LINK_HOURS, or until the file is removed."""

    def query(path: str, record: Record) -> str:
        if record.owner == LOCAL and not settings.needs_key:
            return ""
        # The same link for an hour, so that a browser finds in its cache what it has had.
        until = _HOUR_S * math.ceil(now() / _HOUR_S + settings.link_hours)
        return sign(known.current, path, min(until, math.floor(record.expires_at)), record.owner)

    return query
