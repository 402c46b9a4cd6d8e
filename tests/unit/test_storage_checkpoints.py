"""Published SAEs never change; resume states may tear, and then the one before is taken."""

import json
import uuid

import numpy as np
import pytest

from storage import checkpoints, layout
from storage.checkpoints import list_checkpoints, load, load_latest_state, publish, save_state
from storage.config import StorageConfig
from storage.filesystem import DamagedDataError, Storage, StorageConflictError
from storage.records import CheckpointRecord
from storage.testing import MODEL, flip_bit, truncate


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageConfig(root=f"memory://{uuid.uuid4().hex}"))


def record(**changes: object) -> CheckpointRecord:
    fields: dict[str, object] = {
        "run_id": "run",
        "name": "main",
        "step": 7,
        "rows_trained": 700,
        "dataset_id": "data",
        "dataset_digest": "d",
        "manifest_digest": "m",
        "hook": "h",
        "model": MODEL,
        "sae": {"k": 2},
        "train": {"lr": 0.1},
        "variant": "batchtopk",
        "d_in": 4,
        "d_latent": 3,
        "threshold": 0.5,
        "scale": 1.0,
        "train_metrics": {"loss": 0.25},
    }
    return CheckpointRecord.model_validate(fields | changes)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "W_enc": generator.normal(size=(4, 3)).astype(np.float32).T,  # not contiguous
        "steps": np.array([2**40], np.int64),
        "generator": generator.integers(0, 256, 16).astype(np.uint8),
    }


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def test_a_published_sae_is_loaded_as_it_was(storage: Storage) -> None:
    published = publish(storage, record(), tensors())
    loaded, loaded_tensors = load(storage, "run", "main", 7)
    assert loaded == published == record(tensors_sha256=published.tensors_sha256)
    assert len(published.tensors_sha256) == 64
    assert_same(loaded_tensors, tensors())


def test_publishing_again_keeps_the_first(storage: Storage) -> None:
    first = publish(storage, record(), tensors())
    again = publish(storage, record(threshold=0.5000001, train_metrics={"loss": 0.2500001}), tensors(seed=1))
    assert again == first
    assert_same(load(storage, "run", "main", 7)[1], tensors())


def test_a_publisher_that_died_before_the_record_is_adopted(storage: Storage) -> None:
    publish(storage, record(), tensors())
    storage.delete(layout.checkpoint_record("run", "main", 7))
    assert list_checkpoints(storage, "run") == []
    publish(storage, record(train_metrics={"loss": 0.3}), tensors(seed=1))
    loaded, loaded_tensors = load(storage, "run", "main", 7)
    assert loaded.train_metrics == {"loss": 0.3}
    assert_same(loaded_tensors, tensors())


def test_other_shapes_or_another_configuration_are_refused(storage: Storage) -> None:
    publish(storage, record(), tensors())
    with pytest.raises(StorageConflictError, match=r"sae.safetensors exists with other tensors"):
        publish(storage, record(), tensors() | {"W_enc": np.zeros((3, 5), np.float32)})
    with pytest.raises(StorageConflictError, match=r"checkpoint.json exists for another configuration"):
        publish(storage, record(sae={"k": 3}), tensors())


def test_damaged_weights_are_found(storage: Storage) -> None:
    publish(storage, record(), tensors())
    flip_bit(storage, layout.checkpoint_tensors("run", "main", 7), position=-1)
    with pytest.raises(DamagedDataError, match=r"sae.safetensors is damaged"):
        load(storage, "run", "main", 7)


def test_checkpoints_are_listed_by_name_and_step(storage: Storage) -> None:
    for name, step in (("b", 9), ("a", 100), ("a", 20)):
        publish(storage, record(name=name, step=step), tensors())
    assert [(found.name, found.step) for found in list_checkpoints(storage, "run")] == [("a", 20), ("a", 100), ("b", 9)]
    assert list_checkpoints(storage, "other") == []


def test_the_newest_state_is_loaded_and_old_ones_are_deleted(storage: Storage) -> None:
    assert load_latest_state(storage, "run", "trainer-0") is None
    for step in (1, 2, 10, 30):
        save_state(storage, "run", "trainer-0", step, tensors(step), {"stream": {"epoch": step}})
    found = load_latest_state(storage, "run", "trainer-0")
    assert found is not None
    step, loaded, scalars = found
    assert (step, scalars) == (30, {"stream": {"epoch": 30}})
    assert_same(loaded, tensors(30))
    assert storage.names(layout.states("run", "trainer-0")) == [f"{10:012d}", f"{30:012d}"]
    assert load_latest_state(storage, "run", "trainer-1") is None


@pytest.mark.parametrize(
    "tear",
    [
        lambda storage, tensors_key, record_key: truncate(storage, tensors_key, 50),
        lambda storage, tensors_key, record_key: truncate(storage, record_key, 50),
        lambda storage, tensors_key, record_key: flip_bit(storage, tensors_key, position=-1),
        lambda storage, tensors_key, record_key: storage.delete(record_key),
        lambda storage, tensors_key, record_key: storage.delete(tensors_key),
    ],
)
def test_a_torn_state_is_passed_over(storage: Storage, tear, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save_state(storage, "run", "slot", step, tensors(step), {"step": step})
    tear(storage, layout.state_tensors("run", "slot", 2), layout.state_record("run", "slot", 2))
    found = load_latest_state(storage, "run", "slot")
    assert found is not None
    assert found[0] == 1
    assert_same(found[1], tensors(1))
    assert "resume state of step 2 passed over" in caplog.text
    save_state(storage, "run", "slot", 2, tensors(3), {"step": 2})
    again = load_latest_state(storage, "run", "slot")
    assert again is not None
    assert again[0] == 2
    assert_same(again[1], tensors(3))


def test_a_late_writer_deletes_no_later_state(storage: Storage) -> None:
    for step in (40, 60, 50):
        save_state(storage, "run", "slot", step, tensors(step), {}, keep=1)
    found = load_latest_state(storage, "run", "slot")
    assert found is not None
    assert found[0] == 60
    assert checkpoints.latest_state_step(storage, "run", "slot") == 60


def test_a_state_never_holds_nan_in_json(storage: Storage) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        save_state(storage, "run", "slot", 1, tensors(), {"loss": float("nan")})
    assert storage.list("runs") == []


def test_files_are_what_other_programs_read(storage: Storage) -> None:
    publish(storage, record(), tensors())
    content = json.loads(storage.get("runs/run/saes/main/000000000007/checkpoint.json"))
    assert content["schema_version"] == 1
    header = storage.get("runs/run/saes/main/000000000007/sae.safetensors")
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["W_enc"]["shape"] == [3, 4]
