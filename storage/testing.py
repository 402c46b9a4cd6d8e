"""The contract that every backend must pass, storages that fail on purpose, and small datasets of known content.

Called by tests only: subclass `StorageContract` and give it a fixture `storage`.
"""
# ruff: noqa: D102 (see `Backend`)

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest

from storage.arrays import Array, Flag
from storage.backends import Backend
from storage.config import StorageConfig
from storage.filesystem import Storage, StorageConflictError
from storage.manifest import Dataset
from storage.records import DatasetRecord, ModelIdentity, TextIdentity
from storage.shards import TokenWriter, write_shard

T = TypeVar("T")


class StorageContract:
    """What the rest of this floor relies on. Each test gets an empty `storage`."""

    def test_reads_what_was_written(self, storage: Storage) -> None:
        """Also where the object is empty, and through a view."""
        contents: dict[str, bytes | memoryview] = {"a/b/c": b"content", "a/empty": b"", "a/view": memoryview(b"seen")}
        for key, data in contents.items():
            storage.put(key, data)
            assert storage.get(key) == bytes(data)
            assert storage.exists(key)

    def test_put_replaces(self, storage: Storage) -> None:
        """The last write counts."""
        storage.put("key", b"a long first content")
        storage.put("key", b"second")
        assert storage.get("key") == b"second"

    def test_a_missing_key_is_named(self, storage: Storage) -> None:
        """FileNotFoundError with the URL."""
        with pytest.raises(FileNotFoundError, match="nothing/here"):
            storage.get("nothing/here")
        assert not storage.exists("nothing/here")
        assert not storage.exists("nothing")

    def test_create_keeps_what_is_there(self, storage: Storage) -> None:
        """A second creation is refused and changes nothing."""
        assert storage.put_if_absent("a/key", b"first")
        assert not storage.put_if_absent("a/key", b"second")
        assert storage.get("a/key") == b"first"

    def test_one_of_many_creators_wins(self, storage: Storage) -> None:
        """16 at once, several times; the winner's content is what everybody reads."""
        for attempt in range(4):
            contents = [bytes([writer]) * 10_000 for writer in range(16)]
            start = threading.Barrier(len(contents))

            def create(
                content: bytes, key: str = f"race/{attempt}", start: threading.Barrier = start
            ) -> tuple[bool, bytes]:
                start.wait()
                won = storage.put_if_absent(key, content)
                return won, storage.get(key)

            with ThreadPoolExecutor(len(contents)) as pool:
                results = list(pool.map(create, contents))
            winners = [content for content, (won, _) in zip(contents, results, strict=True) if won]
            assert len(winners) == 1
            assert {seen for _, seen in results} == set(winners)

    def test_adopts_the_same_and_refuses_other_content(self, storage: Storage) -> None:
        """The helper over creation."""
        assert storage.adopt_or_refuse("key", b"content")
        assert not storage.adopt_or_refuse("key", b"content")
        with pytest.raises(StorageConflictError, match="key"):
            storage.adopt_or_refuse("key", b"CONTENT")
        assert storage.get("key") == b"content"

    def test_lists_a_folder_and_nothing_beside_it(self, storage: Storage) -> None:
        """Recursively by key, or one level by name; a prefix of a name is not a folder."""
        for key in ("run/b/2", "run/b/1", "run/a", "runner/x"):
            storage.put(key, b"")
        assert storage.list("run") == ["run/a", "run/b/1", "run/b/2"]
        assert storage.names("run") == ["a", "b"]
        assert storage.list("none") == []
        assert storage.names("none") == []

    def test_hides_what_is_being_written(self, storage: Storage) -> None:
        """Names with a leading dot are no keys."""
        storage.put("folder/.key.0123.partial", b"")
        assert storage.list("folder") == []
        assert storage.names("folder") == []

    def test_delete_can_be_repeated(self, storage: Storage) -> None:
        """And leaves no empty folder behind."""
        storage.put("folder/key", b"")
        storage.delete("folder/key")
        storage.delete("folder/key")
        assert not storage.exists("folder/key")
        assert storage.names("folder") == []

    def test_a_pickled_copy_sees_the_same(self, storage: Storage) -> None:
        """Opened or not, before or after its first use."""
        storage.put("key", b"content")
        copy = pickle.loads(pickle.dumps(storage))  # noqa: S301 (made one line above)
        assert copy.get("key") == b"content"
        assert copy.url("key") == storage.url("key")
        assert copy.bytes_read == len(b"content")

    def test_counts_bytes(self, storage: Storage) -> None:
        """What was moved, not what was asked for."""
        storage.put("key", b"12345")
        storage.put_if_absent("key", b"123")
        storage.get("key")
        assert (storage.bytes_written, storage.bytes_read, storage.num_retries_done) == (5, 5, 0)

    def test_can_be_written(self, storage: Storage) -> None:
        """The check passes, and leaves nothing."""
        storage.check_writable()
        assert storage.list("") == []

    def test_tells_when_a_key_was_written(self, storage: Storage) -> None:
        """Later writes have later times, or the same."""
        storage.put("first", b"")
        storage.put("second", b"")
        assert 0 < storage.modified_seconds("first") <= storage.modified_seconds("second")


