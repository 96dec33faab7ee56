"""Write behind every image of others the digest that its tag has today: `make pin-images`.

A full version names a release; a digest names one build of it, for all architectures together, so what was tried is
what runs, until this is run again to take security updates in. It changes the Dockerfile and the compose files, asks
the registries through `docker buildx`, and pulls nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", "docker-compose.yml", "deploy/compose/s3.yml")
_IMAGE = re.compile(
    r"(?m)^(?P<before>FROM |\s*image: (?:&[\w-]+ )?)(?P<tag>[\w./-]+:[\w.-]+)(?:@sha256:[0-9a-f]{64})?(?=\s|$)"
)


def pinned(text: str, digest_of: Callable[[str], str]) -> str:
    """The text of a file with the digest of each tag behind it, in place of one that is there."""
    return _IMAGE.sub(lambda found: f"{found['before']}{found['tag']}@{digest_of(found['tag'])}", text)


def digest(tag: str) -> str:
    """What the registry says. Raises ``SystemExit``."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", tag]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {tag}: {getattr(error, 'stderr', None) or error}") from None
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", said):
        raise SystemExit(f"error: {tag}: got {said!r}, wanted a digest")
    print(f"{tag}@{said}")
    return said


def main() -> int:
    """Exit code 1: a registry does not say; nothing is written then."""
    known: dict[str, str] = {}

    def once(tag: str) -> str:
        return known.get(tag) or known.setdefault(tag, digest(tag))

    texts = {ROOT / name: pinned((ROOT / name).read_text(), once) for name in FILES}
    for file, text in texts.items():
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
