"""Shards: what is visible is complete, checksummed and never changes, whoever died and when."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage import layout
from storage.arrays import TOKEN_ARRAYS, array_specs, decode_chunk, encode_chunk
from storage.config import StorageConfig
from storage.filesystem import DamagedDataError, Storage, StorageConflictError
from storage.manifest import Dataset, list_datasets
from storage.moments import as_float32, merge_moments, moments_of
from storage.records import ShardCommit
from storage.shards import TokenWriter, write_shard
from storage.testing import (
    FlakyStorage,
    flip_bit,
    shard_of,
    toy_activations,
    toy_dataset,
    toy_record,
    toy_tokens,
    truncate,
)

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageConfig(root=f"memory://{uuid.uuid4().hex}"))


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(root=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_rows", [7, 96, 100])
def test_reads_what_was_written(storage: Storage, dtype: str, num_rows: int) -> None:
    record = toy_record(num_rows, dtype=dtype)
    toy_dataset(storage, record)
    dataset = Dataset.open(storage, record.dataset_id)
    assert dataset.is_complete
    expected = toy_tokens(record) | toy_activations(record)
    for name, values in expected.items():
        chunks = [dataset.read_chunk(name, chunk) for chunk in range(record.num_chunks)]
        np.testing.assert_array_equal(np.concatenate(chunks), values)
    shards = [dataset.read_tokens(shard) for shard in range(record.num_shards)]
    for name in TOKEN_ARRAYS:
        np.testing.assert_array_equal(np.concatenate([tokens[name] for tokens in shards]), expected[name])


@pytest.mark.parametrize("num_rows", [7, 100])
def test_another_zarr_reader_sees_the_same_bits(disk: Storage, num_rows: int) -> None:
    record = toy_record(num_rows)
    dataset = toy_dataset(disk, record)
    group = zarr.open_group(disk.url(layout.group(record.dataset_id)), mode="r")
    assert set(group.array_keys()) == set(array_specs(record))
    for name, values in (toy_tokens(record) | toy_activations(record)).items():
        np.testing.assert_array_equal(group[name][:], values)
    assert group[HOOK].attrs["logical_dtype"] == "bfloat16"
    assert group[HOOK].metadata.dimension_names == ("row", "dimension")
    assert group.attrs["dataset_digest"] == dataset.digest


def test_nothing_is_visible_before_the_commit(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record, complete=False)
    with pytest.raises(ValueError, match="shard 0 of dataset toy-1 is not committed"):
        dataset.read_chunk("token_ids", 0)
    np.testing.assert_array_equal(dataset.read_uncommitted_tokens(3)["flags"], toy_tokens(record)["flags"][96:])
    write_shard(dataset, 2, shard_of(record, toy_activations(record), 2), writer="w")
    assert dataset.missing_shards() == [0, 1, 3]
    assert not dataset.is_complete
    np.testing.assert_array_equal(dataset.read_chunk(HOOK, 4), toy_activations(record)[HOOK][64:80])


def test_moments_equal_those_of_the_unflagged_rows(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record)
    kept = toy_tokens(record)["flags"] == 0
    values = as_float32(toy_activations(record)[HOOK]).astype(np.float64)[kept]
    moments = dataset.moments(HOOK)
    assert moments.count == kept.sum()
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.sum_squared_deviations, ((values - values.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-12
    )
    flagged = sum(commit.num_flagged_rows for commit in dataset.commits().values())
    assert flagged == record.num_rows - kept.sum()


def test_moments_of_large_offsets_keep_their_digits() -> None:
    values = (np.random.default_rng(0).normal(size=(3000, 3)) * 1e-2 + 1e4).astype(np.float32)
    everything = np.ones(len(values), bool)
    parts = [moments_of(values[first : first + 700], everything[first : first + 700]) for first in range(0, 3000, 700)]
    merged = merge_moments(parts)
    np.testing.assert_allclose(
        np.array(merged.sum_squared_deviations) / 3000, values.astype(np.float64).var(axis=0), rtol=1e-9
    )
    nothing = moments_of(values, ~everything)
    assert merge_moments([nothing, parts[0], nothing]) == parts[0]


def test_bfloat16_bits_are_the_upper_half_of_a_float32() -> None:
    bits = np.array([0x3F80, 0xBF80, 0x4049, 0x0000, 0x7F80], np.uint16)
    np.testing.assert_array_equal(as_float32(bits), np.array([1.0, -1.0, 3.140625, 0.0, np.inf], np.float32))


def test_a_full_chunk_is_not_copied_and_a_short_one_is_padded() -> None:
    spec = array_specs(toy_record())[HOOK]
    full = np.arange(64, dtype="<u2").reshape(16, 4)
    assert np.shares_memory(np.frombuffer(encode_chunk(full, spec, 16), np.uint8), full)
    short = decode_chunk(bytes(encode_chunk(full[:5], spec, 16)), spec, 16, "here")
    np.testing.assert_array_equal(short[:5], full[:5])
    assert not short[5:].any()
    np.testing.assert_array_equal(
        decode_chunk(bytes(encode_chunk(full[:, ::-1], spec, 16)), spec, 16, ""), full[:, ::-1]
    )


def test_a_second_writer_gets_the_first_commit_and_changes_nothing(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record, complete=False)
    first = write_shard(dataset, 0, shard_of(record, toy_activations(record), 0), writer="first")
    other = Dataset.open(storage, record.dataset_id)
    assert write_shard(other, 0, shard_of(record, toy_activations(record, seed=1), 0), writer="second") == first
    np.testing.assert_array_equal(other.read_chunk(HOOK, 1), toy_activations(record)[HOOK][16:32])


def test_a_retry_adopts_the_chunks_of_a_dead_writer_with_their_own_checksums(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record, complete=False)
    dead, retry = toy_activations(record, seed=1), toy_activations(record)
    spec = dataset.specs[HOOK]
    storage.put(layout.chunk(record.dataset_id, HOOK, 1, 2), encode_chunk(dead[HOOK][16:32], spec, 16))
    write_shard(dataset, 0, shard_of(record, retry, 0), writer="retry")
    stored = np.concatenate([retry[HOOK][:16], dead[HOOK][16:32]])
    np.testing.assert_array_equal(np.concatenate([dataset.read_chunk(HOOK, chunk) for chunk in (0, 1)]), stored)
    kept = toy_tokens(record)["flags"][:32] == 0
    np.testing.assert_allclose(dataset.moments(HOOK).mean, as_float32(stored)[kept].mean(axis=0), rtol=1e-5)


def test_racing_writers_of_different_bits_agree_on_one_commit(disk: Storage) -> None:
    record = toy_record(32)
    toy_dataset(disk, record, complete=False)

    def write(seed: int) -> ShardCommit:
        dataset = Dataset.open(disk, record.dataset_id)
        return write_shard(dataset, 0, toy_activations(record, seed), writer=f"writer {seed}")

    with ThreadPoolExecutor(6) as pool:
        commits = list(pool.map(write, range(6)))
    assert len({commit.digest() for commit in commits}) == 1
    dataset = Dataset.open(disk, record.dataset_id)
    for chunk in range(2):
        read = dataset.read_chunk(HOOK, chunk, verify=True)
        assert any(np.array_equal(read, toy_activations(record, seed)[HOOK][chunk * 16 :][:16]) for seed in range(6))


def test_a_chunk_of_the_wrong_size_is_not_adopted(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record, complete=False)
    storage.put(layout.chunk(record.dataset_id, HOOK, 0, 2), b"cut short")
    with pytest.raises(DamagedDataError, match=r"hook_resid_post/c/0/0 is damaged: it has 9 bytes"):
        write_shard(dataset, 0, shard_of(record, toy_activations(record), 0), writer="w")
    assert dataset.missing_shards() == [0, 1, 2, 3]


KILLED_HARVESTER = """
import sys
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.shards import write_shard
from storage.testing import shard_of, toy_activations
dataset = Dataset.open(Storage(StorageConfig(root=sys.argv[1])), "toy-1")
activations = toy_activations(dataset.record)
for shard in range(dataset.record.num_shards):
    write_shard(dataset, shard, shard_of(dataset.record, activations, shard), writer="killed")
