"""Where inputs and results are kept: a local folder or any fsspec object store (s3://bucket/prefix). No torch.

Results appear whole or not at all: a local file is written aside and renamed, an object store's put is atomic by
itself.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import fsspec


class Storage:
    """Files under one root, named by relative paths such as ``videos/vid_....mp4``."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._is_local = "file" in self._protocols()
        if self._is_local:
            self._root = str(Path(self._root).absolute())
            Path(self._root).mkdir(parents=True, exist_ok=True)

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def write(self, path: str, data: bytes) -> None:
        """Put ``data`` at ``path``, replacing what is there."""
        if not self._is_local:
            self._fs.pipe_file(self._full(path), data)
            return
        target = Path(self._full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def read(self, path: str) -> bytes:
        """The bytes at ``path``. Raises ``FileNotFoundError``."""
        return bytes(self._fs.cat_file(self._full(path)))

    def exists(self, path: str) -> bool:
        """Whether there is a file at ``path``."""
        return bool(self._fs.exists(self._full(path)))

    def delete(self, path: str) -> None:
        """Remove ``path``; that it is not there is no error."""
        try:
            self._fs.rm_file(self._full(path))
        except FileNotFoundError:
            pass

    def names(self, folder: str) -> list[str]:
        """Names of the files in ``folder``, those that are still being written among them."""
        try:
            paths = self._fs.ls(self._full(folder), detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rsplit("/", 1)[-1] for path in paths]

    def local_path(self, path: str) -> Path | None:
        """Where the file lies on this machine, or None for an object store."""
        return Path(self._full(path)) if self._is_local else None

    def signed_url(self, path: str, seconds: int) -> str:
        """A link that the object store itself answers for a while."""
        return str(self._fs.sign(self._full(path), expiration=seconds))

    def free_bytes(self) -> int | None:
        """Room left on the disk, or None for an object store."""
        return shutil.disk_usage(self._root).free if self._is_local else None
