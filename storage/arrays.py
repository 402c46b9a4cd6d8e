"""Which arrays a dataset has, and what one chunk's bytes mean; the Zarr v3 metadata that says so to other readers.

Chunks are raw little-endian numbers in C order, of full size, uncompressed: a chunk is one object. bfloat16, which Zarr
does not know, is stored as its bits (uint16) with the attribute `logical_dtype`.
Called by `shards`, which writes chunks, and `manifest`, which reads them.
"""

import json
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from storage import layout
from storage.filesystem import DamagedDataError, Storage, StorageConflictError
from storage.records import ChunkRecord, DatasetRecord

Array = NDArray[Any]


class Flag(IntFlag):
    """Bits of the array `flags`: why a row is not an ordinary token."""

    BOS = 1
    PADDING = 2
    SPECIAL = 4


EVERY_FLAG = Flag.BOS | Flag.PADDING | Flag.SPECIAL


@dataclass(frozen=True)
class ArraySpec:
    """Type and meaning of one array; its shape but for the number of rows."""

    dtype: np.dtype[Any]
    logical_dtype: str
    width: int | None
    """Columns; None for a vector."""
    description: str

    @property
    def ndim(self) -> int:
        """1 or 2."""
        return 1 if self.width is None else 2

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """[rows] or [rows, width]."""
        return (num_rows,) if self.width is None else (num_rows, self.width)


def _vector(dtype: str, description: str) -> ArraySpec:
    return ArraySpec(np.dtype(dtype), np.dtype(dtype).name, None, description)


TOKEN_ARRAYS = {
    "token_ids": _vector("<i4", "token id of each row, in the vocabulary of the model's tokenizer"),
    "positions": _vector("<i4", "position of each row in its context window, from 0"),
    "document_ids": _vector("<i4", "number of the document that each row comes from, in the order of the text source"),
    "flags": _vector("|u1", "bits of each row: 1 beginning of sequence, 2 padding, 4 other special token"),
}
"""The arrays that exist before any forward pass."""


def hook_spec(hook: str, width: int, dtype: str) -> ArraySpec:
    """The array of one hook: bfloat16 is stored as uint16."""
    stored = np.dtype("<u2") if dtype == "bfloat16" else np.dtype("<f4")
    return ArraySpec(stored, dtype, width, f"activations at {hook}, one row per token")


def array_specs(record: DatasetRecord) -> dict[str, ArraySpec]:
    """All arrays of a dataset; a ValueError where a hook's name cannot name an array."""
    for hook in record.hooks:
        if layout.checked(hook, "hook") in (*TOKEN_ARRAYS, "zarr.json"):
            raise ValueError(f"hook {hook!r} has the name of another array of the dataset: rename the hook")
    return {**TOKEN_ARRAYS, **{hook: hook_spec(hook, width, record.dtype) for hook, width in record.hooks.items()}}


def encode_chunk(values: Array, spec: ArraySpec, rows_per_chunk: int) -> memoryview:
    """Bytes of `values` [rows, ...], padded with zero rows to full size; no copy where nothing is to be changed."""
    expected = spec.shape(len(values))
    if values.shape != expected or values.dtype != spec.dtype:
        raise ValueError(f"an array of {values.dtype} {values.shape} was given where {spec.dtype} {expected} is stored")
    if len(values) < rows_per_chunk:
        padded = np.zeros(spec.shape(rows_per_chunk), spec.dtype)
        padded[: len(values)] = values
        values = padded
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def decode_chunk(data: bytes, spec: ArraySpec, rows_per_chunk: int, where: str) -> Array:
    """The array [rows_per_chunk, ...] in a chunk, a read-only view. DamagedDataError if cut short."""
    shape = spec.shape(rows_per_chunk)
    expected = int(np.prod(shape)) * spec.dtype.itemsize
    if len(data) != expected:
        raise DamagedDataError(f"{where} is damaged: it has {len(data)} bytes instead of {expected}")
    return np.frombuffer(data, spec.dtype).reshape(shape)


def describe_chunk(data: bytes | memoryview) -> ChunkRecord:
    """Length and checksum, as a commit records them."""
    return ChunkRecord(num_bytes=len(data), crc32c=google_crc32c.value(np.frombuffer(data, np.uint8)))


def create_arrays(storage: Storage, record: DatasetRecord) -> None:
    """Write the Zarr metadata of the group and its arrays, or adopt what is there; shapes never change afterwards."""
    for key, metadata in _zarr_metadata(record).items():
        if storage.put_if_absent(key, metadata):
            continue
        stored, ours = json.loads(storage.get(key)), json.loads(metadata)
        # what another version of zarr may write differently does not change what the chunks mean
        for field in ("node_type", "shape", "data_type", "chunk_grid", "codecs", "attributes"):
            if stored.get(field) != ours.get(field):
                raise StorageConflictError(
                    f"{storage.url(key)} exists with another {field}: it was kept, and nothing was written"
                )


def _zarr_metadata(record: DatasetRecord) -> dict[str, bytes]:
    """Key -> content of each zarr.json, as zarr writes them into memory."""
    import zarr  # only a dataset's creation needs it, and its import would slow down every worker
    from zarr.codecs import BytesCodec
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(written), zarr_format=3, attributes=_group_attributes(record))
    for name, spec in array_specs(record).items():
        group.create_array(
            name,
            shape=spec.shape(record.num_rows),
            chunks=spec.shape(record.rows_per_chunk),
            dtype=spec.dtype,
            serializer=BytesCodec(endian="little"),
            compressors=None,
            filters=None,
            fill_value=0,
            dimension_names=("row", "dimension")[: spec.ndim],
            attributes={"logical_dtype": spec.logical_dtype, "description": spec.description},
        )
    folder = layout.group(record.dataset_id)
    return {f"{folder}/{key}": content.to_bytes() for key, content in written.items()}


def _group_attributes(record: DatasetRecord) -> dict[str, Any]:
    return {
        "description": "Activations of a language model; row r of every array is the same token. Only rows of "
        "committed shards (the commits folder beside this group) are complete: a missing chunk reads as zeros.",
        "dataset_digest": record.digest(),
        "dataset": record.model_dump(mode="json"),
    }
