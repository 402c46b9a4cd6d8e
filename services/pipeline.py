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
import tomli_w
from ray.exceptions import RayTaskError
from rich.console import Console

from services import cluster, placement, stages
from services.cluster import StageError
from services.config import RunConfig
from services.exporter import Exporter
from services.lease import held
from services.machine import StealMeter
from storage import checkpoints, reports
from storage.filesystem import Storage
from storage.records import RunDataset, RunRecord, RunSummary
from workers.models.catalog import is_local
from workers.telemetry import RUN_INFO, Telemetry

Stage = Literal["harvest", "train", "evaluate"]
ALL_STAGES: tuple[Stage, ...] = ("harvest", "train", "evaluate")

T = TypeVar("T")


def run_stages(
    config: RunConfig, run_id: str, chosen: tuple[Stage, ...], exporter: Exporter, console: Console
) -> RunSummary:
    """Run the chosen stages of a run in order; what is committed already is not made again.

    Raises StageError with one sentence when a stage cannot go on, ValueError when another controller holds the run.
    Whatever ends it, committed work stays.
    """
    storage = Storage(config.storage)
    steal = StealMeter()
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(held(storage, run_id))
        telemetry = Telemetry()
        telemetry.set(RUN_INFO, 1, run_id=run_id, dataset_id=reports.read_run_dataset(storage, run_id) or "")
        exporter.update("controller", telemetry.snapshot())
        started = time.monotonic()
        hub = config.text.source == "hub" or not is_local(config.model.name)
        nodes = cluster.start(config.cluster, hub_is_needed=hub)
        stack.callback(ray.shutdown)
        stack.callback(_stop_on_sigterm())
        seconds["start"] = time.monotonic() - started
        if storage.is_local and len(nodes) > 1 and not config.cluster.shared_filesystem:
            raise ValueError(
                f"storage.root = {config.storage.root} is a folder of one machine, the cluster has {len(nodes)}: use a "
                "bucket, or pass --set cluster.shared_filesystem=true if every node sees that folder"
            )
        plan = placement.plan(config.cluster, nodes)
        context = stages.Context(config.with_absolute_paths(), run_id, storage, exporter, telemetry, console, plan)
        reports.write_run(
            storage,
            RunRecord(run_id=run_id, recipe=config.recipe, config=config.identity()),
            tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)),
        )
        try:
            _run(context, chosen, seconds)
        except RayTaskError as error:
            raise cluster.users_error(error) from error
        return _summarise(context, seconds, steal)


def _run(context: stages.Context, chosen: tuple[Stage, ...], seconds: dict[str, float]) -> None:
    storage, run_id = context.storage, context.run_id

    def timed(stage: str, work: Callable[[], T]) -> T:
        context.exporter.stage = stage
        started = time.monotonic()
        try:
            return work()
        finally:
            seconds[stage] = time.monotonic() - started

    if "harvest" in chosen:
        found = timed("harvest", lambda: stages.harvest(context))
        known = reports.read_run_dataset(storage, run_id)
        if known not in {None, found}:
            raise StageError(
                f"run {run_id} belongs to dataset {known}, but its text and model now make {found}: "
                "pass --new for a run of its own"
            )
        reports.write_run_dataset(storage, RunDataset(run_id=run_id, dataset_id=found))
    dataset_id = reports.read_run_dataset(storage, run_id)
    if dataset_id is None:
        raise StageError(f"run {run_id} has no dataset yet: run `dollhouse harvest` first")
    context.telemetry.forget(RUN_INFO)
    context.telemetry.set(RUN_INFO, 1, run_id=run_id, dataset_id=dataset_id)
    context.tell()
    evaluation = stages.Evaluation(context)
    if "train" in chosen:
        if "evaluate" in chosen and context.plan.evaluate_while_training:
            evaluation.begin()
        timed("train", lambda: stages.train(context, dataset_id))
    if "evaluate" in chosen:
        timed("evaluate", evaluation.finish)


def _summarise(context: stages.Context, seconds: dict[str, float], steal: StealMeter) -> RunSummary:
    storage, run_id = context.storage, context.run_id
    last = context.config.train.num_steps
    steps = {record.name: record.step for record in checkpoints.list_checkpoints(storage, run_id)}  # the newest stays
    trained = all(steps.get(sae.name) == last for sae in context.config.saes)
    summary = RunSummary(
        run_id=run_id,
        dataset_id=reports.read_run_dataset(storage, run_id) or "",
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
