"""What storage alone tells of runs and datasets: `dollhouse status` and `dollhouse inspect`. No torch, no Ray."""

from typing import Any

from rich.console import Console
from rich.table import Table

from storage import checkpoints, leases, reports
from storage.filesystem import Storage
from storage.manifest import Dataset, list_datasets
from storage.records import RunRecord

_SAMPLE_TOKENS = 24


def all_runs(storage: Storage, only: str | None = None) -> list[dict[str, Any]]:
    """One entry a run, or `only` that run's: its dataset's rows, each SAE's steps, what is scored, who controls it."""
    names = reports.list_runs(storage) if only is None else [only]
    return [_run_status(storage, reports.read_run(storage, run_id)) for run_id in names]


def _run_status(storage: Storage, record: RunRecord) -> dict[str, Any]:
    dataset_id = reports.read_run_dataset(storage, record.run_id)
    dataset = Dataset.find(storage, dataset_id) if dataset_id else None
    summary = reports.read_summary(storage, record.run_id)
    train = record.config["train"]
    num_steps = train["rows"] // train["batch_rows"]
    newest = {entry.name: entry.step for entry in checkpoints.list_checkpoints(storage, record.run_id)}
    scored = {entry.name: entry.step for entry in reports.list_reports(storage, record.run_id)}
    return {
        "run": record.run_id,
        "recipe": record.recipe,
        "dataset": dataset_id,
        "rows_committed": sum(commit.num_rows for commit in dataset.commits().values()) if dataset else 0,
        "rows_planned": dataset.record.num_rows if dataset else None,
        "saved_step": checkpoints.latest_state_step(storage, record.run_id, "trainer-0"),
        "num_steps": num_steps,
        "published_step": {sae["name"]: newest.get(sae["name"]) for sae in record.config["saes"]},
        "scored_step": {sae["name"]: scored.get(sae["name"]) for sae in record.config["saes"]},
        "finished": bool(summary and summary.finished),
        "controller": leases.holder(storage, record.run_id),
    }


def print_status(runs: list[dict[str, Any]], console: Console) -> None:
    """The same as a table."""
    table = Table(title="runs: rows harvested, steps trained, last checkpoints scored", title_justify="left")
    table.add_column("run", min_width=max((len(run["run"]) for run in runs), default=0))  # whole: one copies it
    for column in ("rows", "steps", "scored", "state"):
        table.add_column(column)
    for run in runs:
        planned = f"{run['rows_planned']:,}" if run["rows_planned"] else "?"
        scored = sum(step is not None and step == run["num_steps"] for step in run["scored_step"].values())
        state = "finished" if run["finished"] else f"held by {run['controller']}" if run["controller"] else "stopped"
        table.add_row(
            run["run"],
            f"{run['rows_committed']:,} of {planned}",
            f"{run['saved_step'] or 0:,} of {run['num_steps']:,}",
            f"{scored} of {len(run['scored_step'])}",
            state,
        )
    console.print(table if runs else "no runs under this root")


def all_datasets(storage: Storage, only: str | None = None) -> list[dict[str, Any]]:
    """One entry a dataset, or the one of run `only`: what it is, how much is committed, moments, a sample of tokens."""
    names = list_datasets(storage)
    if only is not None:
        mine = reports.read_run_dataset(storage, only)
        names = [name for name in names if name == mine]
    return [_dataset_status(Dataset.open(storage, name)) for name in names]


def _dataset_status(dataset: Dataset) -> dict[str, Any]:
    record, commits = dataset.record, dataset.commits()
    usable = {hook: dataset.moments(hook) for hook in record.hooks} if commits else {}
    sample = dataset.read_chunk("token_ids", 0)[:_SAMPLE_TOKENS].tolist() if 0 in commits else []
    return {
        "dataset": record.dataset_id,
        "model": record.model.model_dump(mode="json", exclude={"schema_version"}),
        "text": record.text.model_dump(mode="json", exclude={"schema_version"}),
        "context_tokens": record.context_tokens,
        "packing": record.packing,
        "dtype": record.dtype,
        "rows_committed": sum(commit.num_rows for commit in commits.values()),
        "rows_planned": record.num_rows,
        "rows_flagged": sum(commit.num_flagged_rows for commit in commits.values()),
        "documents": record.num_documents,
        "shards": f"{len(commits)} of {record.num_shards}",
        "bytes": sum(
            chunk.num_bytes for commit in commits.values() for chunks in commit.chunks.values() for chunk in chunks
        ),
        "hooks": {
            hook: {
                "d_in": width,
                "mean_squared_norm": _mean_squared_norm(usable[hook]) if hook in usable else None,
                "rows": usable[hook].count if hook in usable else 0,
            }
            for hook, width in record.hooks.items()
        },
        "first_token_ids": sample,
    }


def _mean_squared_norm(moments: Any) -> float:
    """E |x|^2 over unflagged rows: |mean|^2 + the sum of the variances."""
    return float(sum(m * m for m in moments.mean) + sum(moments.sum_squared_deviations) / moments.count)


def print_datasets(datasets: list[dict[str, Any]], console: Console) -> None:
    """The same for people."""
    if not datasets:
        console.print("no datasets under this root")
    for entry in datasets:
        console.print(f"dataset {entry['dataset']}", style="bold", highlight=False)
        console.print(f"  model {entry['model']['name']} ({entry['model']['fingerprint'][:12]})", highlight=False)
        console.print(f"  text {entry['text']['description']}", highlight=False)
        console.print(
            f"  {entry['rows_committed']:,} of {entry['rows_planned']:,} rows in {entry['shards']} shards, "
            f"{entry['bytes'] / 1e6:,.0f} MB, {entry['documents']:,} documents, "
            f"{entry['rows_flagged']:,} rows flagged (BOS, padding, special)",
            highlight=False,
        )
        for hook, facts in entry["hooks"].items():
            norm = facts["mean_squared_norm"]
            told = f", mean squared norm {norm:,.1f} over {facts['rows']:,} unflagged rows" if norm else ""
            console.print(f"  {hook}: width {facts['d_in']:,}, {entry['dtype']}{told}", highlight=False)
        console.print(f"  first token ids {entry['first_token_ids']}", highlight=False)
