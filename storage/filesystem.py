"""The one place that opens a URL: get, put, put-if-absent and list, with bounded retries and counters.

Objects are whole byte strings. Nothing here knows what they mean. Errors name the URL and never a credential.
Called by every other module of this floor.
"""

import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import GenericError, JoinError

from storage.backends import OBJECT_SCHEMES, Backend, FsspecBackend, LocalBackend, ObjectBackend
from storage.config import StorageConfig

NUM_CONNECTIONS = 4
"""Requests that one writer or reader has in flight."""

_FIRST_DELAY_SECONDS = 0.2
_LONGEST_DELAY_SECONDS = 10.0
_TRANSIENT_ERRNOS = {
    errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH,
}  # fmt: skip
_TRANSIENT_STATUSES = {"408", "425", "429", "500", "502", "503", "504"}
# as obstore words it, and what S3, GCS and Azure say in it
_ANSWER = re.compile(r"performing (\w+) (\w+://[^/?\s]+).*?status code: (\d{3})([\w ]*)", re.DOTALL)
_ANSWER_CODE = re.compile(r"<Code>(\w+)</Code>")
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")
_SECRET_VARIABLE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)

T = TypeVar("T")


class StorageError(OSError):
    """A request that failed for good. The message names the operation and the URL."""


class StorageConflictError(ValueError):
    """What is stored under a key is not what the writer has; nothing was overwritten."""


class DamagedDataError(ValueError):
    """What is stored is not what was committed."""


