"""A controller's lease on a run: a second controller on a live run is refused.

A file with a heartbeat by the wall clock, so the clocks of two controllers' machines must agree within the time to
live. It keeps people from wasting work; it is not what keeps data right: that is create-only writing. Two controllers
that take over the same dead run at once are told apart at the next `renew`.
Called by the controller.
"""

import time

from storage import layout
from storage.filesystem import Storage
from storage.records import Record


class LeaseRecord(Record):
    """Who controls a run."""

    owner: str
    heartbeat_seconds: float
    """Unix time of the last renewal."""
    ttl_seconds: float
    """Without a renewal for this long, the owner counts as dead."""
    released: bool = False


class LeaseHeldError(ValueError):
    """Another controller is alive, or has taken over."""


def acquire(storage: Storage, run_id: str, owner: str, ttl_seconds: float = 30.0) -> None:
    """Take the run, or raise LeaseHeldError naming the living owner. `owner` is unique: host, process, start time."""
    lease = LeaseRecord(owner=owner, heartbeat_seconds=time.time(), ttl_seconds=ttl_seconds)
    if storage.put_if_absent(layout.lease(run_id), lease.to_bytes()):
        return
    _refuse_if_alive(_read(storage, run_id), run_id, owner)
    storage.put(layout.lease(run_id), lease.to_bytes())
    _refuse_if_alive(_read(storage, run_id), run_id, owner)


def renew(storage: Storage, run_id: str, owner: str) -> None:
    """Say, several times per `ttl_seconds`, that the owner lives; LeaseHeldError where another has taken the run."""
    lease = _read(storage, run_id)
    if lease.owner != owner:
        raise LeaseHeldError(
            f"run {run_id} was taken over by {lease.owner}: this controller was silent for too long, and stops"
        )
    renewed = lease.model_copy(update={"heartbeat_seconds": time.time()})
    storage.put(layout.lease(run_id), renewed.to_bytes())


def holder(storage: Storage, run_id: str) -> str | None:
    """The owner of a lease that was neither released nor has run out; None where there is none."""
    if not storage.exists(layout.lease(run_id)):
        return None
    lease = _read(storage, run_id)
    alive = not lease.released and time.time() - lease.heartbeat_seconds < lease.ttl_seconds
    return lease.owner if alive else None


def release(storage: Storage, run_id: str, owner: str) -> None:
    """Give the run back; nothing happens where another controller has it."""
    lease = _read(storage, run_id)
    if lease.owner == owner:
        storage.put(layout.lease(run_id), lease.model_copy(update={"released": True}).to_bytes())


def _read(storage: Storage, run_id: str) -> LeaseRecord:
    key = layout.lease(run_id)
    return LeaseRecord.from_bytes(storage.get(key), storage.url(key))


def _refuse_if_alive(lease: LeaseRecord, run_id: str, owner: str) -> None:
    age_seconds = time.time() - lease.heartbeat_seconds
    if lease.owner != owner and not lease.released and age_seconds < lease.ttl_seconds:
        raise LeaseHeldError(
            f"run {run_id} is controlled by {lease.owner}, alive {max(age_seconds, 0):.0f} s ago: "
            f"stop that controller, or wait {lease.ttl_seconds:.0f} s if it is dead"
        )
