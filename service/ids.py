"""Ids of jobs: a prefix for the kind and 26 characters that sort by age."""

from __future__ import annotations

import secrets
import time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, in lower case


def new_id(prefix: str) -> str:
    """The prefix and 26 characters: 48 bits of time in ms, so that ids sort by age, and 80 random bits (as a ULID)."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return f"{prefix}_" + "".join(ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def created_at(job_id: str) -> float:
    """Seconds since the epoch at which ``new_id`` made this id."""
    number = 0
    for character in job_id.rpartition("_")[2]:
        number = number << 5 | max(ALPHABET.find(character), 0)
    return (number >> 80) / 1000
