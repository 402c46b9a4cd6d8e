"""Write one activation shard: its chunks, their checksums and statistics, and the commit that makes it visible.

Every object is create-only. A writer that finds a chunk adopts it: an earlier attempt computed the same rows, but
perhaps on another machine, so equality of bits is not asked; the commit records the checksum of what is stored. Whoever
died or still lives, chunks never change and one commit wins.
Called by `workers.harvesting`: `TokenWriter` for all rows first, then `write_shard` for one shard after the other.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from storage import layout
from storage.arrays import (
    TOKEN_ARRAYS,
    Array,
    Flag,
    create_arrays,
    decode_chunk,
    describe_chunk,
    encode_chunk,
    hook_spec,
)
from storage.filesystem import NUM_CONNECTIONS, Storage, StorageConflictError
from storage.moments import merge_moments, moments_of
from storage.records import ChunkRecord, DatasetRecord, Moments, ShardCommit

__all__ = ["Flag", "TokenWriter", "create_arrays", "decode_chunk", "encode_chunk", "merge_moments", "write_shard"]


class TokenWriter:
    """Writes the token arrays of a dataset, chunk by chunk, before its number of rows is known.

    A second run over the same text adopts the chunks of the first; other text under the same id is refused.
    """

    def __init__(self, storage: Storage, dataset_id: str, rows_per_chunk: int) -> None:
        self.storage = storage
        self.dataset_id = dataset_id
        self.rows_per_chunk = rows_per_chunk
        self.num_rows = 0
        self._num_chunks = 0
        self._pending: dict[str, list[Array]] = {name: [] for name in TOKEN_ARRAYS}

    def append(self, token_ids: Array, positions: Array, document_ids: Array, flags: Array) -> None:
        """Add rows: four vectors of integers of one length; `flags` holds bits of `Flag`."""
        columns = dict(zip(TOKEN_ARRAYS, (token_ids, positions, document_ids, flags), strict=True))
        for name, values in columns.items():
            if values.shape != (len(token_ids),):
                raise ValueError(
                    f"{name} has shape {values.shape}, token_ids {token_ids.shape}: give vectors of one length"
                )
            stored = values.astype(TOKEN_ARRAYS[name].dtype)
            if not np.array_equal(stored, values):
                raise ValueError(f"{name} holds a value that {stored.dtype} cannot: it must be an integer in range")
            self._pending[name].append(stored)
        self.num_rows += len(token_ids)
        while self.num_rows - self._num_chunks * self.rows_per_chunk >= self.rows_per_chunk:
            self._write_chunk()

    def finish(self) -> int:
        """Write what is left, padded to a chunk; returns the number of rows."""
        if self.num_rows > self._num_chunks * self.rows_per_chunk:
            self._write_chunk()
        return self.num_rows

    def _write_chunk(self) -> None:
        chunk = {}
        for name, parts in self._pending.items():
            joined = np.concatenate(parts)
            chunk[name] = joined[: self.rows_per_chunk]
            self._pending[name] = [joined[self.rows_per_chunk :]]
        with ThreadPoolExecutor(len(chunk)) as pool:
            list(pool.map(self._write_array, chunk, chunk.values()))
        self._num_chunks += 1

    def _write_array(self, name: str, values: Array) -> None:
        key = layout.chunk(self.dataset_id, name, self._num_chunks, ndim=1)
        self.storage.adopt_or_refuse(key, encode_chunk(values, TOKEN_ARRAYS[name], self.rows_per_chunk))


class OpenDataset(Protocol):
    """What writing needs of `manifest.Dataset`."""

    storage: Storage
    record: DatasetRecord

    def stored_commit(self, shard: int) -> ShardCommit | None:
        """The shard's commit, if there is one."""

    def stored_chunk(self, array: str, chunk: int) -> bytes:
        """A chunk as it is stored, committed or not."""


def write_shard(dataset: OpenDataset, shard: int, activations: Mapping[str, Array], writer: str) -> ShardCommit:
    """Write the chunks of a shard and commit it; returns the commit that is stored, ours or an earlier one.

    `activations`: for each hook of the record [rows in the shard, d], float32, or uint16 bits for a bfloat16 dataset.
    `writer` says for people who wrote it. Raises ValueError on a wrong shape, or a number in an
    unflagged row that is not finite.
    """
    _check_shapes(dataset.record, shard, activations)
    commit = dataset.stored_commit(shard)
    if commit is not None:
        return commit
    ours = _write_chunks(dataset, shard, activations, writer)
    if dataset.storage.put_if_absent(layout.commit(dataset.record.dataset_id, shard), ours.to_bytes()):
        return ours
    commit = dataset.stored_commit(shard)
    assert commit is not None
    if commit.chunks != ours.chunks:
        raise StorageConflictError(
            f"{dataset.storage.url(layout.commit(dataset.record.dataset_id, shard))} commits other chunks"
        )
    return commit


