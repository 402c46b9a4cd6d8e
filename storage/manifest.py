"""A dataset and its commits: the only way to what is complete, checksummed and never changes.

A shard's rows exist for readers once its commit does. Reads check length and checksum against the commit.
Called by `stream`, by `workers` (harvesting, evaluating, exploring) and by the controller, which asks what is missing.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from storage import layout
from storage.arrays import TOKEN_ARRAYS, Array, array_specs, create_arrays, decode_chunk, describe_chunk
from storage.filesystem import NUM_CONNECTIONS, DamagedDataError, Storage, StorageConflictError
from storage.moments import merge_moments
from storage.records import DatasetRecord, Moments, ShardCommit


class Dataset:
    """An existing dataset. Made by `create` or `open`; pickles with what it has read of the commits."""

    def __init__(self, storage: Storage, record: DatasetRecord) -> None:
        self.storage = storage
        self.record = record
        self.digest = record.digest()
        self.specs = array_specs(record)
        self._commits: dict[int, ShardCommit] = {}

    @classmethod
    def create(cls, storage: Storage, record: DatasetRecord) -> "Dataset":
        """Write the arrays' metadata, then dataset.json; adopts an identical dataset, StorageConflictError on another.

        The token arrays must be written before: from here on harvesters may start.
        """
        key = layout.dataset_record(record.dataset_id)
        if storage.exists(key) and storage.get(key) != record.to_bytes():
            raise StorageConflictError(f"{storage.url(key)} exists and is another dataset: nothing was written")
        create_arrays(storage, record)
        storage.adopt_or_refuse(key, record.to_bytes())
        return cls(storage, record)

    @classmethod
    def open(cls, storage: Storage, dataset_id: str) -> "Dataset":
        """An existing dataset, complete or not; FileNotFoundError where there is none."""
        key = layout.dataset_record(dataset_id)
        record = DatasetRecord.from_bytes(storage.get(key), storage.url(key))
        if record.dataset_id != dataset_id:
            raise DamagedDataError(
                f"{storage.url(key)} says that it is {record.dataset_id!r}: a dataset's folder cannot be renamed"
            )
        return cls(storage, record)

    @classmethod
    def find(cls, storage: Storage, dataset_id: str) -> "Dataset | None":
        """The dataset, or None where there is none."""
        return cls.open(storage, dataset_id) if storage.exists(layout.dataset_record(dataset_id)) else None

    def commits(self) -> dict[int, ShardCommit]:
        """Shard -> commit, in order of shards. Each commit is read once; looks for new ones until all are there."""
        if not self._has_all():
            keys = self.storage.list(layout.commits(self.record.dataset_id))
            new = [shard for shard in map(layout.shard_of, keys) if shard not in self._commits]
            with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
                self._commits |= dict(zip(new, pool.map(self._read_commit, new), strict=True))
            self._commits = dict(sorted(self._commits.items()))
        return dict(self._commits)

    def missing_shards(self) -> list[int]:
        """Shards without a commit, ascending."""
        commits = self.commits()
        return [shard for shard in range(self.record.num_shards) if shard not in commits]

    @property
    def is_complete(self) -> bool:
        """Whether every shard is committed."""
        return not self.missing_shards()

    def manifest_digest(self) -> str:
        """Hexadecimal SHA-256 over the digests of the commits that are visible now, in order of shards."""
        return hashlib.sha256("".join(commit.digest() for commit in self.commits().values()).encode()).hexdigest()

    def moments(self, hook: str) -> Moments:
        """Statistics of a hook over the unflagged rows of all committed shards."""
        return merge_moments([commit.moments[hook] for commit in self.commits().values()])

    def read_chunk(self, array: str, chunk: int, verify: bool | None = None) -> Array:
        """The committed rows of one chunk: [rows] or [rows, d], read-only; bfloat16 as uint16 bits.

        `verify` defaults to the storage's `verify_reads`; the length is checked always. Raises DamagedDataError, naming
        the URL, where the object is missing or not what was committed.
        """
        shard, index = divmod(chunk, self.record.chunks_per_shard)
        expected = self._commit(shard).chunks[array][index]
        url = self.storage.url(self._chunk_key(array, chunk))
        try:
            data = self.stored_chunk(array, chunk)
        except FileNotFoundError as error:
            raise DamagedDataError(
                f"{url} is missing, though its shard is committed: restore it, or delete the dataset"
            ) from error
        if len(data) != expected.num_bytes:
            raise DamagedDataError(f"{url} is damaged: it has {len(data)} bytes, {expected.num_bytes} were committed")
        check = self.storage.config.verify_reads if verify is None else verify
        if check and describe_chunk(data) != expected:
            raise DamagedDataError(
                f"{url} is damaged: its checksum is not the committed one: restore it, or delete the dataset"
            )
        return self._decode(array, chunk, data)

    def read_tokens(self, shard: int) -> dict[str, Array]:
        """The token arrays of a committed shard: name -> [rows]."""
        return self._read_tokens(shard, committed=True)

    def read_uncommitted_tokens(self, shard: int) -> dict[str, Array]:
        """The token arrays of a shard that is to be harvested: name -> [rows], checked by length only."""
        return self._read_tokens(shard, committed=False)

    def stored_commit(self, shard: int) -> ShardCommit | None:
        """The shard's commit if there is one, looked up now."""
        try:
            return self._commits.get(shard) or self._read_commit(shard)
        except FileNotFoundError:
            return None

    def stored_chunk(self, array: str, chunk: int) -> bytes:
        """A chunk as it is stored, padding included, committed or not."""
        return self.storage.get(self._chunk_key(array, chunk))

    def _read_tokens(self, shard: int, committed: bool) -> dict[str, Array]:
        read = self.read_chunk if committed else self._read_uncommitted
        chunks = self.record.chunks_of(shard)
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            parts = {name: list(pool.map(partial(read, name), chunks)) for name in TOKEN_ARRAYS}
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _read_uncommitted(self, array: str, chunk: int) -> Array:
        return self._decode(array, chunk, self.stored_chunk(array, chunk))

    def _decode(self, array: str, chunk: int, data: bytes) -> Array:
        where = self.storage.url(self._chunk_key(array, chunk))
        values = decode_chunk(data, self.specs[array], self.record.rows_per_chunk, where)
        return values[: self.record.rows_in_chunk(chunk)]

    def _chunk_key(self, array: str, chunk: int) -> str:
        if array not in self.specs:
            raise ValueError(f"dataset {self.record.dataset_id} has no array {array!r}: it has {', '.join(self.specs)}")
        return layout.chunk(self.record.dataset_id, array, chunk, self.specs[array].ndim)

    def _commit(self, shard: int) -> ShardCommit:
        commit = self._commits.get(shard) or self.commits().get(shard)
        if commit is None:
            raise ValueError(f"shard {shard} of dataset {self.record.dataset_id} is not committed: harvest it first")
        return commit

    def _has_all(self) -> bool:
        return len(self._commits) == self.record.num_shards

    def _read_commit(self, shard: int) -> ShardCommit:
        key = layout.commit(self.record.dataset_id, shard)
        url = self.storage.url(key)
        commit = ShardCommit.from_bytes(self.storage.get(key), url)
        chunks = {name: len(parts) for name, parts in commit.chunks.items()}
        if commit.dataset_digest != self.digest or commit.shard != shard:
            raise DamagedDataError(f"{url} belongs to another dataset or shard: it was copied or renamed")
        if chunks != dict.fromkeys(self.specs, len(self.record.chunks_of(shard))):
            raise DamagedDataError(f"{url} does not list every chunk of its shard")
        return commit


def list_datasets(storage: Storage) -> list[str]:
    """Ids of the datasets under this root, complete or not, sorted."""
    return [name for name in storage.names(layout.DATASETS) if storage.exists(layout.dataset_record(name))]
