"""`python -m service`: the HTTP front end on HOST and PORT."""

from __future__ import annotations

import logging
import sys

import uvicorn
from pydantic import ValidationError

from service.app import create_app
from service.settings import Settings


def main() -> int:
    """Serve until SIGTERM. Exit code 2: a setting is wrong."""
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).upper()
            sys.stderr.write(f"error: {name}={problem['input']}: {problem['msg']}\n")
        return 2
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s service %(levelname)s %(message)s")
    logging.getLogger("uvicorn.access").addFilter(_is_no_probe)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        timeout_graceful_shutdown=5,  # open event streams would hold a stop up for ever
        server_header=False,
    )
    return 0


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Probes come every few seconds and would drown the log."""
    return not any(probe in str(record.args) for probe in ("/livez", "/readyz"))


if __name__ == "__main__":
    raise SystemExit(main())
