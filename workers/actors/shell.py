"""What every actor does alike: its environment, its threads, what it replies with. No stage's logic is here."""

import os
import socket
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from storage.filesystem import Storage
from workers.telemetry import (
    STORAGE_READ_BYTES_TOTAL,
    STORAGE_RETRIES_TOTAL,
    STORAGE_WRITTEN_BYTES_TOTAL,
    Snapshot,
    Telemetry,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """A result on its way to the controller, with all that the actor has counted so far."""

    result: T
    snapshot: Snapshot


class Shell:
    """Base of the actors' plain classes: one slot's telemetry and storage."""

    def __init__(self, slot: str, storage: Storage, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.slot, self.storage, self.telemetry = slot, storage, Telemetry()
        self._seen = (0, 0, 0)

    @property
    def writer(self) -> str:
        """Who writes: host/pid/slot."""
        return f"{socket.gethostname()}/{os.getpid()}/{self.slot}"

    def pid(self) -> int:
        """The actor's process id; answering shows that it is up."""
        return os.getpid()

    def reply(self, result: T) -> Reply[T]:
        """Wrap a result, after counting the bytes moved since the last reply."""
        now = (self.storage.bytes_read, self.storage.bytes_written, self.storage.num_retries_done)
        metrics = (STORAGE_READ_BYTES_TOTAL, STORAGE_WRITTEN_BYTES_TOTAL, STORAGE_RETRIES_TOTAL)
        for metric, new, old in zip(metrics, now, self._seen, strict=True):
            self.telemetry.count(metric, new - old)
        self._seen = now
        return Reply(result, self.telemetry.snapshot())
