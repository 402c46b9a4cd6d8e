"""What a run leaves behind, who controls it, and the keys of it all."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import layout, leases, reports
from storage.config import StorageConfig
from storage.filesystem import DamagedDataError, Storage, StorageConflictError
from storage.leases import LeaseHeldError
from storage.records import MetricsReport, RunDataset, RunRecord, RunSummary
from storage.testing import TEXT, truncate


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(root=str(tmp_path)))


def run(run_id: str, **config: object) -> RunRecord:
    return RunRecord(run_id=run_id, recipe="laptop", config=config)


def report(name: str = "main", step: int = 7, **changes: object) -> MetricsReport:
    fields: dict[str, object] = {
        "run_id": "run",
        "name": name,
        "step": step,
        "checkpoint_digest": "c",
        "text": TEXT,
        "evaluate": {"num_tokens": 10},
        "metrics": {"fvu": 0.25},
        "num_tokens": 10,
        "seconds": 1.5,
    }
    return MetricsReport.model_validate(fields | changes)


def test_a_run_is_started_once_and_adopted_again(storage: Storage) -> None:
    for _ in range(2):
        reports.write_run(storage, run("a", seed=1), "seed = 1\n")
    assert reports.read_run(storage, "a") == run("a", seed=1)
    assert storage.get(layout.run_config("a")) == b"seed = 1\n"
    with pytest.raises(StorageConflictError, match=r"run.json exists with other content"):
        reports.write_run(storage, run("a", seed=2), "seed = 2\n")
    assert storage.get(layout.run_config("a")) == b"seed = 1\n"
    assert reports.run_exists(storage, "a")
    assert not reports.run_exists(storage, "b")


def test_a_run_keeps_its_dataset(storage: Storage) -> None:
    assert reports.read_run_dataset(storage, "a") is None
    for _ in range(2):
        reports.write_run_dataset(storage, RunDataset(run_id="a", dataset_id="d1"))
    assert reports.read_run_dataset(storage, "a") == "d1"
    with pytest.raises(StorageConflictError):
        reports.write_run_dataset(storage, RunDataset(run_id="a", dataset_id="d2"))


def test_runs_come_by_their_last_sign_of_life(storage: Storage) -> None:
    assert reports.newest_first(storage) == []
    for run_id in ("b", "c", "a"):
        reports.write_run(storage, run(run_id), "")
        time.sleep(0.02)
    assert reports.list_runs(storage) == ["a", "b", "c"]
    assert reports.newest_first(storage)[0] == "a"
    leases.acquire(storage, "b", "me")
    assert reports.newest_first(storage) == ["b", "a", "c"]


def test_the_first_scores_of_a_checkpoint_stay(storage: Storage) -> None:
    assert reports.read_report(storage, "run", "main", 7) is None
    assert reports.write_report(storage, report()) == report()
    assert reports.write_report(storage, report(seconds=9.0, metrics={"fvu": 0.2500001})) == report()
    assert reports.read_report(storage, "run", "main", 7) == report()
    with pytest.raises(StorageConflictError, match=r"report.json exists with another checkpoint_digest"):
        reports.write_report(storage, report(checkpoint_digest="other"))
    with pytest.raises(StorageConflictError, match="another evaluate"):
        reports.write_report(storage, report(evaluate={"num_tokens": 11}))


def test_scores_are_listed_by_name_and_step(storage: Storage) -> None:
    for name, step in (("b", 9), ("a", 100), ("a", 20)):
        reports.write_report(storage, report(name, step))
    storage.put(layout.checkpoint_record("run", "c", 1), b"published, and not yet scored")
    listed = [(found.name, found.step) for found in reports.list_reports(storage, "run")]
    assert listed == [("a", 20), ("a", 100), ("b", 9)]


def test_curves_summary_and_page_are_replaced_whole(storage: Storage) -> None:
    assert reports.read_history(storage, "run", "main") == []
    for rows in ([{"step": 1, "loss": 0.5}], [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]):
        reports.write_history(storage, "run", "main", rows)
        assert reports.read_history(storage, "run", "main") == rows
    assert reports.read_summary(storage, "run") is None
    for restarts in (1, 2):
        summary = RunSummary(
            run_id="run", dataset_id="d", seconds={"train": 2.0}, steal_share=0.0, restarts=restarts, finished=True
        )
        reports.write_summary(storage, summary)
        assert reports.read_summary(storage, "run") == summary
    url = reports.write_page(storage, "run", "<html>é</html>", {"fvu": 0.1})
    assert Path(url).read_text(encoding="utf-8") == "<html>é</html>"
    assert reports.read_page_numbers(storage, "run") == {"fvu": 0.1}


def test_a_torn_history_is_named(storage: Storage) -> None:
    reports.write_history(storage, "run", "main", [{"step": 1}])
    truncate(storage, layout.history("run", "main"), 5)
    with pytest.raises(DamagedDataError, match=r"history/main.json is not JSON"):
        reports.read_history(storage, "run", "main")


def test_a_second_controller_is_refused_while_the_first_lives(storage: Storage) -> None:
    leases.acquire(storage, "run", "host/1")
    leases.acquire(storage, "run", "host/1")  # its answer may have been lost
    with pytest.raises(LeaseHeldError, match=r"run run is controlled by host/1, alive 0 s ago"):
        leases.acquire(storage, "run", "host/2")
    assert leases.holder(storage, "run") == "host/1"


def test_a_released_or_silent_run_can_be_taken(storage: Storage) -> None:
    assert leases.holder(storage, "run") is None
    leases.acquire(storage, "run", "first")
    leases.release(storage, "run", "first")
    assert leases.holder(storage, "run") is None
    leases.acquire(storage, "run", "second", ttl_seconds=0.01)
    time.sleep(0.02)
    leases.acquire(storage, "run", "third")
    with pytest.raises(LeaseHeldError, match="taken over by third"):
        leases.renew(storage, "run", "second")
    leases.release(storage, "run", "second")  # does not free what third holds
    assert leases.holder(storage, "run") == "third"


def test_renewals_keep_a_lease_alive(storage: Storage) -> None:
    leases.acquire(storage, "run", "first", ttl_seconds=0.3)
    for _ in range(4):
        time.sleep(0.1)
        leases.renew(storage, "run", "first")
    with pytest.raises(LeaseHeldError):
        leases.acquire(storage, "run", "second")


def test_one_of_many_controllers_gets_a_new_run(storage: Storage) -> None:
    def acquires(owner: int) -> bool:
        try:
            leases.acquire(storage, "run", f"owner {owner}")
        except LeaseHeldError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(acquires, range(8))) == 1


CLIMBING = ["..", ".", "", "../x", "a/b", "/etc", "a\\b", ".hidden", "a b", "x" * 129, "é", "a\n"]


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize(
    "key",
    [
        layout.dataset_record,
        layout.group,
        layout.commits,
        lambda name: layout.array("d", name),
        lambda name: layout.chunk("d", name, 0, 2),
        layout.run_record,
        layout.lease,
        lambda name: layout.checkpoint("r", name, 1),
        lambda name: layout.state("r", name, 1),
        lambda name: layout.history("r", name),
    ],
)
def test_names_cannot_climb_out_of_their_folder(key: Callable[[str], str], name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        key(name)


def test_numbers_are_not_negative() -> None:
    with pytest.raises(ValueError, match="step -1 is negative"):
        layout.checkpoint("r", "n", -1)


def test_keys_are_those_of_the_layout() -> None:
    assert layout.chunk("d", "blocks.0.hook_z", 12, 2) == "activations/d/data.zarr/blocks.0.hook_z/c/12/0"
    assert layout.chunk("d", "flags", 12, 1) == "activations/d/data.zarr/flags/c/12"
    assert layout.commit("d", 3) == "activations/d/commits/00000003.json"
    assert layout.shard_of(layout.commit("d", 3)) == 3
    assert layout.checkpoint_tensors("r", "n", 5) == "runs/r/saes/n/000000000005/sae.safetensors"
    assert layout.state_record("r", "s", 5) == "runs/r/state/s/000000000005/state.json"
    assert layout.history("r", "n") == "runs/r/history/n.json"
