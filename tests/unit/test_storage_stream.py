"""The stream: every kept row once per epoch, in an order that depends on the seed only, resumable at any batch."""

import threading
import time
import uuid
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import layout
from storage.arrays import Array, Flag
from storage.config import StorageConfig
from storage.filesystem import DamagedDataError, Storage
from storage.manifest import Dataset
from storage.stream import ActivationStream, StreamBatch
from storage.testing import flip_bit, toy_activations, toy_dataset, toy_record, toy_tokens

HOOKS = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")


def new_dataset(num_rows: int = 200, complete: bool = True) -> Dataset:
    storage = Storage(StorageConfig(root=f"memory://{uuid.uuid4().hex}"))
    return toy_dataset(storage, toy_record(num_rows), complete)


def new_stream(dataset: Dataset, **changes: object) -> ActivationStream:
    arguments = {"hooks": HOOKS, "batch_rows": 10, "seed": 1, "window_chunks": 3}
    return ActivationStream(dataset, **(arguments | changes))


def rows_of(stream: ActivationStream, num_batches: int) -> Array:
    return np.concatenate([stream.next_batch().rows for _ in range(num_batches)])


def kept_rows(dataset: Dataset, excluded: Flag = Flag.BOS | Flag.PADDING | Flag.SPECIAL) -> Array:
    return np.flatnonzero(toy_tokens(dataset.record)["flags"] & int(excluded) == 0)