"""


def kill_after(num_commits: int, dataset: Dataset) -> None:
    """Start a harvester, and kill it once so many shards are committed."""
    storage = dataset.storage
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_HARVESTER, storage.config.root], cwd=Path(__file__).parents[2]
    )
    while len(storage.names(layout.commits("toy-1"))) < num_commits:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()


def test_killed_harvesters_leave_whole_shards_and_the_next_one_finishes(disk: Storage) -> None:
    record = toy_record(960)
    expected = toy_activations(record)
    dataset = toy_dataset(disk, record, complete=False)
    for num_commits in (2, 8, 14):
        kill_after(num_commits, dataset)
        visible = dataset.commits()
        assert num_commits <= len(visible) < record.num_shards
        for shard in visible:
            for chunk in record.chunks_of(shard):
                rows = slice(chunk * 16, chunk * 16 + 16)
                np.testing.assert_array_equal(dataset.read_chunk(HOOK, chunk, verify=True), expected[HOOK][rows])
    for shard in dataset.missing_shards():
        write_shard(dataset, shard, shard_of(record, expected, shard), writer="last")
    assert dataset.is_complete
    chunks = [dataset.read_chunk(HOOK, chunk) for chunk in range(record.num_chunks)]
    np.testing.assert_array_equal(np.concatenate(chunks), expected[HOOK])


def damaged(storage: Storage, damage: Callable[[Storage, str], None]) -> Dataset:
    record = toy_record()
    toy_dataset(storage, record)
    damage(storage, layout.chunk(record.dataset_id, HOOK, 3, 2))
    return Dataset.open(storage, record.dataset_id)


def test_a_flipped_bit_is_found(storage: Storage) -> None:
    dataset = damaged(storage, lambda storage, key: flip_bit(storage, key, position=77))
    with pytest.raises(DamagedDataError, match=r"hook_resid_post/c/3/0 is damaged: its checksum"):
        dataset.read_chunk(HOOK, 3)
    dataset.read_chunk(HOOK, 3, verify=False)
    dataset.read_chunk(HOOK, 2)


def test_a_missing_chunk_is_found(storage: Storage) -> None:
    dataset = damaged(storage, lambda storage, key: storage.delete(key))
    with pytest.raises(DamagedDataError, match=r"hook_resid_post/c/3/0 is missing, though its shard is committed"):
        dataset.read_chunk(HOOK, 3)


def test_a_short_chunk_is_found_without_checksums(storage: Storage) -> None:
    dataset = damaged(storage, lambda storage, key: truncate(storage, key, 100))
    with pytest.raises(DamagedDataError, match=r"c/3/0 is damaged: it has 100 bytes, 128 were committed"):
        dataset.read_chunk(HOOK, 3, verify=False)


def test_a_torn_commit_is_named(storage: Storage) -> None:
    toy_dataset(storage, toy_record())
    truncate(storage, layout.commit("toy-1", 2), 200)
    with pytest.raises(ValueError, match=r"commits/00000002.json is not JSON"):
        Dataset.open(storage, "toy-1").commits()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset_digest", "0" * 64, "belongs to another dataset or shard"),
        ("shard", 1, "belongs to another dataset or shard"),
        ("chunks", {}, "does not list every chunk"),
    ],
)
def test_a_commit_that_does_not_fit_is_named(storage: Storage, field: str, value: object, message: str) -> None:
    toy_dataset(storage, toy_record())
    key = layout.commit("toy-1", 0)
    storage.put(key, json.dumps(json.loads(storage.get(key)) | {field: value}).encode())
    with pytest.raises(DamagedDataError, match=rf"00000000.json {message}"):
        Dataset.open(storage, "toy-1").commits()


def test_creating_again_adopts_the_same_and_refuses_another_dataset(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record)
    written = storage.bytes_written
    assert Dataset.create(storage, record).digest == dataset.digest
    assert storage.bytes_written == written
    with pytest.raises(StorageConflictError, match=r"dataset.json exists and is another dataset"):
        Dataset.create(storage, toy_record(101))
    assert Dataset.open(storage, record.dataset_id).record == record


def test_creating_over_arrays_of_another_shape_is_refused(storage: Storage) -> None:
    Dataset.create(storage, toy_record())
    storage.delete(layout.dataset_record("toy-1"))
    with pytest.raises(StorageConflictError, match=r"zarr.json exists with another"):
        Dataset.create(storage, toy_record(101))


def test_a_hook_may_not_take_the_name_of_a_token_array(storage: Storage) -> None:
    with pytest.raises(ValueError, match="'flags' has the name of another array"):
        Dataset.create(storage, toy_record(hooks={"flags": 4}))


def test_tokens_written_again_are_adopted_and_other_text_is_refused(storage: Storage) -> None:
    record = toy_record()
    tokens = toy_tokens(record)
    for pieces in (1, 7):
        writer = TokenWriter(storage, "toy-1", 16)
        for piece in range(pieces):
            writer.append(**{name: np.array_split(values, pieces)[piece] for name, values in tokens.items()})
        assert writer.finish() == 100
    writer = TokenWriter(storage, "toy-1", 16)
    with pytest.raises(StorageConflictError, match="token_ids/c/0"):
        writer.append(**(tokens | {"token_ids": tokens["token_ids"] + 1}))


def test_tokens_that_do_not_fit_are_refused(storage: Storage) -> None:
    tokens = toy_tokens(toy_record())
    writer = TokenWriter(storage, "toy-1", 16)
    with pytest.raises(ValueError, match="token_ids holds a value that int32 cannot"):
        writer.append(**(tokens | {"token_ids": tokens["token_ids"] + 2**31}))
    writer = TokenWriter(storage, "toy-1", 16)
    with pytest.raises(ValueError, match="flags has shape"):
        writer.append(**(tokens | {"flags": tokens["flags"][1:]}))


def test_activations_that_do_not_fit_are_refused_before_anything_is_written(storage: Storage) -> None:
    record = toy_record(dtype="float32")
    dataset = toy_dataset(storage, record, complete=False)
    good = shard_of(record, toy_activations(record), 0)
    broken = {hook: values.copy() for hook, values in good.items()}
    broken[HOOK][3, 1] = np.nan
    cases = {
        "is NaN or infinite": broken,
        "float64": good | {HOOK: good[HOOK].astype(np.float64)},
        r"\(31, 4\) given": good | {HOOK: good[HOOK][1:]},
        "was given for hooks": {HOOK: good[HOOK]},
    }
    for message, activations in cases.items():
        with pytest.raises(ValueError, match=message):
            write_shard(dataset, 0, activations, writer="w")
    assert not storage.exists(layout.chunk(record.dataset_id, HOOK, 0, 2))
    with pytest.raises(ValueError, match="shard 4 is not in dataset"):
        write_shard(dataset, 4, good, writer="w")
    broken[HOOK][3, 1], broken[HOOK][0, 1] = 0.0, np.inf  # row 0 is BOS: an attention sink may overflow
    write_shard(dataset, 0, broken, writer="w")


def test_the_manifest_digest_follows_the_commits(storage: Storage) -> None:
    record = toy_record()
    dataset = toy_dataset(storage, record, complete=False)
    digests = [dataset.manifest_digest()]
    for shard in (3, 0, 2, 1):
        write_shard(dataset, shard, shard_of(record, toy_activations(record), shard), writer="w")
        digests.append(dataset.manifest_digest())
    assert len(set(digests)) == 5
    assert Dataset.open(storage, record.dataset_id).manifest_digest() == digests[-1]
    assert list(dataset.commits()) == [0, 1, 2, 3]


def test_commits_are_read_once(storage: Storage) -> None:
    toy_dataset(storage, toy_record())
    dataset = Dataset.open(storage, "toy-1")
    dataset.commits()
    read = storage.bytes_read
    assert dataset.is_complete
    dataset.manifest_digest()
    assert storage.bytes_read == read


def test_a_dataset_survives_a_flaky_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.filesystem._FIRST_DELAY_SECONDS", 0.001)
    for lose_answers in (False, True):
        config = StorageConfig(root=str(tmp_path / str(lose_answers)), num_retries=20)
        flaky = FlakyStorage(config, fail_every=3, lose_answers=lose_answers)
        record = toy_record()
        dataset = toy_dataset(flaky, record)
        assert dataset.is_complete
        assert flaky.num_retries_done > 10
        np.testing.assert_array_equal(dataset.read_chunk(HOOK, 6), toy_activations(record)[HOOK][96:])


def test_datasets_are_listed(storage: Storage) -> None:
    assert list_datasets(storage) == []
    toy_dataset(storage, toy_record(dataset_id="b"), complete=False)
    toy_dataset(storage, toy_record(dataset_id="a"))
    TokenWriter(storage, "no-record-yet", 16).append(**toy_tokens(toy_record()))
    assert list_datasets(storage) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="no-record-yet"):
        Dataset.open(storage, "no-record-yet")
