"""The trainer as a Ray actor: a slice of training per call. A shell around `workers.training`."""

import time

import ray
import torch

from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from workers.actors.shell import Reply, Shell
from workers.config import SAEConfig, TrainConfig
from workers.telemetry import (
    CHECKPOINT_AGE_SECONDS,
    TRAIN_BUSY_SECONDS_TOTAL,
    TRAIN_DEAD_SHARE,
    TRAIN_FVU,
    TRAIN_L0,
    TRAIN_LOSS,
    TRAIN_STEP_SECONDS,
    TRAIN_WAIT_SECONDS_TOTAL,
    TRAIN_WAIT_SHARE,
    TRAINED_ROWS_TOTAL,
)
from workers.training.loop import Advance, TrainingLoop


class _Trainer(Shell):
    def __init__(
        self,
        slot: str,
        storage: StorageConfig,
        dataset: str,
        run_id: str,
        saes: tuple[SAEConfig, ...],
        train: TrainConfig,
        num_threads: int,
    ) -> None:
        super().__init__(slot, Storage(storage), num_threads)
        opened = Dataset.open(self.storage, dataset)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loop = TrainingLoop(
            self.storage, opened, run_id, slot, saes, train, device=device, verify=storage.verify_reads
        )
        self.published_at = time.monotonic()

    def advance(self, seconds: float) -> Reply[Advance]:
        """Train for about `seconds`."""
        advance = self.loop.advance(seconds)
        count, gauge = self.telemetry.count, self.telemetry.set
        for duration in advance.step_seconds:
            self.telemetry.observe(TRAIN_STEP_SECONDS, duration)
        count(TRAIN_WAIT_SECONDS_TOTAL, advance.wait_seconds)
        count(TRAIN_BUSY_SECONDS_TOTAL, advance.busy_seconds)
        gauge(TRAIN_WAIT_SHARE, advance.wait_seconds / max(1e-9, advance.wait_seconds + advance.busy_seconds))
        if advance.published:
            self.published_at = time.monotonic()
        for sae, figures in advance.results.items():
            count(TRAINED_ROWS_TOTAL, advance.new_rows, sae=sae)
            gauge(TRAIN_LOSS, figures["loss"], sae=sae)
            gauge(TRAIN_FVU, figures["fvu"], sae=sae)
            gauge(TRAIN_L0, figures["l0"], sae=sae)
            gauge(TRAIN_DEAD_SHARE, figures["dead_share"], sae=sae)
            gauge(CHECKPOINT_AGE_SECONDS, time.monotonic() - self.published_at, sae=sae)
        return self.reply(advance)

    def save(self) -> None:
        """Write the resume state now; what a clean stop asks for."""
        self.loop.save()


Trainer = ray.remote(_Trainer)
