"""API keys: `fl_<id>_<secret>`, kept as SHA-256, each with scopes and limits of its own.

A key's secret is 32 random bytes, so its hash needs no salt and no slow function. The id is no secret: it finds the
hash, and stands in logs and as the owner of jobs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any, cast

from cachetools import TTLCache
from fastapi import Request
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.errors import ApiError
from service.ids import ALPHABET
from service.settings import Settings
from worker.contract import KEYS_KEY, LOCAL, api_key_key
from worker.records import now

ADMIN_KEY = "ADMIN_KEY"
"""Name of the key that the setting gives."""
SCOPES = ("generate", "read", "admin", "metrics")
"""generate: ask for videos, cancel, delete. read: look at one's own. admin: students, workers. metrics: `/metrics`."""

_KEY = re.compile(r"fl_([0-9a-z]{8})_([0-9A-Za-z_-]{43,128})")
_REMEMBERED_S = 1.0
"""A key that was revoked works for so long yet: each request would cost a call to Redis otherwise."""
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="fastlightgen"'}


@dataclass(frozen=True)
class Principal:
    """Who asks."""

    id: str
    """Of the key; ``local`` where none is needed."""
    scopes: frozenset[str]
    max_jobs: int = 0
    """Jobs under way at once; 0 is no limit."""
    per_minute: int = 0
    """Requests for a video in a minute; 0 is no limit."""