class FlakyBackend:
    """A backend whose every n-th request fails in a way that passes; with `lose_answers` after it was carried out."""

    def __init__(self, inner: Backend, fail_every: int, lose_answers: bool = False) -> None:
        self.inner, self.fail_every, self.lose_answers = inner, fail_every, lose_answers
        self.creates_exclusively = inner.creates_exclusively
        self.num_requests = 0

    def read(self, key: str) -> bytes:
        return self._request(lambda: self.inner.read(key))

    def write(self, key: str, data: bytes | memoryview) -> None:
        self._request(lambda: self.inner.write(key, data))

    def create(self, key: str, data: bytes | memoryview) -> bool:
        return self._request(lambda: self.inner.create(key, data))

    def keys(self, prefix: str) -> list[str]:
        return self._request(lambda: self.inner.keys(prefix))

    def names(self, prefix: str) -> list[str]:
        return self._request(lambda: self.inner.names(prefix))

    def exists(self, key: str) -> bool:
        return self._request(lambda: self.inner.exists(key))

    def modified(self, key: str) -> float:
        return self._request(lambda: self.inner.modified(key))

    def remove(self, key: str) -> None:
        self._request(lambda: self.inner.remove(key))

    def _request(self, action: Callable[[], T]) -> T:
        self.num_requests += 1
        fails = self.num_requests % self.fail_every == 0
        if fails and not self.lose_answers:
            raise ConnectionResetError("the connection was reset (on purpose)")
        result = action()
        if fails:
            raise ConnectionResetError("the answer was lost (on purpose)")
        return result


class FlakyStorage(Storage):
    """A storage over a `FlakyBackend`."""

    def __init__(self, config: StorageConfig, fail_every: int, lose_answers: bool = False) -> None:
        super().__init__(config)
        self._backend = FlakyBackend(self._open(), fail_every, lose_answers)


def flip_bit(storage: Storage, key: str, position: int = 0) -> None:
    """Damage an object in place, as a bad disk would."""
    data = bytearray(storage.get(key))
    data[position] ^= 1
    storage.put(key, bytes(data))


def truncate(storage: Storage, key: str, num_bytes: int) -> None:
    """Keep only the first `num_bytes` of an object."""
    storage.put(key, storage.get(key)[:num_bytes])


MODEL = ModelIdentity(name="toy", fingerprint="0" * 64, num_layers=1, d_model=6, dtype="float32", causal=True)
TEXT = TextIdentity(source="toy", fingerprint="1" * 64, description="random numbers")


def toy_record(num_rows: int = 100, **changes: object) -> DatasetRecord:
    """A dataset of 16 rows per chunk and 2 chunks per shard, with two hooks of bfloat16."""
    fields: dict[str, object] = {
        "dataset_id": "toy-1",
        "model": MODEL,
        "text": TEXT,
        "hooks": {"blocks.0.hook_resid_pre": 6, "blocks.0.hook_resid_post": 4},
        "context_tokens": 10,
        "packing": "document",
        "dtype": "bfloat16",
        "num_rows": num_rows,
        "num_documents": -(-num_rows // 10),
        "rows_per_chunk": 16,
        "chunks_per_shard": 2,
    }
    return DatasetRecord.model_validate(fields | changes)


def toy_tokens(record: DatasetRecord) -> dict[str, Array]:
    """Windows of ten rows: BOS first, the last two of every third window padding, one special token at row 5."""
    rows = np.arange(record.num_rows)
    windows, positions = np.divmod(rows, 10)
    flags = np.where(positions == 0, Flag.BOS, 0)
    flags = np.where((windows % 3 == 2) & (positions >= 8), Flag.PADDING, flags)
    flags = np.where(rows == 5, Flag.SPECIAL, flags)
    token_ids = np.random.default_rng(0).integers(0, 50_000, record.num_rows)
    return {"token_ids": token_ids, "positions": positions, "document_ids": windows, "flags": flags}


def toy_activations(record: DatasetRecord, seed: int = 0) -> dict[str, Array]:
    """Hook -> [rows, d]: normal numbers as float32, or the upper halves of their bits."""
    generator = np.random.default_rng(seed)
    values = {hook: generator.normal(1.0, 2.0, (record.num_rows, d)) for hook, d in sorted(record.hooks.items())}
    floats = {hook: array.astype(np.float32) for hook, array in values.items()}
    if record.dtype == "float32":
        return dict(floats)
    return {hook: (array.view(np.uint32) >> 16).astype(np.uint16) for hook, array in floats.items()}


def shard_of(record: DatasetRecord, activations: dict[str, Array], shard: int) -> dict[str, Array]:
    """The rows of one shard."""
    first = shard * record.rows_per_shard
    return {hook: values[first : first + record.rows_per_shard] for hook, values in activations.items()}


def toy_dataset(storage: Storage, record: DatasetRecord, complete: bool = True) -> Dataset:
    """Tokens and record written, and every shard too unless not `complete`."""
    tokens = toy_tokens(record)
    writer = TokenWriter(storage, record.dataset_id, record.rows_per_chunk)
    writer.append(**tokens)
    assert writer.finish() == record.num_rows
    dataset = Dataset.create(storage, record)
    for shard in range(record.num_shards if complete else 0):
        write_shard(dataset, shard, shard_of(record, toy_activations(record), shard), writer="toy")
    return dataset
