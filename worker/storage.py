"""Where inputs and results are kept: a local folder, or an S3 bucket (s3://bucket/prefix). No torch.

Results appear whole or not at all: a local file is written aside and renamed, an object store's put is atomic by
itself. Whatever goes wrong is an ``OSError``, so that callers need not know where the files lie.

    python -m worker.storage check                  # can the place at STORAGE_URL be used?
    python -m worker.storage lifecycle --days 14    # have the bucket itself forget what is older
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

_PATH = re.compile(r"[a-z]+/(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,200}")
_FOLDER = re.compile(r"[a-z]+")
_S3_URL = re.compile(
    r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/(?!\.{1,2}(/|\Z))[\w.-]+)*)/?", re.A
)
_FOLDERS = ("videos", "inputs")
"""What a lifecycle rule covers."""

_CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".json": "application/json",
}
_PIECE_BYTES = 2**24
_DELETE_AT_ONCE = 1000
"""Objects that S3 removes with one call, at most."""
_UNKNOWN_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}


class StorageError(OSError):
    """The storage cannot be used. The message is one line: which setting, what is wrong with it, what to change."""


class Storage:
    """Files in one place, named by relative paths such as ``videos/vid_....mp4``. May be shared by threads.

    Every method raises ``ValueError`` for a path of another form, or one that leads out of the place.
    """

    def __init__(self, url: str, timeout_s: float = 60) -> None:
        """
        Args:
            url: a folder, or ``s3://bucket/prefix``; its endpoint and credentials are those that AWS's own tools use.
            timeout_s: for one call of an object store, repetitions included.

        Raises:
            StorageError: the URL names no such place, or the folder cannot be made.
        """
        self._url = url
        self._place = _Bucket(url, timeout_s) if url.startswith("s3://") else _Folder(url)

    def check(self) -> None:
        """Write, list, read and remove a file. Raises ``StorageError``, which says what does not work."""
        probe = f"inputs/.check-{secrets.token_hex(8)}"
        step = "write"
        try:
            self.write(probe, b"ok")
            step = "list"
            self.names("inputs")
            step = "read"
            self.read(probe)
            step = "delete"
            self.delete_many([probe])
        except (OSError, ValueError) as error:
            raise StorageError(
                f"STORAGE_URL={self._url}: {self._place.advice(step, error)}".replace("\n", " ")
            ) from error

    def write(self, path: str, data: bytes, check: Callable[[], object] = lambda: None) -> None:
        """Put ``data`` at ``path``, replacing what is there.

        ``check`` is called when all is ready but for that; what it raises leaves everything as it was.
        """
        self._place.write(_checked(path), data, check)

    def read(self, path: str) -> bytes:
        """The bytes at ``path``. Raises ``FileNotFoundError``."""
        return self._place.read(_checked(path))

    def put_file(self, path: str, source: Path) -> None:
        """`write` a file of this machine, of any size, in pieces; it takes as long as it takes."""
        self._place.put_file(_checked(path), source)

    def get_file(self, path: str, target: Path) -> None:
        """`read` into a new file of this machine, likewise. Raises ``FileNotFoundError``."""
        self._place.get_file(_checked(path), target)

    def exists(self, path: str) -> bool:
        """Whether there is a file at ``path``."""
        return self._place.exists(_checked(path))

    def delete(self, path: str) -> None:
        """Remove ``path``; that it is not there is no error."""
        self._place.delete(_checked(path))

    def delete_many(self, paths: Sequence[str]) -> None:
        """`delete` each of them; an object store takes 1000 with one call."""
        self._place.delete_many([_checked(path) for path in paths])

    def names(self, folder: str) -> list[str]:
        """Names of the files in ``folder``, those that are still being written among them."""
        if not _FOLDER.fullmatch(folder):
            raise ValueError(f"{folder!r} is no folder of the storage")
        return self._place.names(folder)

    def local_path(self, path: str) -> Path | None:
        """Where the file lies on this machine, or None for an object store."""
        return self._place.local_path(_checked(path))

    def signed_url(self, path: str, seconds: int, *, method: str = "GET") -> str:
        """A link that the object store itself answers for a while, to ``GET`` or ``HEAD`` requests only."""
        return self._place.signed_url(_checked(path), seconds, method)

    def links_origin(self) -> str | None:
        """Scheme and host of all `signed_url`, for whoever says where a page may load from; None for a folder."""
        if isinstance(self._place, _Folder):
            return None
        parts = urlsplit(self.signed_url("videos/any", 1))
        return f"{parts.scheme}://{parts.netloc}"

    def free_bytes(self) -> int | None:
        """Room left on the disk, or None for an object store."""
        return self._place.free_bytes()

    def lifecycle(self, days: int) -> list[dict[str, Any]]:
        """Have the bucket itself remove what is older: a net under the service's own removal, which is on time.

        Rules that others have made for the bucket stay as they are.

        Args:
            days: more than a file is kept for.

        Returns:
            The rules that are ours now; none for a folder, which has no such thing.
        """
        return self._place.lifecycle(days)


def _checked(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is no path of the storage: wanted FOLDER/NAME")
    return path


class _Folder:
    """A folder of this machine, or one that several machines mount."""

    def __init__(self, url: str) -> None:
        if re.match(r"[a-z0-9+]+://", url) and not url.startswith("file://"):
            raise StorageError(f"STORAGE_URL={url}: wanted a folder or s3://bucket/prefix")
        self._root = Path(url.removeprefix("file://")).expanduser().absolute()
        try:
            self._root.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"STORAGE_URL={url}: {self.advice('make', error)}") from error

    def advice(self, step: str, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return f"cannot {step} files there ({reason}); name a folder that service and worker may read and write"

    def local_path(self, path: str) -> Path:
        """Raises ``ValueError`` where a symbolic link leads out of the folder."""
        root = os.path.realpath(self._root)
        full = self._root / path
        if os.path.commonpath((root, os.path.realpath(full))) != root:
            raise ValueError(f"{path!r} leads out of the storage")
        return full

    def write(self, path: str, data: bytes, check: Callable[[], object]) -> None:
        self._write_from(path, io.BytesIO(data), check)

    def put_file(self, path: str, source: Path) -> None:
        with source.open("rb") as file:
            self._write_from(path, file)

    def get_file(self, path: str, target: Path) -> None:
        shutil.copyfile(self.local_path(path), target)

    def _write_from(self, path: str, source: BinaryIO, check: Callable[[], object] = lambda: None) -> None:
        target = self.local_path(path)
        target.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(aside, "xb", opener=_open_private) as file:
                shutil.copyfileobj(source, file, _PIECE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            check()
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        _sync_names(target.parent)

    def read(self, path: str) -> bytes:
        return self.local_path(path).read_bytes()

    def exists(self, path: str) -> bool:
        return self.local_path(path).is_file()

    def delete(self, path: str) -> None:
        self.local_path(path).unlink(missing_ok=True)

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.local_path(folder)) as entries:
                return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def signed_url(self, _path: str, _seconds: int, _method: str) -> str:
        raise AssertionError("a folder has no links of its own: the service serves and signs them (service.links)")

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    def lifecycle(self, _days: int) -> list[dict[str, Any]]:
        return []


def _open_private(path: str, flags: int) -> int:
    """For `open`: nobody but our user and group reads it."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o640)


