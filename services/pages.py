"""Reads what a run left in storage, has it put together (`services.report`) and writes report.json and report.html."""

from services.report import build_report, render_page
from storage import checkpoints, reports
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import Json


def write_report(storage: Storage, run_id: str) -> Json:
    """Write the page and the numbers of a run that has been trained; returns the numbers.

    Raises ValueError when the run has no summary, dataset or checkpoint yet.
    """
    run = reports.read_run(storage, run_id)
    summary = reports.read_summary(storage, run_id)
    dataset_id = reports.read_run_dataset(storage, run_id)
    published = checkpoints.list_checkpoints(storage, run_id)
    if summary is None or dataset_id is None or not published:
        raise ValueError(f"run {run_id} has no published checkpoint yet: `dollhouse status` tells how far it is")
    order = {sae["name"]: index for index, sae in enumerate(run.config["saes"])}
    published.sort(key=lambda record: (order[record.name], record.step))
    scores = reports.list_reports(storage, run_id)
    histories = {name: reports.read_history(storage, run_id, name) for name in order}
    dataset = Dataset.open(storage, dataset_id).record
    numbers = build_report(run, summary, dataset, published, scores, histories, storage.url())
    reports.write_page(storage, run_id, render_page(numbers, scores, histories), numbers)
    return numbers