def _check_shapes(record: DatasetRecord, shard: int, activations: Mapping[str, Array]) -> None:
    if not 0 <= shard < record.num_shards:
        raise ValueError(f"shard {shard} is not in dataset {record.dataset_id}, which has {record.num_shards} shards")
    if set(activations) != set(record.hooks):
        raise ValueError(
            f"shard {shard} was given for hooks {sorted(activations)}, the dataset has {sorted(record.hooks)}"
        )
    for hook, values in activations.items():
        spec = hook_spec(hook, record.hooks[hook], record.dtype)
        expected = spec.shape(record.rows_in_shard(shard))
        if values.shape != expected or values.dtype != spec.dtype:
            raise ValueError(
                f"{hook}, shard {shard}: {values.dtype} {values.shape} given, {spec.dtype} {expected} is stored"
            )


def _write_chunks(dataset: OpenDataset, shard: int, activations: Mapping[str, Array], writer: str) -> ShardCommit:
    """Store every chunk of the shard, and return the commit that describes what is stored."""
    record = dataset.record
    chunks = record.chunks_of(shard)
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        tokens = {name: list(pool.map(partial(dataset.stored_chunk, name), chunks)) for name in TOKEN_ARRAYS}
        kept = [_unflagged(record, data, chunk) for data, chunk in zip(tokens["flags"], chunks, strict=True)]
        tasks = {
            hook: [
                pool.submit(_write_chunk, dataset, hook, chunk, rows, mask)
                for chunk, rows, mask in zip(chunks, _cut(values, record.rows_per_chunk), kept, strict=True)
            ]
            for hook, values in activations.items()
        }
        written = {hook: [task.result() for task in hook_tasks] for hook, hook_tasks in tasks.items()}
    return ShardCommit(
        dataset_digest=record.digest(),
        shard=shard,
        first_row=shard * record.rows_per_shard,
        num_rows=record.rows_in_shard(shard),
        chunks={name: [describe_chunk(data) for data in parts] for name, parts in tokens.items()}
        | {hook: [chunk_record for chunk_record, _ in parts] for hook, parts in written.items()},
        moments={hook: merge_moments([moments for _, moments in parts]) for hook, parts in written.items()},
        num_flagged_rows=record.rows_in_shard(shard) - sum(int(mask.sum()) for mask in kept),
        writer=writer,
    )


def _write_chunk(
    dataset: OpenDataset, hook: str, chunk: int, values: Array, kept: NDArray[np.bool_]
) -> tuple[ChunkRecord, Moments]:
    """Store one chunk of one hook, or adopt the one that is there; describes what is stored."""
    record, storage = dataset.record, dataset.storage
    spec = hook_spec(hook, record.hooks[hook], record.dtype)
    key = layout.chunk(record.dataset_id, hook, chunk, ndim=2)
    moments = moments_of(values, kept)
    if not np.isfinite(moments.sum_squared_deviations).all():
        raise ValueError(
            f"{hook}, chunk {chunk}: an activation is NaN or infinite, and nothing was written: check the model"
        )
    data: bytes | memoryview = encode_chunk(values, spec, record.rows_per_chunk)
    if not storage.put_if_absent(key, data):
        found = storage.get(key)
        if found != data:
            data = found
            stored = decode_chunk(found, spec, record.rows_per_chunk, storage.url(key))
            moments = moments_of(stored[: len(values)], kept)
    return describe_chunk(data), moments


def _unflagged(record: DatasetRecord, flags: bytes, chunk: int) -> NDArray[np.bool_]:
    """Which rows of a chunk count for the statistics."""
    mask: NDArray[np.bool_] = np.frombuffer(flags, np.uint8)[: record.rows_in_chunk(chunk)] == 0
    return mask


def _cut(values: Array, num_rows: int) -> list[Array]:
    return [values[first : first + num_rows] for first in range(0, len(values), num_rows)]
