"""The service's settings, read from the environment once, at start. Bad values are refused there."""

from __future__ import annotations

import sys
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, HttpUrl, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.connection import parse, redacted

Hosts = Annotated[frozenset[str], NoDecode]
"""Between commas: ``host`` or ``host:port``."""


class Settings(BaseSettings):
    """Each field is the environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    redis_url: str = "redis://127.0.0.1:6379/0"
    storage_url: str = "var/storage"
    public_url: HttpUrl | None = None
    """Where clients reach the service, when that is not where the request came in (a proxy); links begin with it."""

    auth: Literal["auto", "on", "off"] = "auto"
    """Whether a request needs an API key. auto: unless the service listens on a loopback address only."""
    admin_key: SecretStr | None = None
    """A key with every scope, made elsewhere (`python -m service keys new`) and handed to each replica."""
    key_max_jobs: int = Field(default=20, ge=0)
    """Jobs of one key that may be under way at once, where the key itself does not say; 0 is no limit."""
    key_per_minute: int = Field(default=120, ge=0)
    """Requests for a video that one key may send in a minute, likewise."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web pages of these origins may call the API, with a key that they hold."""

    max_queued: int = Field(default=100, ge=1)
    """Jobs waiting at once; more are refused with 503 and Retry-After."""
    max_wait_s: float = Field(default=1800, gt=0)
    """Seconds that the jobs at hand are expected to take; while it is more, new ones are refused with 503."""
    retention_hours: float = Field(default=168, gt=0)
    """How long a video is kept."""
    link_hours: float = Field(default=24, gt=0)
    """How long a link to a video works without a key."""
    max_body_bytes: int = Field(default=20 * 2**20, ge=1024)
    max_pixels: int = Field(default=24_000_000, ge=64 * 64)
    """Of an input image; checked before it is decoded."""
    url_images: bool = False
    """Whether an image may be given as a URL that the service fetches."""
    private_hosts: Hosts = frozenset()
    """Hosts of private addresses that images may be fetched from and webhooks sent to; all others have to be public."""
    min_free_bytes: int = Field(default=200 * 2**20, ge=0)
    """Below this much free disk no job is taken."""
    job_timeout_s: int = Field(default=1800, ge=1)
    examples_dir: Path = Path(__file__).resolve().parent.parent / "models" / "examples"

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"

    @field_validator("redis_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        parse(value)
        return value

    @field_validator("public_url", "admin_key", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or None

    @field_validator("private_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _no_wildcard(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("* would let every web page in; name the origins, such as https://app.example.org")
        return value

    @model_validator(mode="after")
    def _open_to_this_machine_only(self) -> Settings:
        if self.auth == "off" and not self.is_local:
            raise ValueError(f"AUTH=off with HOST={self.host} would let everybody in; it needs a loopback address")
        return self

    @cached_property
    def is_local(self) -> bool:
        """Whether nobody but this machine reaches the service."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False

    @cached_property
    def needs_key(self) -> bool:
        """Whether a request without an API key is refused."""
        return self.auth == "on" or (self.auth == "auto" and not self.is_local)


def read() -> Settings:
    """The settings of this process; ends it with exit code 2 and a line for each value that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).upper()
            is_secret = name in ("ADMIN_KEY", "")  # or all settings together
            got = "" if is_secret else f"={redacted(str(problem['input']))}"
            sys.stderr.write(f"error: {name}{got}: {problem['msg']}\n")
        raise SystemExit(2) from None
