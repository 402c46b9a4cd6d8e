"""The file systems under `filesystem.Storage`: local disk by `os`; S3, GCS and Azure by obstore; the rest by fsspec.

One attempt each: no retries, no counting, no wording of errors; a missing object is FileNotFoundError.
Called by `filesystem` (and wrapped by `testing`).
"""
# ruff: noqa: D102 (the methods of a backend are documented once, in `Backend`)

import contextlib
import os
import secrets
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import fsspec
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

OBJECT_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
_PART_BYTES = 64 * 2**20  # parts of an overwriting upload; a creating one is a single request, and so atomic


class Backend(Protocol):
    """What a file system has to offer. Keys are relative to its root and have no leading slash."""

    creates_exclusively: bool
    """Whether `create` really lets one of many writers win."""

    def read(self, key: str) -> bytes:
        """The whole object."""

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace; a reader sees the old or the new object, never a part."""

    def create(self, key: str, data: bytes | memoryview) -> bool:
        """Create, or return False where the key is taken."""

    def keys(self, prefix: str) -> list[str]:
        """All keys in the folder, at any depth, in any order; [] where there is none."""

    def names(self, prefix: str) -> list[str]:
        """Files and folders right below the folder, without their path, in any order."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def modified(self, key: str) -> float:
        """Unix time in seconds of the last write."""

    def remove(self, key: str) -> None:
        """Delete; no error where the key is gone already."""


class LocalBackend:
    """A folder. Every write is synchronised to disk, file and folder, before it returns."""

    creates_exclusively = True

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def read(self, key: str) -> bytes:
        with open(self.root / key, "rb", buffering=0) as file:
            return file.readall()

    def write(self, key: str, data: bytes | memoryview) -> None:
        path = self.root / key
        partial = self._write_partial(path, data)
        try:
            os.replace(partial, path)
        except OSError:
            partial.unlink()
            raise
        _synchronise(path.parent)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        path = self.root / key
        if path.exists():
            return False
        partial = self._write_partial(path, data)
        try:
            os.link(partial, path)  # unlike rename, fails where the name is taken
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        _synchronise(path.parent)
        return True

    def keys(self, prefix: str) -> list[str]:
        folders = os.walk(self.root / prefix)
        return [
            (Path(folder) / name).relative_to(self.root).as_posix() for folder, _, names in folders for name in names
        ]

    def names(self, prefix: str) -> list[str]:
        try:
            return os.listdir(self.root / prefix)
        except FileNotFoundError:
            return []

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def modified(self, key: str) -> float:
        return (self.root / key).stat().st_mtime

    def remove(self, key: str) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # an emptied folder goes with its last file, as in an object store

    def _write_partial(self, path: Path, data: bytes | memoryview) -> Path:
        """Write and synchronise a hidden file in the same folder; the caller gives it its name."""
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        while True:
            _make_folder(path.parent)
            try:
                file = open(partial, "xb")  # noqa: SIM115 (closed below)
            except FileNotFoundError:
                continue  # `remove` took the empty folder away in between
            break
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            partial.unlink()
            raise
        return partial


def _make_folder(path: Path) -> None:
    """Create `path` and its parents, each synchronised into the folder that holds it."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _synchronise(path.parent)


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectBackend:
    """A bucket, or a prefix of one. Credentials and endpoint come from the environment: AWS_*, GOOGLE_*, AZURE_*."""

    creates_exclusively = True

    def __init__(self, root: str, timeout_seconds: float) -> None:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        try:
            self.store = from_url(
                root,
                client_options={
                    "timeout": timedelta(seconds=timeout_seconds),
                    "allow_http": endpoint.startswith("http://"),
                },
                retry_config={"max_retries": 0},  # `filesystem` retries, and counts
            )
        except BaseError as error:  # a root or an environment that obstore cannot read: no try will change that
            raise ValueError(str(error)) from None

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self.store, key).bytes())

    def write(self, key: str, data: bytes | memoryview) -> None:
        obstore.put(self.store, key, data, chunk_size=_PART_BYTES)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        try:
            obstore.put(self.store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # S3 also answers so (409) while another creation is under way that may yet fail
            if not self.exists(key):
                raise ConnectionError("the key is being created by another writer") from None
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        return [entry["path"] for batch in obstore.list(self.store, prefix) for entry in batch]

    def names(self, prefix: str) -> list[str]:
        found = obstore.list_with_delimiter(self.store, prefix)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def exists(self, key: str) -> bool:
        try:
            obstore.head(self.store, key)
        except FileNotFoundError:
            return False
        return True

    def modified(self, key: str) -> float:
        seconds: float = obstore.head(self.store, key)["last_modified"].timestamp()
        return seconds

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self.store, key)


_MEMORY_LOCK = threading.Lock()  # fsspec has one memory file system per process, and so one lock


class FsspecBackend:
    """Any other fsspec URL. Only memory:// can be written: fsspec promises no creation that exactly one writer wins."""

    def __init__(self, root: str) -> None:
        self.fs: Any
        self.fs, self.root = fsspec.url_to_fs(root)
        self.root = self.root.rstrip("/")
        self.creates_exclusively = self.fs.protocol == "memory"

    def read(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(self._path(key)))

    def write(self, key: str, data: bytes | memoryview) -> None:
        with _MEMORY_LOCK:
            self.fs.pipe_file(self._path(key), bytes(data))

    def create(self, key: str, data: bytes | memoryview) -> bool:
        with _MEMORY_LOCK:
            try:
                self.fs.pipe_file(self._path(key), bytes(data), mode="create")
            except FileExistsError:
                return False
        return True

    def keys(self, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        with _MEMORY_LOCK:
            return [path.removeprefix(self.root).lstrip("/") for path in self.fs.find(self._path(prefix))]

    def names(self, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        with _MEMORY_LOCK:
            try:
                paths = self.fs.ls(self._path(prefix), detail=False)
            except FileNotFoundError:
                return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def exists(self, key: str) -> bool:
        return bool(self.fs.isfile(self._path(key)))

    def modified(self, key: str) -> float:
        return float(self.fs.modified(self._path(key)).timestamp())

    def remove(self, key: str) -> None:
        with _MEMORY_LOCK, contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"