def _sync_names(folder: Path) -> None:
    """After a power cut the new name is there. Not every file system can; the file itself is safe all the same."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Bucket:
    """Objects of S3, or of a store that speaks it, below one prefix.

    Calls go through s3fs, one for each method here (its own `exists` and `ls` send more, and remember answers).
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = _S3_URL.fullmatch(url)
        if not parts:
            raise StorageError(f"STORAGE_URL={url}: wanted s3://bucket or s3://bucket/prefix")
        try:
            import s3fs  # noqa: F401  # takes its time, and nobody with a folder needs it
        except ImportError:
            raise StorageError(f"STORAGE_URL={url}: s3fs is not installed; install the extra s3") from None
        self._name = parts["bucket"]
        self._prefix = f"{parts['prefix']}/".removeprefix("/")
        self._timeout_s = timeout_s
        self._by_process: dict[int, Any] = {}

    def _filesystem(self) -> Any:
        """This process's own: connections and the thread that serves them do not survive a fork.

        The parent's stays in the dictionary: to drop it would be to close it, and wait for a thread that is not here.
        """
        if os.getpid() not in self._by_process:
            self._by_process[os.getpid()] = _connect()
        return self._by_process[os.getpid()]

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":  # not a file that is missing: nobody may take it for one
                raise StorageError(f"there is no bucket {self._name!r}") from error
            raise
        except TimeoutError as error:
            raise StorageError(f"the object store did not answer within {self._timeout_s:g} s") from error
        except (BotoCoreError, ClientError, HttpError) as error:
            raise StorageError(f"the object store: {error}") from error

    def _run(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of s3fs. ``timeout=None``: only each of the store's answers has to come in time."""
        with self._as_os_errors():
            return getattr(self._filesystem(), method)(*arguments, **{"timeout": self._timeout_s, **named})

    def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Call an operation of S3 on the bucket."""
        answer: dict[str, Any] = self._run("call_s3", operation, Bucket=self._name, **parameters)
        return answer

    def _full(self, path: str) -> str:
        return f"{self._name}/{self._prefix}{path}"

    def advice(self, step: str, error: Exception) -> str:
        from botocore.exceptions import NoCredentialsError, PartialCredentialsError

        code, cause = _code(error), error.__cause__
        if code == "NoSuchBucket":
            return f"there is no bucket {self._name!r} at {self._endpoint()}; make it, or name another"
        if code in _UNKNOWN_CREDENTIALS or isinstance(cause, NoCredentialsError | PartialCredentialsError):
            reason = code or "there are none"
            return (
                f"the store at {self._endpoint()} needs other credentials ({reason}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or give this machine a role"
            )
        if isinstance(error, PermissionError):
            return f"these credentials may not {step} objects; give them what docs/storage.md lists"
        return (
            f"cannot {step} objects at {self._endpoint()} ({error}); set AWS_DEFAULT_REGION to the bucket's region "
            "and, where the store is not Amazon's, AWS_ENDPOINT_URL to its address"
        )

    def _endpoint(self) -> str:
        try:
            return str(self._filesystem().s3.meta.endpoint_url)
        except Exception:  # whatever it is, what goes wrong has a message already
            return "AWS_ENDPOINT_URL"

    def write(self, path: str, data: bytes, check: Callable[[], object]) -> None:
        name = PurePosixPath(path)
        check()
        self._run(
            "pipe_file",
            self._full(path),
            data,
            ContentType=_CONTENT_TYPES.get(name.suffix, "application/octet-stream"),
            ContentDisposition=f'inline; filename="{name.name}"',
            CacheControl="private",
        )

    def put_file(self, path: str, source: Path) -> None:
        self._run("put_file", str(source), self._full(path), timeout=None)

    def get_file(self, path: str, target: Path) -> None:
        self._run("get_file", self._full(path), str(target), timeout=None)

    def read(self, path: str) -> bytes:
        return bytes(self._run("cat_file", self._full(path)))

    def exists(self, path: str) -> bool:
        try:
            self._call("head_object", Key=self._prefix + path)
        except FileNotFoundError:
            return False
        return True

    def delete(self, path: str) -> None:
        self._call("delete_object", Key=self._prefix + path)

    def delete_many(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), _DELETE_AT_ONCE):
            objects = [{"Key": self._prefix + path} for path in paths[start : start + _DELETE_AT_ONCE]]
            answer = self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            if errors := answer.get("Errors"):
                first = errors[0]
                kind = PermissionError if first["Code"] == "AccessDenied" else StorageError
                raise kind(f"{len(errors)} objects were not removed, {first['Key']} among them: {first['Code']}")

    def names(self, folder: str) -> list[str]:
        found: list[str] = []
        place = {"Prefix": f"{self._prefix}{folder}/", "Delimiter": "/"}
        page = self._call("list_objects_v2", **place)
        while True:
            found += [entry["Key"].rsplit("/", 1)[-1] for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return found
            page = self._call("list_objects_v2", ContinuationToken=page["NextContinuationToken"], **place)

    def local_path(self, _path: str) -> None:
        return None

    def signed_url(self, path: str, seconds: int, method: str) -> str:
        operation = {"GET": "get_object", "HEAD": "head_object"}[method]
        return str(self._run("url", self._full(path), expires=seconds, client_method=operation))

    def free_bytes(self) -> None:
        return None

    def lifecycle(self, days: int) -> list[dict[str, Any]]:
        ours = [
            {
                "ID": f"fastlightgen {self._prefix}{folder}",
                "Status": "Enabled",
                "Filter": {"Prefix": f"{self._prefix}{folder}/"},
                "Expiration": {"Days": days},
            }
            for folder in _FOLDERS
        ]
        # S3 has one call, which replaces all rules of the bucket.
        try:
            now = self._call("get_bucket_lifecycle_configuration")
        except FileNotFoundError:
            now = {}
        names = {rule["ID"] for rule in ours}
        others = [rule for rule in now.get("Rules", ()) if rule.get("ID") not in names]
        # Where Amazon says which objects move to cheaper storage, it has to be said again, or it is reset.
        kept = {name: now[name] for name in ("TransitionDefaultMinimumObjectSize",) if name in now}
        rules = {"Rules": others + ours}
        self._call("put_bucket_lifecycle_configuration", LifecycleConfiguration=rules, **kept)
        return ours


def _connect() -> Any:
    """An s3fs that remembers nothing, gives up soon, and asks of a store no more than most of them can."""
    from s3fs import S3FileSystem

    filesystem = S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        max_concurrency=1,  # one file is read with one request, not asked for its size first
        config_kwargs={
            "signature_version": "s3v4",  # links would be signed with version 2, which newer stores refuse
            "connect_timeout": 5,
            "read_timeout": 15,
            "retries": {"mode": "standard", "total_max_attempts": 3},
            # Checksums that S3 does not insist on are unknown to other stores.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    filesystem.retries = 2  # of what fails while a body is read; botocore repeats the rest
    return filesystem


def _code(error: BaseException) -> str:
    """What S3 calls an error, empty for others."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(response := getattr(found, "response", None), dict):
            return str(response.get("Error", {}).get("Code", ""))
        found = found.__cause__
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1: the storage cannot be used, or will not take the rule."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.storage", description="Look after the place at STORAGE_URL."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="write, list, read and remove a file")
    command = commands.add_parser("lifecycle", help="have the bucket itself remove what is older")
    command.add_argument("--days", type=int, required=True, help="more than RETENTION_HOURS: for a week, say 14")
    chosen = parser.parse_args(arguments)
    url = os.environ.get("STORAGE_URL") or "var/storage"
    try:
        storage = Storage(url)
        said = _lifecycle(storage, url, chosen.days) if chosen.command == "lifecycle" else _check(storage, url)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(said)
    return 0


def _check(storage: Storage, url: str) -> str:
    storage.check()
    return f"{url}: files can be written, listed, read and removed\n"


def _lifecycle(storage: Storage, url: str, days: int) -> str:
    if days < 1:
        raise ValueError(f"--days {days}: wanted 1 or more")
    rules = storage.lifecycle(days)
    if not rules:
        return f"{url} is a folder, which has no lifecycle rules: the service alone removes what has expired\n"
    places = " and ".join(rule["Filter"]["Prefix"] for rule in rules)
    return f"{url}: the bucket removes what lies in {places} {days} days after it was written\n"


if __name__ == "__main__":
    raise SystemExit(main())
