"""The controller: starts actors, passes keys between stages, replaces what died, stops cleanly.

Arrays never come through here: stages hand each other a dataset id, a run id, a step. Called by `services.cli`.
"""

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Literal, TypeVar

import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from services import cluster, placement, stages
from services.cluster import StageFailed
from services.config import RunConfig
from services.exporter import Exporter
from services.machine import StealMeter
from services.report import write_report
from storage import checkpoints, reports
from storage.filesystem import Storage
from storage.leases import Lease
from storage.records import RunRecord, RunSummary
from workers.models.catalog import is_local
from workers.telemetry import RUN_INFO, Telemetry

Stage = Literal["harvest", "train", "evaluate"]
ALL_STAGES: tuple[Stage, ...] = ("harvest", "train", "evaluate")

T = TypeVar("T")

_SILENT_SECONDS = 300.0


def run_stages(config: RunConfig, run_id: str, chosen: tuple[Stage, ...], console: Console) -> RunSummary:
    """Run the chosen stages of a run in order; what is committed already is not made again. Writes the report when all is done.

    Raises StageFailed with one sentence when a stage cannot go on, ValueError when the root cannot be written, the port is
    taken or another controller holds the run. Whatever ends it, committed work stays.
    """
    storage = Storage(config.storage)
    storage.check_writable()
    steal = StealMeter()
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        exporter = Exporter(
            config.cluster.metrics_host, config.cluster.metrics_port, run_id=run_id, silent_seconds=_SILENT_SECONDS
        )
        stack.callback(exporter.close)
        console.print(
            f"run {run_id}, root {config.storage.root}, "
            f"metrics http://{config.cluster.metrics_host}:{exporter.port}/metrics",
            highlight=False,
            soft_wrap=True,
        )
        stack.enter_context(Lease(storage, run_id))
        telemetry = Telemetry()
        telemetry.set(RUN_INFO, 1, run_id=run_id, dataset_id=_known_dataset(storage, run_id) or "")
        exporter.update("controller", telemetry.snapshot())
        started = time.monotonic()
        hub = config.text.source == "hub" or not is_local(config.model.name)
        num_cpus = cluster.start(config.cluster, hub_is_needed=hub)
        stack.callback(ray.shutdown)
        stack.callback(_stop_on_sigterm())
        seconds["start"] = time.monotonic() - started
        plan = placement.plan(config.cluster, num_cpus)
        context = stages.Context(config, run_id, storage, exporter, telemetry, console, plan)
        try:
            _run(context, chosen, seconds)
        except RayTaskError as error:
            raise cluster.users_error(error) from error
        summary = _summarise(context, seconds, steal)
    if summary.finished:
        write_report(storage, run_id)
    return summary


def _run(context: stages.Context, chosen: tuple[Stage, ...], seconds: dict[str, float]) -> None:
    config, storage = context.config, context.storage

    def timed(stage: str, work: Callable[[], T]) -> T:
        context.exporter.stage = stage
        started = time.monotonic()
        try:
            return work()
        finally:
            seconds[stage] = time.monotonic() - started

    reports.write_run(storage, _record(config, context.run_id, _known_dataset(storage, context.run_id)))
    if "harvest" in chosen:
        found = timed("harvest", lambda: stages.harvest(context))
        known = _known_dataset(storage, context.run_id)
        if known not in {None, found}:
            raise StageFailed(
                f"run {context.run_id} belongs to dataset {known}, but its text and model now make {found}: "
                "pass --new for a run of its own"
            )
        reports.write_run(storage, _record(config, context.run_id, found))
    dataset_id = _known_dataset(storage, context.run_id)
    if dataset_id is None:
        raise StageFailed(f"run {context.run_id} has no dataset yet: run `dollhouse harvest` first")
    evaluation = stages.Evaluation(context)
    if "train" in chosen:
        if "evaluate" in chosen and context.plan.evaluate_while_training:
            evaluation.begin()
        timed("train", lambda: stages.train(context, dataset_id))
    if "evaluate" in chosen:
        timed("evaluate", evaluation.finish)


def _record(config: RunConfig, run_id: str, dataset_id: str | None) -> RunRecord:
    return RunRecord(run_id=run_id, recipe=config.recipe, config=config.model_dump(mode="json"), dataset_id=dataset_id)


def _known_dataset(storage: Storage, run_id: str) -> str | None:
    record = reports.read_run(storage, run_id)
    return record.dataset_id if record else None


def _summarise(context: stages.Context, seconds: dict[str, float], steal: StealMeter) -> RunSummary:
    storage, run_id = context.storage, context.run_id
    last = context.config.train.num_steps
    steps = {record.name: record.step for record in checkpoints.list_checkpoints(storage, run_id)}  # in order of step
    trained = all(steps.get(sae.name) == last for sae in context.config.saes)
    summary = RunSummary(
        run_id=run_id,
        dataset_id=_known_dataset(storage, run_id) or "",
        seconds={name: round(value, 1) for name, value in seconds.items()},
        steal_share=round(steal.share(), 4),
        restarts=context.num_restarts,
        finished=trained and not stages.pending_checkpoints(storage, run_id),
    )
    reports.write_summary(storage, summary)
    return summary


def _stop_on_sigterm() -> Callable[[], object]:
    """Make SIGTERM stop the run as Ctrl-C does; Ray installs a handler of its own, so this comes after it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    return lambda: signal.signal(signal.SIGTERM, before)