@dataclass(frozen=True)
class Key:
    """What is kept of one key."""

    id: str
    name: str
    scopes: tuple[str, ...]
    sha256: str
    created_at: float
    webhook_secret: str
    max_jobs: int | None = None
    """None: as the settings say."""
    per_minute: int | None = None
    sha256_before: str | None = None
    """Of the secret before, which works until ``sha256_before_until``."""
    sha256_before_until: float = 0.0
    webhook_secret_before: str | None = None
    """Signs as well until ``webhook_secret_before_until``."""
    webhook_secret_before_until: float = 0.0

    def is_text(self, text: str, moment: float) -> bool:
        """Whether somebody who sends this has the key."""
        hashes = [self.sha256]
        if self.sha256_before is not None and moment < self.sha256_before_until:
            hashes.append(self.sha256_before)
        sent = _sha256(text).encode()
        # Bytes: a text that is not ASCII cannot be compared in constant time.
        return any(hmac.compare_digest(sent, known.encode()) for known in hashes)

    def webhook_secrets(self, moment: float) -> list[str]:
        """What messages about its jobs are signed with, the present one first."""
        if self.webhook_secret_before is not None and moment < self.webhook_secret_before_until:
            return [self.webhook_secret, self.webhook_secret_before]
        return [self.webhook_secret]

    def to_hash(self) -> dict[str, str]:
        """Fields for HSET."""
        values = {
            "name": self.name,
            "scopes": " ".join(self.scopes),
            "sha256": self.sha256,
            "created_at": str(self.created_at),
            "webhook_secret": self.webhook_secret,
            "max_jobs": self.max_jobs,
            "per_minute": self.per_minute,
            "sha256_before": self.sha256_before,
            "sha256_before_until": self.sha256_before_until or None,
            "webhook_secret_before": self.webhook_secret_before,
            "webhook_secret_before_until": self.webhook_secret_before_until or None,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_hash(cls, key_id: str, values: dict[str, str]) -> Key:
        """Read what HGETALL returned."""
        return cls(
            id=key_id,
            name=values["name"],
            scopes=tuple(values["scopes"].split()),
            sha256=values["sha256"],
            created_at=float(values["created_at"]),
            webhook_secret=values["webhook_secret"],
            max_jobs=int(values["max_jobs"]) if "max_jobs" in values else None,
            per_minute=int(values["per_minute"]) if "per_minute" in values else None,
            sha256_before=values.get("sha256_before"),
            sha256_before_until=float(values.get("sha256_before_until", 0)),
            webhook_secret_before=values.get("webhook_secret_before"),
            webhook_secret_before_until=float(values.get("webhook_secret_before_until", 0)),
        )


class BadKey(ValueError):
    """A key, or what it is to be, that cannot be. The message says why."""


def new_key() -> str:
    """The text of a key that nobody has."""
    return _text("".join(secrets.choice(ALPHABET) for _ in range(8)))


def _text(key_id: str) -> str:
    return f"fl_{key_id}_{secrets.token_urlsafe(32)}"


class Keys:
    """The keys in one Redis, for whoever administers them."""

    def __init__(self, redis: Redis) -> None:
        """``redis`` decodes responses."""
        self._redis = redis

    def add(
        self,
        text: str,
        name: str,
        scopes: tuple[str, ...],
        *,
        max_jobs: int | None = None,
        per_minute: int | None = None,
    ) -> Key:
        """Keep a key, whose text only its owner knows from then on. One that is kept already is renewed.

        Raises:
            BadKey: it is no key as ``new_key`` makes them, or there is no such scope.
        """
        key_id, secret = _parts(text)
        if len(set(secret)) < 12:
            raise BadKey("the key's secret is no random text; make one with `python -m service keys new`")
        if unknown := sorted(set(scopes) - set(SCOPES)):
            raise BadKey(f"scope {unknown[0]!r}: there are {', '.join(SCOPES)}")
        if not scopes:
            raise BadKey(f"a key needs at least one scope of {', '.join(SCOPES)}")
        before = self.get(key_id)
        key = Key(
            id=key_id,
            name=name,
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            sha256=_sha256(text),
            created_at=before.created_at if before else now(),
            webhook_secret=before.webhook_secret if before else new_webhook_secret(),
            max_jobs=max_jobs,
            per_minute=per_minute,
        )
        with self._redis.pipeline() as pipeline:
            pipeline.hset(api_key_key(key_id), mapping=cast(dict[Any, Any], key.to_hash()))
            pipeline.sadd(KEYS_KEY, key_id)
            pipeline.execute()
        return key

    def rotate(self, key: Key, keep_s: float) -> str:
        """Give a key another secret; the present one works for ``keep_s`` more. Returns the new text.

        Its id stays, and with it the jobs that it owns.

        Raises:
            BadKey: it is the one of ADMIN_KEY, whose text services would put back when they start.
        """
        if key.name == ADMIN_KEY:
            raise BadKey(f"key {key.id} is ADMIN_KEY: start the services with another one, then revoke this")
        text = _text(key.id)
        news: dict[Any, Any] = {"sha256": _sha256(text), "sha256_before": key.sha256}
        self._redis.hset(api_key_key(key.id), mapping={**news, "sha256_before_until": now() + keep_s})
        return text

    def rotate_webhook_secret(self, key: Key, keep_s: float) -> str:
        """Sign its webhooks with a new secret, which is returned; and for ``keep_s`` with the one before as well."""
        secret = new_webhook_secret()
        news: dict[Any, Any] = {"webhook_secret": secret, "webhook_secret_before": key.webhook_secret}
        self._redis.hset(api_key_key(key.id), mapping={**news, "webhook_secret_before_until": now() + keep_s})
        return secret

    def get(self, key_id: str) -> Key | None:
        """One of them."""
        values = cast(dict[str, str], self._redis.hgetall(api_key_key(key_id)))
        return Key.from_hash(key_id, values) if values else None

    def list(self) -> list[Key]:
        """All of them, oldest first."""
        found = [self.get(key_id) for key_id in cast(set[str], self._redis.smembers(KEYS_KEY))]
        return sorted((key for key in found if key), key=lambda key: key.created_at)

    def revoke(self, key_id: str) -> bool:
        """Forget a key; false when there is none of this id. Its jobs stay until they have had their time."""
        with self._redis.pipeline() as pipeline:
            pipeline.delete(api_key_key(key_id))
            pipeline.srem(KEYS_KEY, key_id)
            return bool(pipeline.execute()[0])


def new_webhook_secret() -> str:
    """As Standard Webhooks wants it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


class Authenticator:
    """Finds out who asks."""

    def __init__(self, settings: Settings, redis: AsyncRedis) -> None:
        """``redis`` decodes responses."""
        self._settings = settings
        self._redis = redis
        self._known: TTLCache[str, Key] = TTLCache(10_000, _REMEMBERED_S)

    async def principal(self, request: Request) -> Principal | None:
        """Who asks; None for somebody without a key where one is needed.

        Raises:
            ApiError: 401 what came is no key, or none that is known.
        """
        text = _sent_key(request)
        found = _KEY.fullmatch(text or "")
        if not found and not self._settings.needs_key:
            # Some clients cannot be without a key and send any word.
            return Principal(LOCAL, frozenset(SCOPES))
        if text is None:
            return None
        if not found:
            raise _wrong_key()
        key = await self._key(found[1])
        if key is None or not key.is_text(found[0], now()):
            raise _wrong_key()
        return Principal(
            id=key.id,
            scopes=frozenset(key.scopes),
            max_jobs=self._settings.key_max_jobs if key.max_jobs is None else key.max_jobs,
            per_minute=self._settings.key_per_minute if key.per_minute is None else key.per_minute,
        )

    async def _key(self, key_id: str) -> Key | None:
        if (known := self._known.get(key_id)) is not None:
            return known
        values = cast(dict[str, str], await self._redis.hgetall(api_key_key(key_id)))
        if not values:
            return None
        key = self._known[key_id] = Key.from_hash(key_id, values)
        return key

    async def require(self, request: Request, scope: str) -> Principal:
        """Who asks, if it may. Raises ``ApiError`` 401, 403."""
        principal = await self.principal(request)
        if principal is None:
            message = "this needs an API key: send it as `Authorization: Bearer fl_...`"
            raise ApiError(401, "missing_key", message, headers=CHALLENGE)
        if scope not in principal.scopes:
            has = ", ".join(sorted(principal.scopes))
            raise ApiError(403, "scope_missing", f"this needs a key with the scope {scope!r}; yours has {has}")
        return principal


def _sent_key(request: Request) -> str | None:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return request.headers.get("x-api-key") or None


def _wrong_key() -> ApiError:
    message = "the API key is not one of this service's: it is mistyped, or has been revoked"
    return ApiError(401, "wrong_key", message, headers=CHALLENGE)


def _parts(text: str) -> tuple[str, str]:
    found = _KEY.fullmatch(text)
    if not found:
        raise BadKey("this is no key: wanted fl_, 8 letters or digits, _, and at least 43 random characters")
    return found[1], found[2]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
