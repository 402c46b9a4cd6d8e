"""Published SAEs and the states that training resumes from: safetensors and JSON, each with the other's checksum.

A published SAE is create-only: weights first, record last. A resume state may be replaced; a torn one is passed over.
Called by `workers.training` (writes), `workers.evaluating` and `workers.exploring` (read).
"""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as decode_tensors
from safetensors.numpy import save as encode_tensors

from storage import layout, reports
from storage.filesystem import DamagedDataError, Storage, StorageConflictError
from storage.records import CheckpointRecord, Json, Record

Tensors = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)


class StateRecord(Record):
    """What stands beside the tensors of a resume state."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # refused, where null would be read back as None

    run_id: str
    slot: str
    step: int
    scalars: Json
    tensors_sha256: str


def publish(storage: Storage, record: CheckpointRecord, tensors: Mapping[str, NDArray[Any]]) -> CheckpointRecord:
    """Publish an SAE, and return the record that is stored, with its `tensors_sha256`.

    A second attempt at the same step adopts what the first has stored: on a GPU its bits may differ from ours. Weights
    of other names, shapes or types, and a record of another configuration, are refused with StorageConflictError.
    """
    where = (record.run_id, record.name, record.step)
    data = encode_tensors({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})
    key = layout.checkpoint_tensors(*where)
    if not storage.put_if_absent(key, data):
        ours, data = _shapes(decode_tensors(data)), storage.get(key)
        if _shapes(_decoded(data, storage.url(key))) != ours:
            raise StorageConflictError(
                f"{storage.url(key)} exists with other tensors: it was kept, and nothing was written"
            )
    record = record.model_copy(update={"tensors_sha256": _sha256(data)})
    if storage.put_if_absent(layout.checkpoint_record(*where), record.to_bytes()):
        return record
    stored = _read_record(storage, *where)
    if _configuration(stored) != _configuration(record):
        url = storage.url(layout.checkpoint_record(*where))
        raise StorageConflictError(f"{url} exists for another configuration: it was kept, and nothing was written")
    return stored


def load(storage: Storage, run_id: str, name: str, step: int) -> tuple[CheckpointRecord, Tensors]:
    """A published SAE. FileNotFoundError where there is none, DamagedDataError where its checksum is another."""
    record = _read_record(storage, run_id, name, step)
    key = layout.checkpoint_tensors(run_id, name, step)
    data = storage.get(key)
    if _sha256(data) != record.tensors_sha256:
        raise DamagedDataError(f"{storage.url(key)} is damaged: its checksum is not the one in checkpoint.json")
    return record, _decoded(data, storage.url(key))


def list_checkpoints(storage: Storage, run_id: str) -> list[CheckpointRecord]:
    """Published SAEs of a run, by name and step."""
    return [_read_record(storage, run_id, *where) for where in list_published(storage, run_id)]


def list_published(storage: Storage, run_id: str) -> list[tuple[str, int]]:
    """Name and step of a run's published SAEs, without reading them."""
    folder = layout.checkpoints(run_id)
    found = [(name, int(step)) for name in storage.names(folder) for step in storage.names(f"{folder}/{name}")]
    return [where for where in found if storage.exists(layout.checkpoint_record(run_id, *where))]


def newest_run(storage: Storage, name: str | None = None) -> str | None:
    """The newest run that has published an SAE (of that name); None where there is none."""
    for run_id in reports.newest_first(storage):
        if any(name in (None, found) for found, _ in list_published(storage, run_id)):
            return run_id
    return None


def save_state(
    storage: Storage,
    run_id: str,
    slot: str,
    step: int,
    tensors: Mapping[str, NDArray[Any]],
    scalars: Json,
    keep: int = 2,
) -> None:
    """Save what training resumes from, then delete all but the newest `keep` states up to this step.

    Later states stay: they may belong to a trainer that has replaced this one. ValueError if a scalar is not finite.
    """
    data = encode_tensors({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})
    record = StateRecord(run_id=run_id, slot=slot, step=step, scalars=scalars, tensors_sha256=_sha256(data))
    content = record.to_bytes()
    storage.put(layout.state_tensors(run_id, slot, step), data)
    storage.put(layout.state_record(run_id, slot, step), content)
    older = [found for found in _state_steps(storage, run_id, slot) if found <= step]
    for old in older[: -max(keep, 1)]:
        storage.delete(layout.state_record(run_id, slot, old))
        storage.delete(layout.state_tensors(run_id, slot, old))


def load_latest_state(storage: Storage, run_id: str, slot: str) -> tuple[int, Tensors, Json] | None:
    """(step, tensors, scalars) of the newest whole state, or None. Torn ones are passed over, with a warning."""
    for step in reversed(_state_steps(storage, run_id, slot)):
        try:
            return _load_state(storage, run_id, slot, step)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("resume state of step %d passed over: %s", step, error)
    return None


def latest_state_step(storage: Storage, run_id: str, slot: str) -> int | None:
    """Step of the newest resume state, whole or not; None where there is none."""
    return max(_state_steps(storage, run_id, slot), default=None)


def _load_state(storage: Storage, run_id: str, slot: str, step: int) -> tuple[int, Tensors, Json]:
    key = layout.state_record(run_id, slot, step)
    record = StateRecord.from_bytes(storage.get(key), storage.url(key))
    key = layout.state_tensors(run_id, slot, step)
    data = storage.get(key)
    if _sha256(data) != record.tensors_sha256:
        raise DamagedDataError(f"{storage.url(key)} is torn: its checksum is not the one in state.json")
    return step, _decoded(data, storage.url(key)), record.scalars


def _state_steps(storage: Storage, run_id: str, slot: str) -> list[int]:
    return sorted(int(step) for step in storage.names(layout.states(run_id, slot)))


def _read_record(storage: Storage, run_id: str, name: str, step: int) -> CheckpointRecord:
    key = layout.checkpoint_record(run_id, name, step)
    return CheckpointRecord.from_bytes(storage.get(key), storage.url(key))


def _decoded(data: bytes, where: str) -> Tensors:
    try:
        return decode_tensors(data)
    except SafetensorError as error:
        raise DamagedDataError(f"{where} is damaged: {error}") from error


def _shapes(tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}


def _configuration(record: CheckpointRecord) -> Json:
    """A record without what may differ in the last bit between two attempts."""
    return record.model_dump(exclude={"tensors_sha256", "train_metrics", "threshold", "scale"})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
