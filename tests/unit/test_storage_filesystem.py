"""Every backend passes the contract; errors, retries and keys behave as promised."""

import os
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.exceptions import GenericError

from storage import filesystem
from storage.config import StorageConfig
from storage.filesystem import Storage, StorageError
from storage.testing import FlakyStorage, StorageContract

S3_URL = os.environ.get("DOLLHOUSE_TEST_S3_URL")


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_FIRST_DELAY_SECONDS", 0.001)


def local(tmp_path: Path, **config: object) -> Storage:
    return Storage(StorageConfig(root=str(tmp_path / "root"), **config))


class TestLocal(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return local(tmp_path)


class TestFileUrl(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return Storage(StorageConfig(root=f"file://{tmp_path}/with space#1"))


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return Storage(StorageConfig(root=f"memory://{uuid.uuid4().hex}/deeper"))


@pytest.mark.skipif(S3_URL is None, reason="DOLLHOUSE_TEST_S3_URL names no bucket")
class TestS3(StorageContract):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        storage = Storage(StorageConfig(root=f"{S3_URL}/{uuid.uuid4().hex}"))
        yield storage
        for key in storage.list(""):
            storage.delete(key)


def test_a_relative_root_means_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Storage(StorageConfig(root="./data")))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).url("key") == str(tmp_path / "data" / "key")


def test_passing_failures_are_retried_and_counted(tmp_path: Path) -> None:
    storage = FlakyStorage(StorageConfig(root=str(tmp_path)), fail_every=2)
    for index in range(4):
        storage.put(f"key{index}", b"content")
        assert storage.get(f"key{index}") == b"content"
    assert storage.num_retries_done >= 4


def test_tries_are_bounded_and_the_error_names_the_url(tmp_path: Path) -> None:
    storage = FlakyStorage(StorageConfig(root=str(tmp_path), num_retries=2), fail_every=1)
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/a/key: ConnectionResetError"):
        storage.put("a/key", b"content")
    assert storage.num_retries_done == 2


def test_what_stays_wrong_is_not_retried(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"a file, not a folder")
    storage = local(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        storage.put("key", b"content")
    assert storage.num_retries_done == 0


def test_a_creation_whose_answer_was_lost_is_adopted(tmp_path: Path) -> None:
    storage = FlakyStorage(StorageConfig(root=str(tmp_path)), fail_every=1, lose_answers=True)
    storage.backend.fail_every = 3  # type: ignore[attr-defined]
    storage.list("")
    storage.list("")
    assert not storage.adopt_or_refuse("key", b"content")  # created by the try whose answer was lost
    assert storage.num_retries_done == 1
    assert storage.get("key") == b"content"


def test_an_unwritable_root_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"a file, not a folder")
    with pytest.raises(ValueError, match=rf"storage.root {tmp_path}/root cannot be written .*: set storage.root to"):
        local(tmp_path).check_writable()


def test_a_scheme_without_exclusive_creation_is_refused_for_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no create-only write"):
        Storage(StorageConfig(root=f"simplecache::file://{tmp_path}")).check_writable()


def test_an_unknown_scheme_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"storage.root nosuch://place cannot be written"):
        Storage(StorageConfig(root="nosuch://place")).check_writable()


def test_errors_and_urls_hold_no_credential(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "wJalrXUtnFEMIK7MDENGbPxRfiCY"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    storage = Storage(StorageConfig(root=f"s3://someone@bucket/prefix?session={secret}", num_retries=0))
    assert storage.url("key") == "s3://bucket/prefix/key"

    class Leaky:
        def read(self, key: str) -> bytes:
            raise OSError(f"GET https://someone:{secret}@host/{key}?signature={secret} failed\n{secret}")

    storage._backend = Leaky()  # type: ignore[assignment]
    with pytest.raises(StorageError) as caught:
        storage.get("key")
    assert secret not in str(caught.value)
    assert "someone" not in str(caught.value)
    assert caught.value.__suppress_context__


class Answering:
    """A backend whose server gives one answer to every listing, in obstore's words."""

    def __init__(self, status: str) -> None:
        self.status = status

    def keys(self, prefix: str) -> list[str]:
        raise GenericError(
            f"Generic S3 error: Error performing GET https://host:9000/bucket?prefix={prefix}&sig=secret in 1ms - "
            f'Server returned non-2xx status code: {self.status}: <?xml version="1.0"?>\n<Error><Code>ItsCode</Code>'
            "<AWSAccessKeyId>a-user</AWSAccessKeyId></Error>\n\nDebug source: Generic { .. }"
        )


@pytest.mark.parametrize(
    ("status", "num_retries"),
    [
        ("403 Forbidden", 0),
        ("404 Not Found", 0),
        ("501 Not Implemented", 0),
        ("429 Too Many Requests", 2),
        ("503 Service Unavailable", 2),
    ],
)
def test_a_servers_answer_is_told_in_short_and_retried_where_it_may_change(status: str, num_retries: int) -> None:
    storage = Storage(StorageConfig(root="s3://bucket/prefix", num_retries=2))
    storage._backend = Answering(status)  # type: ignore[assignment]
    with pytest.raises(StorageError) as caught:
        storage.list("folder")
    assert str(caught.value) == (
        f"cannot list s3://bucket/prefix/folder: https://host:9000 answered GET with {status} (ItsCode)"
    )
    assert storage.num_retries_done == num_retries


def test_a_root_that_is_no_url_of_a_bucket_is_one_clear_error() -> None:
    storage = Storage(StorageConfig(root="s3://bucket/a//b"))
    with pytest.raises(ValueError, match=r"storage.root s3://bucket/a//b cannot be written .*empty path segment"):
        storage.check_writable()
    with pytest.raises(StorageError, match=r"cannot list s3://bucket/a//b/key: .*empty path segment"):
        storage.list("key")
    assert storage.num_retries_done == 0


def test_a_password_in_the_root_is_refused() -> None:
    with pytest.raises(ValueError, match="password"):
        StorageConfig(root="s3://user:secret@bucket")


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd", "a\\b"])
def test_keys_cannot_climb_out_of_the_root(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="is no key below"):
        local(tmp_path).put(key, b"")


KILLED_WRITER = """
import sys
from storage.config import StorageConfig
from storage.filesystem import Storage
storage = Storage(StorageConfig(root=sys.argv[1]))
print("started", flush=True)
for index in range(100_000):
    storage.put(f"put/{index % 3}", bytes([index % 256]) * 1_000_000)
    storage.put_if_absent(f"create/{index}", bytes([index % 256]) * 1_000_000)
"""


def test_a_killed_writer_leaves_whole_objects_only(tmp_path: Path) -> None:
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.03 * attempt)
        process.kill()
        process.communicate()
    storage = Storage(StorageConfig(root=str(tmp_path)))
    keys = storage.list("")
    assert keys
    for key in keys:
        data = storage.get(key)
        assert data == data[:1] * 1_000_000
