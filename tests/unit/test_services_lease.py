"""A run has one controller: a living one is refused company, a dead one is replaced at once, and a lost lease stops."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from services import lease
from services.runs import finished_summary, new_run_id
from storage import layout, leases, reports
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.records import RunRecord, RunSummary

RUN = "run"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(root=str(tmp_path)))


def _dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert not psutil.pid_exists(done.pid)
    return done.pid


def test_a_run_is_held_while_it_is_controlled_and_free_afterwards(storage: Storage) -> None:
    with lease.held(storage, RUN):
        owner = leases.holder(storage, RUN)
        assert owner is not None
        assert owner.startswith(f"{socket.gethostname()}/{os.getpid()}/")
    assert leases.holder(storage, RUN) is None


def test_a_dead_process_of_this_machine_is_taken_over_at_once(storage: Storage) -> None:
    leases.acquire(storage, RUN, f"{socket.gethostname()}/{_dead_process()}/{time.time():.0f}")
    with lease.held(storage, RUN):
        assert f"/{os.getpid()}/" in str(leases.holder(storage, RUN))


def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(storage: Storage) -> None:
    before = psutil.Process().create_time() - 3600
    leases.acquire(storage, RUN, f"{socket.gethostname()}/{os.getpid()}/{before:.0f}")
    with lease.held(storage, RUN):
        assert f"/{before:.0f}" not in str(leases.holder(storage, RUN))


@pytest.mark.parametrize("host", [socket.gethostname(), "another-machine"])
def test_a_living_controller_is_refused_company(storage: Storage, host: str) -> None:
    process = os.getpid() if host == socket.gethostname() else _dead_process()
    owner = f"{host}/{process}/{time.time() - 1:.0f}"  # of a dead process elsewhere nothing can be known
    leases.acquire(storage, RUN, owner)
    with pytest.raises(leases.LeaseHeldError, match="stop that controller"), lease.held(storage, RUN):
        pytest.fail("two controllers hold one run")
    assert leases.holder(storage, RUN) == owner


def test_a_controller_that_lost_its_run_is_stopped_with_the_reason(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_TTL_SECONDS", 0.15)
    started = time.monotonic()
    with pytest.raises(leases.LeaseHeldError, match="taken over by another/1/2"), lease.held(storage, RUN):
        _lose(storage)
    assert time.monotonic() - started < 5  # the wait was interrupted
    assert leases.holder(storage, RUN) == "another/1/2"


def _lose(storage: Storage) -> None:
    other = leases.LeaseRecord(owner="another/1/2", heartbeat_seconds=time.time(), ttl_seconds=60)
    storage.put(layout.lease(RUN), other.to_bytes())
    time.sleep(10)


def _start(storage: Storage, run_id: str, *, finished: bool | None = None) -> None:
    reports.write_run(storage, RunRecord(run_id=run_id, recipe="r", config={}), "")
    if finished is not None:
        summary = RunSummary(run_id=run_id, dataset_id="d", seconds={}, steal_share=0, restarts=0, finished=finished)
        reports.write_summary(storage, summary)


def test_a_new_run_takes_the_first_number_that_no_finished_run_has(storage: Storage) -> None:
    assert new_run_id(storage, RUN) == RUN
    _start(storage, RUN)
    assert new_run_id(storage, RUN) == "run-2"
    _start(storage, "run-2")
    assert new_run_id(storage, RUN) == "run-2"  # interrupted: it goes on
    reports.write_summary(
        storage,
        RunSummary(run_id="run-2", dataset_id="d", seconds={}, steal_share=0, restarts=0, finished=True),
    )
    assert new_run_id(storage, RUN) == "run-3"


def test_only_a_finished_run_has_a_finished_summary(storage: Storage) -> None:
    assert finished_summary(storage, RUN) is None
    _start(storage, RUN, finished=False)
    assert finished_summary(storage, RUN) is None
    _start(storage, RUN, finished=True)
    summary = finished_summary(storage, RUN)
    assert summary is not None
    assert summary.run_id == RUN
