"""Which run an invocation means: the one its configuration names, or another of the same configuration."""

from itertools import count

from storage import reports
from storage.filesystem import Storage
from storage.records import RunSummary


def finished_summary(storage: Storage, run_id: str) -> RunSummary | None:
    """The summary of a run that has nothing left to do; none for any other."""
    summary = reports.read_summary(storage, run_id)
    return summary if summary is not None and summary.finished else None


def new_run_id(storage: Storage, run_id: str) -> str:
    """`run_id` with the first number behind it that no finished run has: an interrupted `--new` goes on."""
    if not reports.run_exists(storage, run_id):
        return run_id
    return next(name for n in count(2) if finished_summary(storage, name := f"{run_id}-{n}") is None)
