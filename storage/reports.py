"""What a run says of itself: its record, configuration, curves, scores, summary and page.

Records and scores are create-only; what grows while a run goes on (curves, summary, page) is replaced whole.
Called by the controller, `workers.training` and `workers.evaluating` (write) and by `services.report` (reads).
"""

import json
from typing import Any

from storage import layout
from storage.filesystem import DamagedDataError, Storage, StorageConflictError
from storage.records import Json, MetricsReport, RunDataset, RunRecord, RunSummary, canonical_json


def write_run(storage: Storage, record: RunRecord, config_toml: str) -> None:
    """Start a run's folder; adopts an identical one, StorageConflictError on another one."""
    storage.adopt_or_refuse(layout.run_record(record.run_id), record.to_bytes())
    storage.put(layout.run_config(record.run_id), config_toml.encode())


def read_run(storage: Storage, run_id: str) -> RunRecord:
    """A run's record; FileNotFoundError where there is none."""
    key = layout.run_record(run_id)
    return RunRecord.from_bytes(storage.get(key), storage.url(key))


def write_run_dataset(storage: Storage, record: RunDataset) -> None:
    """Say which dataset a run is trained on; adopts the same, StorageConflictError on another."""
    storage.adopt_or_refuse(layout.run_dataset(record.run_id), record.to_bytes())


def read_run_dataset(storage: Storage, run_id: str) -> str | None:
    """The dataset's id; None where the harvest has not found or made it yet."""
    key = layout.run_dataset(run_id)
    return RunDataset.from_bytes(storage.get(key), storage.url(key)).dataset_id if storage.exists(key) else None


def run_exists(storage: Storage, run_id: str) -> bool:
    """Whether a run was ever started."""
    return storage.exists(layout.run_record(run_id))


def list_runs(storage: Storage) -> list[str]:
    """Ids of all runs, sorted."""
    return [name for name in storage.names(layout.RUNS) if storage.exists(layout.run_record(name))]


def newest_first(storage: Storage) -> list[str]:
    """Ids of all runs by their record's or their controller's last sign of life, the latest first."""
    return sorted(list_runs(storage), key=lambda run_id: _last_active_seconds(storage, run_id), reverse=True)


def _last_active_seconds(storage: Storage, run_id: str) -> float:
    key = layout.lease(run_id)
    return storage.modified_seconds(key if storage.exists(key) else layout.run_record(run_id))


def write_summary(storage: Storage, summary: RunSummary) -> None:
    """Say how a run ended, in place of what an earlier invocation said."""
    storage.put(layout.run_summary(summary.run_id), summary.to_bytes())


def read_summary(storage: Storage, run_id: str) -> RunSummary | None:
    """How a run ended; None where it has not."""
    key = layout.run_summary(run_id)
    return RunSummary.from_bytes(storage.get(key), storage.url(key)) if storage.exists(key) else None


def write_report(storage: Storage, report: MetricsReport) -> MetricsReport:
    """Store the scores of a checkpoint, and return those that are stored: an earlier attempt's stay.

    StorageConflictError where those are of other weights or of another evaluation.
    """
    key = layout.report_json(report.run_id, report.name, report.step)
    if storage.put_if_absent(key, report.to_bytes()):
        return report
    stored = MetricsReport.from_bytes(storage.get(key), storage.url(key))
    for field in ("checkpoint_digest", "text", "evaluate"):
        if getattr(stored, field) != getattr(report, field):
            raise StorageConflictError(
                f"{storage.url(key)} exists with another {field}: it was kept, and nothing was written"
            )
    return stored


def read_report(storage: Storage, run_id: str, name: str, step: int) -> MetricsReport | None:
    """The scores of a checkpoint; None where it has not been evaluated."""
    key = layout.report_json(run_id, name, step)
    return MetricsReport.from_bytes(storage.get(key), storage.url(key)) if storage.exists(key) else None


def is_scored(storage: Storage, run_id: str, name: str, step: int) -> bool:
    """Whether a checkpoint has its report."""
    return storage.exists(layout.report_json(run_id, name, step))


def list_reports(storage: Storage, run_id: str) -> list[MetricsReport]:
    """The scores of all checkpoints of a run, by name and step."""
    folder = layout.checkpoints(run_id)
    found = [(name, int(step)) for name in storage.names(folder) for step in storage.names(f"{folder}/{name}")]
    reports = [read_report(storage, run_id, *where) for where in found]
    return [report for report in reports if report is not None]


def write_history(storage: Storage, run_id: str, name: str, rows: list[Json]) -> None:
    """Store a curve whole: an object store cannot append."""
    storage.put(layout.history(run_id, name), canonical_json(rows))


def read_history(storage: Storage, run_id: str, name: str) -> list[Json]:
    """A curve; [] where there is none."""
    key = layout.history(run_id, name)
    return _read_json(storage, key) if storage.exists(key) else []


def write_page(storage: Storage, run_id: str, page: str, numbers: Json) -> str:
    """Store a run's page and the numbers behind it; returns the page's URL."""
    storage.put(layout.run_report_json(run_id), canonical_json(numbers))
    storage.put(layout.run_report_page(run_id), page.encode())
    return storage.url(layout.run_report_page(run_id))


def read_page_numbers(storage: Storage, run_id: str) -> Json:
    """The numbers behind a run's page; FileNotFoundError where it has none."""
    numbers: Json = _read_json(storage, layout.run_report_json(run_id))
    return numbers


def _read_json(storage: Storage, key: str) -> Any:
    try:
        return json.loads(storage.get(key))
    except ValueError as error:
        raise DamagedDataError(f"{storage.url(key)} is not JSON ({error})") from error