class Storage:
    """A root URL. Cheap to pickle; a copy in another process opens its own connections and counts from zero."""

    def __init__(self, config: StorageConfig) -> None:
        scheme = urlsplit(config.root).scheme if "://" in config.root else "file"
        self.is_local = scheme in ("file", "local")
        """On a disk of this machine, or one mounted here."""
        self.is_memory = scheme == "memory"
        """Seen by this process only."""
        if self.is_local:
            path = config.root.partition("://")[2] if "://" in config.root else config.root
            # absolute, because a worker that unpickles this has another working directory
            config = config.model_copy(update={"root": os.path.abspath(os.path.expanduser(path))})
        self.config = config
        self._backend: Backend | None = None
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.bytes_written = 0
        self.num_retries_done = 0

    def __reduce__(self) -> tuple[type["Storage"], tuple[StorageConfig]]:
        return Storage, (self.config,)

    @property
    def backend(self) -> Backend:
        """The file system, opened at the first use."""
        with self._lock:
            if self._backend is None:
                self._backend = self._open()
            return self._backend

    def url(self, key: str = "") -> str:
        """The URL of a key, without user, password and query, for messages and for other readers."""
        if self.is_local:
            return os.path.join(self.config.root, key) if key else self.config.root
        root = _without_user(self.config.root.partition("?")[0]).rstrip("/")
        return f"{root}/{key}" if key else root

    def get(self, key: str) -> bytes:
        """The whole object; FileNotFoundError where there is none."""
        data = self._attempt("read", key, lambda: self.backend.read(key))
        self._count(num_bytes_read=len(data))
        return data

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace atomically. For what has one writer and may change: states, leases, summaries."""
        self._attempt("write", key, lambda: self.backend.write(key, data))
        self._count(num_bytes_written=len(data))

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Create, and say whether this call did. False also where a first try did, and its answer was lost: compare."""
        created = self._attempt("create", key, lambda: self.backend.create(key, data))
        self._count(num_bytes_written=len(data) if created else 0)
        return created

    def adopt_or_refuse(self, key: str, data: bytes | memoryview) -> bool:
        """Create (True), or adopt an identical object (False); StorageConflictError where another one is there."""
        if self.put_if_absent(key, data):
            return True
        if self.get(key) != data:
            raise StorageConflictError(
                f"{self.url(key)} exists with other content: it was kept, and nothing was written"
            )
        return False

    def names(self, prefix: str) -> list[str]:
        """Names of the files and folders right below `prefix`, sorted."""
        names = self._attempt("list", prefix, lambda: self.backend.names(prefix))
        return sorted({name for name in names if not _is_hidden(name)})

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self._attempt("look up", key, lambda: self.backend.exists(key))

    def modified_seconds(self, key: str) -> float:
        """Unix time of the last write; FileNotFoundError where there is no such object."""
        return self._attempt("look up", key, lambda: self.backend.modified(key))

    def delete(self, key: str) -> None:
        """Delete; nothing happens where the key is gone already."""
        self._attempt("delete", key, lambda: self.backend.remove(key))

    def check_writable(self) -> None:
        """Raise one ValueError, before any work is done, where this root could not keep the promise of this floor."""
        key = f".probe-{secrets.token_hex(8)}"
        advice = "set storage.root to a folder or bucket that you can write, with credentials in the environment"
        try:
            exclusive = self.backend.creates_exclusively
            if exclusive:
                self.put_if_absent(key, b"first")
                exclusive = not self.put_if_absent(key, b"second") and self.get(key) == b"first"
                self.delete(key)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error) if isinstance(error, StorageError) else _reason(error)
            raise ValueError(f"storage.root {self.url()} cannot be written ({reason}): {advice}") from None
        if not exclusive:
            raise ValueError(
                f"storage.root {self.url()} has no create-only write: use a folder, s3://, gs://, az:// or memory://"
            )

    def list(self, prefix: str) -> list[str]:
        """All keys in the folder `prefix`, at any depth, sorted; [] if there is none. Leaves out half-written files."""
        keys = self._attempt("list", prefix, lambda: self.backend.keys(prefix))
        return sorted(key for key in keys if not _is_hidden(key))

    def _open(self) -> Backend:
        scheme = urlsplit(self.config.root).scheme
        if self.is_local:
            return LocalBackend(self.config.root)
        if scheme in OBJECT_SCHEMES:
            return ObjectBackend(self.config.root, self.config.timeout_seconds)
        return FsspecBackend(self.config.root)

    def _attempt(self, verb: str, key: str, action: Callable[[], T]) -> T:
        """Call `action` until it answers, fails in a way that stays, or the tries are used up."""
        if key.startswith("/") or "\\" in key or ".." in key.split("/"):
            raise ValueError(f"{key!r} is no key below {self.url()}")
        for num_tried in range(self.config.num_retries + 1):
            try:
                return action()
            except Exception as error:
                # `from None`: the original message may hold what ours leaves out
                if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(str(error)):
                    raise FileNotFoundError(errno.ENOENT, "there is no such object", self.url(key)) from None
                if num_tried == self.config.num_retries or not _is_transient(error):
                    raise StorageError(f"cannot {verb} {self.url(key)}: {_reason(error)}") from None
            self._count(num_retries=1)
            longest = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**num_tried)
            time.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 (spreads retries; no secret)
        raise AssertionError("unreachable")

    def _count(self, num_bytes_read: int = 0, num_bytes_written: int = 0, num_retries: int = 0) -> None:
        with self._lock:
            self.bytes_read += num_bytes_read
            self.bytes_written += num_bytes_written
            self.num_retries_done += num_retries


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _is_transient(error: Exception) -> bool:
    if isinstance(error, GenericError | JoinError):  # anything from a lost connection to a refused listing
        answer = _ANSWER.search(str(error))
        return answer is None or answer[3] in _TRANSIENT_STATUSES
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS


def _without_user(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


def _reason(error: Exception) -> str:
    """A server's answer, else an error's type and first line; without users, passwords, the environment's secrets."""
    text = str(error).strip()
    if answer := _ANSWER.search(text):
        method, server, status, phrase = answer.groups()
        code = _ANSWER_CODE.search(text)
        text = f"{server} answered {method} with {status}{phrase}" + (f" ({code[1]})" if code else "")
    else:
        text = f"{type(error).__name__}: {text.partition(chr(10))[0]}"
    text = _without_user(text)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text
