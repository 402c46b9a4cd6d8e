"""The three stages of a run, as the controller sees them: which calls are out, which must be made again.

Exactly-once comes from storage: a call that is made twice finds the first one's commit. Called by `services.pipeline`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from rich.console import Console

from services.cluster import Slot, StageError
from services.config import RunConfig
from services.exporter import Exporter
from services.placement import Plan
from services.progress import StageProgress
from storage import checkpoints, reports
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import MetricsReport
from workers.actors.evaluator import Evaluator
from workers.actors.harvester import Harvester, Prepared
from workers.actors.trainer import Trainer
from workers.evaluating.evaluate import CheckpointKey
from workers.telemetry import COMMITTED_ROWS, PLANNED_ROWS, QUEUE_DEPTH, Telemetry
from workers.training.loop import Advance

_SLICE_SECONDS = 2.0
_SHARDS_PER_HARVESTER = 2  # one computed, one waiting, so that none is ever idle
_SAVE_SECONDS = 30.0
_FOLLOW_SECONDS = 1.0


@dataclass
class Context:
    """What every stage of one invocation shares."""

    config: RunConfig
    run_id: str
    storage: Storage
    exporter: Exporter
    telemetry: Telemetry
    console: Console
    plan: Plan
    slots: list[Slot] = field(default_factory=list)

    @property
    def num_restarts(self) -> int:
        """Actors replaced so far."""
        return sum(slot.num_restarts for slot in self.slots)

    def slot(self, stage: str, index: int, make: Callable[[str], Any]) -> Slot:
        """A new slot with its first actor."""
        slot = Slot(stage, index, make, self.exporter, self.telemetry)
        self.slots.append(slot)
        return slot

    def tell(self) -> None:
        """Publish the controller's own figures."""
        self.exporter.update("controller", self.telemetry.snapshot())


def harvest(context: Context) -> str:
    """Make the dataset complete; returns its id. Shards that are committed already are not made again."""
    config = context.config

    def make(name: str) -> Any:
        return Harvester.options(**context.plan.harvester.options).remote(
            name, config.storage, config.model, config.text, config.harvest, context.plan.harvester.num_cpus
        )

    slots = [context.slot("harvester", index, make) for index in range(context.plan.harvester.num_actors)]
    try:
        dataset_id = _prepare(context, slots[0])
        dataset = Dataset.open(context.storage, dataset_id)
        _harvest_shards(context, slots, dataset)
    finally:
        for slot in slots:
            slot.close()
    return dataset_id


def _prepare(context: Context, slot: Slot) -> str:
    prepared: Prepared | None = None
    with StageProgress(context.console, "tokenise", "rows") as progress:
        for prepared in slot.stream(lambda actor: actor.prepare.remote()):
            progress.update(prepared.num_rows, context.config.harvest.max_rows)
    if prepared is None or prepared.dataset_id is None:
        raise StageError("the harvester ended without a dataset: see its log")
    return prepared.dataset_id


def _harvest_shards(context: Context, slots: list[Slot], dataset: Dataset) -> None:
    """The ledger: every missing shard is waiting, out with exactly one actor, or committed."""
    rows = sum(commit.num_rows for commit in dataset.commits().values())
    waiting = deque(dataset.missing_shards())
    out: dict[Any, tuple[Slot, Any, int]] = {}
    context.telemetry.set(PLANNED_ROWS, dataset.record.num_rows)
    context.telemetry.set(COMMITTED_ROWS, rows)
    context.tell()
    if not waiting:
        context.console.print(
            f"harvest: dataset {dataset.record.dataset_id} is complete, {rows:,} rows", highlight=False
        )
        return
    with StageProgress(context.console, "harvest", "rows") as progress:
        while waiting or out:
            for slot in slots:
                while waiting and sum(holder is slot for holder, _, _ in out.values()) < _SHARDS_PER_HARVESTER:
                    shard = waiting.popleft()
                    call = slot.actor.harvest.remote(dataset.record.dataset_id, shard)
                    out[call] = (slot, slot.actor, shard)
            context.telemetry.set(QUEUE_DEPTH, len(waiting), stage="harvest")
            context.telemetry.set(COMMITTED_ROWS, rows)
            context.tell()
            progress.update(rows, dataset.record.num_rows, f"{len(out)} shards out, {len(waiting)} waiting")
            done, _ = ray.wait(list(out), num_returns=1, timeout=1.0)
            for call in done:
                slot, actor, shard = out.pop(call)
                try:
                    rows += slot.receive(ray.get(call)).commit.num_rows
                except RayActorError as error:
                    waiting.appendleft(shard)
                    if slot.actor is actor:  # the first of its calls to fail
                        slot.replace(error)
        context.telemetry.set(COMMITTED_ROWS, rows)
        context.tell()
        progress.update(rows, dataset.record.num_rows)


