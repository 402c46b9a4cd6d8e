"""Shuffled, prefetched, resumable batches of a complete dataset's rows.

The chunks of an epoch come in an order drawn from (seed, epoch); each run of `window_chunks` of them is a window, whose
kept rows are permuted by (seed, epoch, window) and served in that order. So each chunk is read once per epoch, every
kept row is served exactly once per epoch, and the whole position is three integers. Only rows of one window mix: it
should hold many batches, of many chunks. Epochs follow each other without end.
Called by `workers.training`, and by whoever wants a shuffled sample.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.arrays import EVERY_FLAG, Array, Flag
from storage.filesystem import NUM_CONNECTIONS
from storage.manifest import Dataset

_CHUNK_ORDER, _ROW_ORDER = 0, 1  # the two uses of the seed


@dataclass(frozen=True)
class StreamBatch:
    """Rows of a dataset, in the order drawn."""

    rows: NDArray[np.int64]
    """[batch] row numbers in the dataset."""
    activations: dict[str, Array]
    """Hook -> [batch, d]: float32, or uint16 bits of bfloat16. Free to be changed: no other batch shares them."""
    epoch: int
    """Epoch of the first row, from 0; later rows may belong to the next."""


@dataclass(frozen=True)
class _Window:
    """The kept rows of a window, permuted."""

    rows: NDArray[np.int64]
    activations: dict[str, Array]

    def cut(self, first: int, last: int) -> "_Window":
        return _Window(self.rows[first:last], {hook: values[first:last] for hook, values in self.activations.items()})


@dataclass(frozen=True, order=True)
class _Place:
    """Which window."""

    epoch: int
    window: int


class ActivationStream:
    """Endless batches of `batch_rows` rows of a complete dataset; a thread reads the next window while one is served.

    Memory: two windows, and a chunk per connection. Not for several threads at once. Close it, or use it in `with`.
    """

    def __init__(
        self,
        dataset: Dataset,
        hooks: Sequence[str],
        batch_rows: int,
        seed: int,
        window_chunks: int,
        verify: bool | None = None,
        excluded_flags: Flag = EVERY_FLAG,
    ) -> None:
        self.dataset = dataset
        self.hooks = tuple(hooks)
        self.batch_rows = batch_rows
        self.seed = seed
        self.window_chunks = window_chunks
        self.verify = verify
        self.excluded_flags = excluded_flags
        self.seconds_waited = 0.0
        """Time that `next_batch` spent waiting for data."""
        self._check()
        self.rows_per_epoch = self._count_kept_rows()
        """Rows that pass the filter."""
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"dataset {dataset.record.dataset_id} has no row without {excluded_flags!r}: give it longer text"
            )
        self._reader = ThreadPoolExecutor(1, "stream-window")
        self._chunk_readers = ThreadPoolExecutor(NUM_CONNECTIONS, "stream-chunk")
        self._place = _Place(0, 0)
        self._offset = 0
        self._current: _Window | None = None
        self._next: tuple[_Place, Future[_Window]] | None = None

    def __enter__(self) -> "ActivationStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_batch(self) -> StreamBatch:
        """The next `batch_rows` rows. A reading thread's error is raised here and loses no row: call again to retry."""
        before = self.get_state()
        try:
            return self._next_batch()
        except BaseException:
            self.set_state(before)
            raise

    def get_state(self) -> dict[str, int]:
        """Where the stream is: after `set_state` on an equal stream, the same batches follow."""
        place = {"epoch": self._place.epoch, "window": self._place.window, "offset": self._offset}
        return place | {"seed": self.seed, "window_chunks": self.window_chunks}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a place that `get_state` returned; a ValueError where it came from a stream in another order."""
        for name, ours in (("seed", self.seed), ("window_chunks", self.window_chunks)):
            if state[name] != ours:
                raise ValueError(
                    f"the saved stream has {name} {state[name]}, this one {ours}: resume with the same {name}"
                )
        self._place = _Place(state["epoch"], state["window"])
        self._offset = state["offset"]
        self._current = None

    def close(self) -> None:
        """Stop reading ahead, and let go of the windows."""
        self._reader.shutdown(cancel_futures=True)
        self._chunk_readers.shutdown(cancel_futures=True)
        self._current = self._next = None

    def _check(self) -> None:
        record = self.dataset.record
        for hook in self.hooks:
            if hook not in record.hooks:
                raise ValueError(f"dataset {record.dataset_id} has no hook {hook!r}: it has {', '.join(record.hooks)}")
        for name in ("batch_rows", "window_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        missing = len(self.dataset.missing_shards())
        if missing:
            raise ValueError(
                f"dataset {record.dataset_id} lacks {missing} of {record.num_shards} shards: harvest them first"
            )

    def _count_kept_rows(self) -> int:
        """From the commits where they know, from the flags themselves for a filter of one's own."""
        record = self.dataset.record
        if not self.excluded_flags:
            return record.num_rows
        if self.excluded_flags == EVERY_FLAG:
            return record.num_rows - sum(commit.num_flagged_rows for commit in self.dataset.commits().values())
        return sum(len(self._kept_rows(chunk)) for chunk in range(record.num_chunks))

    def _next_batch(self) -> StreamBatch:
        parts: list[_Window] = []
        epoch = None
        missing = self.batch_rows
        while missing:
            part = self._unserved().cut(self._offset, self._offset + missing)
            epoch = self._place.epoch if epoch is None else epoch
            self._offset += len(part.rows)
            missing -= len(part.rows)
            parts.append(part)
        assert epoch is not None
        if len(parts) == 1:
            return StreamBatch(parts[0].rows, parts[0].activations, epoch)
        activations = {hook: np.concatenate([part.activations[hook] for part in parts]) for hook in self.hooks}
        return StreamBatch(np.concatenate([part.rows for part in parts]), activations, epoch)

    def _unserved(self) -> _Window:
        """The current window, after going on to the first one with a row left."""
        if self._current is None:
            self._current = self._wait_for(self._place)
        while self._offset >= len(self._current.rows):
            following = self._following(self._place)
            self._current = self._wait_for(following)
            self._place, self._offset = following, 0
        return self._current

    def _wait_for(self, place: _Place) -> _Window:
        """The window at `place`, read ahead or not, with the one after it begun."""
        started = time.perf_counter()
        pending, self._next = self._next, None
        try:
            if pending is None or pending[0] != place:
                pending = place, self._reader.submit(self._read, place)
            window = pending[1].result()
        finally:
            self.seconds_waited += time.perf_counter() - started
        following = self._following(place)
        self._next = following, self._reader.submit(self._read, following)
        return window

    def _following(self, place: _Place) -> _Place:
        num_windows = -(-self.dataset.record.num_chunks // self.window_chunks)
        return _Place(place.epoch, place.window + 1) if place.window + 1 < num_windows else _Place(place.epoch + 1, 0)

    def _read(self, place: _Place) -> _Window:
        """Read the chunks of a window, each straight to where the permutation wants its rows."""
        record = self.dataset.record
        order = self._generator(_CHUNK_ORDER, place.epoch).permutation(record.num_chunks)
        first = place.window * self.window_chunks
        chunks = [int(chunk) for chunk in order[first : first + self.window_chunks]]
        kept = list(self._chunk_readers.map(self._kept_rows, chunks))
        ends = np.cumsum([len(rows) for rows in kept])
        permutation = self._generator(_ROW_ORDER, place.epoch, place.window).permutation(int(ends[-1]))
        targets = np.split(permutation, ends[:-1])

        window = self._empty_window(len(permutation))
        for chunk, rows, target in zip(chunks, kept, targets, strict=True):
            window.rows[target] = chunk * record.rows_per_chunk + rows

        def fill(hook: str, chunk: int, rows: NDArray[np.int64], target: NDArray[np.int64]) -> None:
            window.activations[hook][target] = self.dataset.read_chunk(hook, chunk, self.verify)[rows]

        parts = list(zip(chunks, kept, targets, strict=True))
        tasks = [self._chunk_readers.submit(fill, hook, *part) for hook in self.hooks for part in parts]
        for task in tasks:
            task.result()
        return window

    def _kept_rows(self, chunk: int) -> NDArray[np.int64]:
        """Rows of a chunk that pass the filter, counted from its start."""
        flags = self.dataset.read_chunk("flags", chunk, self.verify)
        return np.flatnonzero(flags & int(self.excluded_flags) == 0)

    def _empty_window(self, num_rows: int) -> _Window:
        specs = {hook: self.dataset.specs[hook] for hook in self.hooks}
        activations = {hook: np.empty(spec.shape(num_rows), spec.dtype) for hook, spec in specs.items()}
        return _Window(np.empty(num_rows, np.int64), activations)

    def _generator(self, *use: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=use)))
