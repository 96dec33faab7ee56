"""The service's settings, read from the environment once, at start. Bad values are refused there."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from pydantic import Field, HttpUrl, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is the environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    redis_url: str = "redis://127.0.0.1:6379/0"
    storage_url: str = "var/storage"
    public_url: HttpUrl | None = None
    """Where clients reach the service, when that is not where the request came in (a proxy); links begin with it."""
    max_queued: int = Field(default=100, ge=1)
    """Jobs waiting at once; more are refused with 503 and Retry-After."""
    retention_hours: float = Field(default=168, gt=0)
    """How long a video is kept."""
    max_body_bytes: int = Field(default=20 * 2**20, ge=1024)
    max_pixels: int = Field(default=24_000_000, ge=64 * 64)
    """Of an input image; checked before it is decoded."""
    min_free_bytes: int = Field(default=200 * 2**20, ge=0)
    """Below this much free disk no job is taken."""
    job_timeout_s: int = Field(default=1800, ge=1)
    examples_dir: Path = Path(__file__).resolve().parent.parent / "models" / "examples"

    @field_validator("public_url", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or None

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine reaches the service."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False