def assert_equal(left: StreamBatch, right: StreamBatch) -> None:
    assert left.epoch == right.epoch
    np.testing.assert_array_equal(left.rows, right.rows)
    for hook in HOOKS:
        np.testing.assert_array_equal(left.activations[hook], right.activations[hook])


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(8, 150),
    batch_rows=st.integers(1, 70),
    window_chunks=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_each_epoch_has_every_kept_row_once(num_rows: int, batch_rows: int, window_chunks: int, seed: int) -> None:
    dataset = new_dataset(num_rows)
    kept = kept_rows(dataset)
    with new_stream(dataset, batch_rows=batch_rows, window_chunks=window_chunks, seed=seed) as stream:
        assert stream.rows_per_epoch == len(kept)
        rows = rows_of(stream, -(-3 * len(kept) // batch_rows))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(rows[epoch * len(kept) : (epoch + 1) * len(kept)]), kept)


def test_activations_belong_to_their_rows() -> None:
    dataset = new_dataset()
    expected = toy_activations(dataset.record)
    with new_stream(dataset, batch_rows=17) as stream:
        for _ in range(40):
            batch = stream.next_batch()
            for hook in HOOKS:
                assert batch.activations[hook].dtype == np.uint16
                np.testing.assert_array_equal(batch.activations[hook], expected[hook][batch.rows])


def test_batches_keep_their_size_and_name_the_epoch_of_their_first_row() -> None:
    dataset = new_dataset()
    with new_stream(dataset, batch_rows=64) as stream:
        batches = [stream.next_batch() for _ in range(12)]
        assert {len(batch.rows) for batch in batches} == {64}
        assert [batch.epoch for batch in batches] == [64 * index // stream.rows_per_epoch for index in range(12)]


def test_the_order_depends_on_the_seed_only() -> None:
    dataset = new_dataset()

    def draw(seed: int, batch_rows: int = 10, hooks: tuple[str, ...] = HOOKS) -> list[int]:
        with new_stream(dataset, seed=seed, batch_rows=batch_rows, hooks=hooks) as stream:
            return rows_of(stream, 300 // batch_rows).tolist()

    assert draw(1) == draw(1) == draw(1, batch_rows=30) == draw(1, hooks=HOOKS[:1])
    assert draw(1) != draw(2)


def test_epochs_are_shuffled_differently_and_mix_chunks() -> None:
    dataset = new_dataset()
    with new_stream(dataset, batch_rows=1) as stream:
        rows = rows_of(stream, 2 * stream.rows_per_epoch)
        first, second = rows[: stream.rows_per_epoch], rows[stream.rows_per_epoch :]
    assert first.tolist() != second.tolist()
    changes = sum(left // 16 != right // 16 for left, right in pairwise(first.tolist()))
    assert changes > len(first) / 2  # of 2/3 expected in windows of three chunks


def test_the_order_is_the_recorded_one() -> None:
    """A changed order would make a saved state go on to other rows: the definition written out, and its first rows."""
    dataset = new_dataset()
    flags = toy_tokens(dataset.record)["flags"]

    def generator(*use: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(7, spawn_key=use))

    expected: list[int] = []
    for epoch in range(3):
        chunks = generator(0, epoch).permutation(13)
        for window in range(5):
            rows = [row for chunk in chunks[3 * window : 3 * window + 3] for row in range(16 * chunk, 16 * chunk + 16)]
            kept = [row for row in rows if row < 200 and flags[row] == 0]
            places = generator(1, epoch, window).permutation(len(kept)).tolist()
            expected += [row for _, row in sorted(zip(places, kept, strict=True))]
    with new_stream(dataset, batch_rows=1, seed=7) as stream:
        assert rows_of(stream, 3 * stream.rows_per_epoch).tolist() == expected
    assert expected[:8] == [126, 21, 185, 117, 186, 19, 16, 177]


def test_resuming_at_any_batch_continues_identically() -> None:
    dataset = new_dataset(120)
    with new_stream(dataset, batch_rows=13) as stream:
        states, batches = [], []
        for _ in range(25):
            states.append(stream.get_state())
            batches.append(stream.next_batch())
    assert batches[-1].epoch > 1
    for index, state in enumerate(states):
        with new_stream(dataset, batch_rows=13) as resumed:
            resumed.set_state(state)
            for batch in batches[index : index + 6]:
                assert_equal(resumed.next_batch(), batch)


def test_a_running_stream_can_go_back() -> None:
    with new_stream(new_dataset()) as stream:
        rows_of(stream, 3)
        state = stream.get_state()
        first = rows_of(stream, 40)
        stream.set_state(state)
        np.testing.assert_array_equal(rows_of(stream, 40), first)


def test_a_state_of_another_order_is_refused() -> None:
    dataset = new_dataset()
    with new_stream(dataset) as stream:
        state = stream.get_state()
    with (
        new_stream(dataset, window_chunks=2) as other,
        pytest.raises(ValueError, match="the saved stream has window_chunks 3, this one 2"),
    ):
        other.set_state(state)


@pytest.mark.parametrize("excluded", [Flag(0), Flag.BOS, Flag.PADDING | Flag.SPECIAL])
def test_the_filter_can_be_chosen(excluded: Flag) -> None:
    dataset = new_dataset()
    with new_stream(dataset, excluded_flags=excluded, batch_rows=1) as stream:
        rows = rows_of(stream, stream.rows_per_epoch)
    np.testing.assert_array_equal(np.sort(rows), kept_rows(dataset, excluded))


def test_a_filter_that_leaves_nothing_is_refused() -> None:
    record = toy_record(1)  # one row, BOS
    dataset = toy_dataset(Storage(StorageConfig(root=f"memory://{uuid.uuid4().hex}")), record)
    with pytest.raises(ValueError, match="dataset toy-1 has no row without"):
        new_stream(dataset)


def test_windows_without_a_kept_row_are_passed_over() -> None:
    dataset = new_dataset(33)  # the third chunk holds row 32 only
    storage = dataset.storage
    fresh = Storage(StorageConfig(root=f"memory://{uuid.uuid4().hex}"))
    for key in storage.list(""):
        fresh.put(key, storage.get(key))
    with new_stream(Dataset.open(fresh, "toy-1"), window_chunks=1, batch_rows=5, excluded_flags=Flag.BOS) as stream:
        rows = rows_of(stream, 30)
    assert 30 not in rows
    assert 32 in rows


def test_an_incomplete_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset toy-1 lacks 7 of 7 shards"):
        new_stream(new_dataset(complete=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hooks": ("nowhere",)}, "has no hook 'nowhere': it has blocks.0.hook_resid"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"window_chunks": 0}, "window_chunks is 0"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_stream(new_dataset(), **changes)


def test_each_chunk_is_read_once_per_epoch() -> None:
    dataset = new_dataset(192)
    with new_stream(dataset, window_chunks=4, batch_rows=1) as stream:
        stream.next_batch()
        settle(stream)
        start = dataset.storage.bytes_read
        rows_of(stream, 2 * stream.rows_per_epoch)
        settle(stream)
        chunk_bytes = 16 * (6 * 2 + 4 * 2 + 1)
        assert dataset.storage.bytes_read - start == 2 * 12 * chunk_bytes


def settle(stream: ActivationStream) -> None:
    """Let the window that is being read ahead come in."""
    assert stream._next is not None
    stream._next[1].result()


def test_reads_no_more_than_one_window_ahead() -> None:
    dataset = new_dataset(192)
    with new_stream(dataset, window_chunks=2, batch_rows=1) as stream:
        start = dataset.storage.bytes_read
        stream.next_batch()
        settle(stream)
        time.sleep(0.05)
        assert dataset.storage.bytes_read - start == 4 * 16 * (6 * 2 + 4 * 2 + 1)


def test_a_damaged_chunk_surfaces_and_the_stream_goes_on_once_it_is_restored() -> None:
    dataset = new_dataset()
    with new_stream(dataset) as stream:
        expected = rows_of(stream, 30)
    key = layout.chunk("toy-1", HOOKS[1], 5, 2)
    flip_bit(dataset.storage, key)
    with new_stream(dataset) as stream:
        served: list[Array] = []
        with pytest.raises(DamagedDataError, match=r"hook_resid_post/c/5/0 is damaged: its checksum"):
            served.extend(stream.next_batch().rows for _ in range(30))
        assert len(served) * 10 < stream.rows_per_epoch
        flip_bit(dataset.storage, key)
        rows = np.concatenate([*served, rows_of(stream, 30 - len(served))])
    np.testing.assert_array_equal(rows, expected)


def test_verification_can_be_left_out() -> None:
    dataset = new_dataset()
    flip_bit(dataset.storage, layout.chunk("toy-1", HOOKS[1], 5, 2))
    with new_stream(dataset, verify=False) as stream:
        rows_of(stream, 30)


def test_a_batch_may_be_changed_without_changing_another() -> None:
    dataset = new_dataset()
    with new_stream(dataset) as stream, new_stream(dataset) as untouched:
        for _ in range(40):
            batch = stream.next_batch()
            assert_equal(batch, untouched.next_batch())
            for values in batch.activations.values():
                values[:] = 0


def test_waiting_is_counted_and_closing_stops_the_threads() -> None:
    before = threading.active_count()
    stream = new_stream(new_dataset())
    stream.next_batch()
    assert stream.seconds_waited > 0
    stream.close()
    assert threading.active_count() == before