def train(context: Context, dataset_id: str) -> None:
    """Train every SAE to its last step, from the newest saved state; a clean stop saves one more."""
    config = context.config
    placement = context.plan.trainer

    def make(name: str) -> Any:
        return Trainer.options(**placement.options).remote(
            name, config.storage, dataset_id, context.run_id, config.saes, config.train, placement.num_cpus
        )

    slot = context.slot("trainer", 0, make)
    try:
        with StageProgress(context.console, "train", "rows") as progress:
            for advance in _slices(slot):
                context.tell()
                progress.update(
                    advance.rows_trained, config.train.num_steps * config.train.batch_rows, _figures(advance)
                )
    except KeyboardInterrupt:
        _save(slot)
        raise
    finally:
        slot.close()


def _slices(slot: Slot) -> Iterator[Advance]:
    finished = False
    while not finished:
        try:
            advance: Advance = slot.receive(ray.get(slot.actor.advance.remote(_SLICE_SECONDS)))
        except RayActorError as error:
            slot.replace(error)
            continue
        finished = advance.finished
        yield advance


def _save(slot: Slot) -> None:
    try:
        ray.get(slot.actor.save.remote(), timeout=_SAVE_SECONDS)
    except (RayActorError, GetTimeoutError):
        return  # the last saved state stays


def _figures(advance: Advance) -> str:
    return ", ".join(f"{name} FVU {figures['fvu']:.3f}" for name, figures in advance.results.items())


class Evaluation:
    """Follows a run's checkpoints, never the same twice; in a thread while the trainer works, or after it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._trainer_is_done = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Start following in a thread."""
        self._thread = threading.Thread(target=self._guarded, name="evaluation", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Evaluate what is left, and return when every published checkpoint has its report."""
        self._trainer_is_done.set()
        if self._thread is None:
            self._follow()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _guarded(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # raised again in the controller's thread by `finish`
            self._error = error

    def _follow(self) -> None:
        context, placement = self.context, self.context.plan.evaluator
        config = context.config

        def make(name: str) -> Any:
            return Evaluator.options(**placement.options).remote(
                name,
                config.storage,
                config.model,
                config.text,
                config.harvest,
                config.evaluate,
                config.eval_prefixes,
                placement.num_cpus,
            )

        slot: Slot | None = None
        done = 0
        try:
            with StageProgress(context.console, "evaluate", "checkpoints") as progress:
                while True:
                    ending = self._trainer_is_done.is_set()  # looked at before listing, so that nothing slips between
                    pending = pending_checkpoints(context.storage, context.run_id)
                    context.telemetry.set(QUEUE_DEPTH, len(pending), stage="evaluate")
                    context.tell()
                    if pending:
                        slot = slot or context.slot("evaluator", 0, make)
                        total = done + len(pending)
                        for report in _evaluate(slot, context.run_id, pending):
                            done += 1
                            progress.update(done, total, f"{report.name} at step {report.step:,}")
                    elif ending:
                        break
                    else:
                        time.sleep(_FOLLOW_SECONDS)
        finally:
            if slot is not None:
                slot.close()


def _evaluate(slot: Slot, run_id: str, pending: tuple[CheckpointKey, ...]) -> Iterator[MetricsReport]:
    """Reports as they are done. Ends early when the evaluator dies: the caller lists anew what is left."""
    slot.begin()
    try:
        for reference in slot.actor.evaluate.remote(run_id, pending):
            yield slot.receive(ray.get(reference))
    except RayActorError as error:
        slot.replace(error)
    slot.rest()


def pending_checkpoints(storage: Storage, run_id: str) -> tuple[CheckpointKey, ...]:
    """Name and step of the published checkpoints that have no report yet, newest first."""
    found = checkpoints.list_published(storage, run_id)
    return tuple(
        sorted((key for key in found if not reports.is_scored(storage, run_id, *key)), key=lambda key: -key[1])
    )
