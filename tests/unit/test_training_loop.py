"""The training loop: stopped after any step it goes on to the same bits; what it publishes reads raw activations."""

from itertools import count

import numpy as np
import pytest
import torch

from storage import checkpoints, layout
from storage.arrays import hook_spec
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import DatasetRecord, ModelIdentity, TextIdentity
from storage.reports import read_history
from storage.shards import TokenWriter, encode_chunk, write_shard
from workers.config import SAEConfig, TrainConfig
from workers.sae.module import SparseAutoencoder
from workers.training.loop import TrainingLoop, to_tensor

HOOK, D, RUN, SLOT = "blocks.0.hook_resid_post", 16, "run", "trainer-0"
ROWS, ROWS_PER_CHUNK, CHUNKS_PER_SHARD, CONTEXT = 576, 64, 2, 8
UNFLAGGED = ROWS * (CONTEXT - 1) // CONTEXT  # one BOS a window: 504, so that 32 rows a step end in mid-epoch
SAES = (
    SAEConfig(name="plain", hook=HOOK, d_latent=24, k=3),
    SAEConfig(name="fixed", hook=HOOK, d_latent=24, k=3, nesting="fixed", widths=(6, 12, 24)),
    SAEConfig(name="random", hook=HOOK, d_latent=24, k=3, nesting="random", num_prefixes=3),
)
TRAIN = TrainConfig(
    rows=24 * 32, batch_rows=32, publish_every_rows=8 * 32, dead_after_rows=64, window_chunks=3, save_every_seconds=1e6
)
NUM_STEPS = 24
_roots = count()


def _storage() -> Storage:
    return Storage(StorageConfig(root=f"memory://training-loop-{next(_roots)}"))


def _dataset(storage: Storage, seed: int = 0) -> Dataset:
    """Random bf16 rows about a mean that is far from 0; the first row of each window is flagged, and huge."""
    rng = np.random.default_rng(seed)
    flags = np.tile(np.array([1] + [0] * (CONTEXT - 1)), ROWS // CONTEXT)
    positions = np.tile(np.arange(CONTEXT), ROWS // CONTEXT)
    values = torch.from_numpy(5 + 3 * rng.standard_normal((ROWS, D)) * np.linspace(0.5, 2, D))
    values[torch.from_numpy(flags == 1)] = 1e4
    bits = values.to(torch.bfloat16).view(torch.uint16).numpy()
    record = DatasetRecord(
        dataset_id="toy",
        model=ModelIdentity(name="m", fingerprint="f" * 64, num_layers=1, d_model=D, dtype="float32", causal=True),
        text=TextIdentity(source="files", fingerprint=f"text-{seed}", description="random"),
        hooks={HOOK: D},
        context_tokens=CONTEXT,
        packing="document",
        dtype="bfloat16",
        num_rows=ROWS,
        num_documents=1,
        rows_per_chunk=ROWS_PER_CHUNK,
        chunks_per_shard=CHUNKS_PER_SHARD,
    )
    writer = TokenWriter(storage, record.dataset_id, ROWS_PER_CHUNK)
    writer.append(np.zeros(ROWS, np.int32), positions, np.zeros(ROWS, np.int32), flags)
    writer.finish()
    dataset = Dataset.create(storage, record)
    for shard in range(record.num_shards):
        first = shard * record.rows_per_shard
        write_shard(dataset, shard, {HOOK: bits[first : first + record.rows_in_shard(shard)]}, "test")
    return dataset


def _loop(storage: Storage, dataset: Dataset, train: TrainConfig = TRAIN, run_id: str = RUN) -> TrainingLoop:
    return TrainingLoop(storage, dataset, run_id, SLOT, SAES, train, device=torch.device("cpu"))


def _step(loop: TrainingLoop, num_steps: int) -> list[int]:
    """Take so many steps, one per slice; returns the steps that were published."""
    return [step for _ in range(num_steps) for step in loop.advance(0.0).published]


def _published(storage: Storage, step: int) -> dict[str, str]:
    return {sae.name: checkpoints.load(storage, RUN, sae.name, step)[0].tensors_sha256 for sae in SAES}


def _undisturbed() -> tuple[Storage, Dataset]:
    storage = _storage()
    dataset = _dataset(storage)
    loop = _loop(storage, dataset)
    assert _step(loop, NUM_STEPS) == [8, 16, 24]
    assert loop.finished
    loop.close()
    return storage, dataset


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Storage, Dataset]:
    return _undisturbed()


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([1], id="after the first step"),
        pytest.param([5, 11], id="twice in the middle of an epoch"),
        pytest.param([8], id="at a publication"),
        pytest.param([15, 16, 17], id="around the end of an epoch and a publication"),
        pytest.param([23], id="before the last step"),
    ],
)
def test_a_loop_stopped_and_resumed_publishes_the_bits_of_an_undisturbed_one(
    undisturbed: tuple[Storage, Dataset], stops: list[int]
) -> None:
    assert UNFLAGGED % TRAIN.batch_rows  # no epoch ends with a batch
    storage = _storage()
    dataset = _dataset(storage)
    done = 0
    for stop in [*stops, NUM_STEPS]:
        loop = _loop(storage, dataset)
        assert loop.progress.step == done
        _step(loop, stop - done)
        loop.save()
        loop.close()
        done = stop
    for step in (8, 16, 24):
        assert _published(storage, step) == _published(undisturbed[0], step)
    for sae in SAES:
        assert read_history(storage, RUN, sae.name) == read_history(undisturbed[0], RUN, sae.name)


def test_what_was_not_saved_is_trained_again_and_its_publication_is_kept(
    undisturbed: tuple[Storage, Dataset],
) -> None:
    storage = _storage()
    dataset = _dataset(storage)
    loop = _loop(storage, dataset)
    _step(loop, 5)
    loop.save()
    while loop.progress.step < 8:  # published, then killed before the slice could save
        loop._step()
    loop.publish()
    loop.close()
    loop = _loop(storage, dataset)
    assert loop.progress.step == 5
    assert _step(loop, NUM_STEPS - 5) == [8, 16, 24]
    loop.close()
    for step in (8, 16, 24):
        assert _published(storage, step) == _published(undisturbed[0], step)


def test_publishing_twice_at_a_step_keeps_the_first() -> None:
    storage = _storage()
    loop = _loop(storage, _dataset(storage))
    _step(loop, 8)
    first = _published(storage, 8)
    with torch.no_grad():
        loop.trainers["plain"].sae.b_enc += 1
    loop.publish()
    assert _published(storage, 8) == first
    loop.close()


def test_a_published_sae_reads_raw_activations(undisturbed: tuple[Storage, Dataset]) -> None:
    """On raw rows it does what the trained one does to scaled rows, divided by the scale."""
    storage, dataset = undisturbed
    loop = _loop(storage, dataset)  # restores the last state
    flags = dataset.read_chunk("flags", 0)
    raw = to_tensor(dataset.read_chunk(HOOK, 0)[flags == 0], "bfloat16").float()
    for name, trainer in loop.trainers.items():
        record, tensors = checkpoints.load(storage, RUN, name, NUM_STEPS)
        sae = SparseAutoencoder.from_tensors({key: torch.from_numpy(value) for key, value in tensors.items()})
        threshold = trainer.threshold.value()
        trained = SparseAutoencoder.from_tensors(trainer.sae.tensors() | {"threshold": threshold})
        assert record.threshold == pytest.approx(float(threshold) / trainer.scale)
        assert (sae.encode(raw) > 0).any()
        torch.testing.assert_close(sae(raw), trained(raw * trainer.scale) / trainer.scale, rtol=1e-4, atol=1e-4)
    loop.close()


def test_the_input_scale_and_first_decoder_bias_are_those_of_the_unflagged_rows() -> None:
    storage = _storage()
    dataset = _dataset(storage)
    loop = _loop(storage, dataset)
    chunks = range(dataset.record.num_chunks)
    rows = [dataset.read_chunk(HOOK, chunk)[dataset.read_chunk("flags", chunk) == 0] for chunk in chunks]
    raw = to_tensor(np.concatenate(rows), "bfloat16").double()
    assert len(raw) == UNFLAGGED
    trainer = loop.trainers["plain"]
    assert trainer.scale == pytest.approx((D / float(raw.square().sum(1).mean())) ** 0.5)
    torch.testing.assert_close(trainer.sae.b_dec.double(), raw.mean(0) * trainer.scale, rtol=1e-5, atol=1e-6)
    loop.close()


def test_the_record_and_the_history_tell_what_was_done(undisturbed: tuple[Storage, Dataset]) -> None:
    storage, dataset = undisturbed
    for sae in SAES:
        history = read_history(storage, RUN, sae.name)
        assert [row["step"] for row in history] == list(range(1, NUM_STEPS + 1))
        assert [row["rows"] for row in history] == [32 * step for step in range(1, NUM_STEPS + 1)]
        assert {"loss", "fvu", "l0", "dead_share", "learning_rate"} <= history[-1].keys()
        assert {key for key in history[-1] if key.startswith("fvu_")} == {f"fvu_{width}" for width in sae.widths}
        assert history[-1]["fvu"] < history[0]["fvu"]
        record, _ = checkpoints.load(storage, RUN, sae.name, NUM_STEPS)
        assert record.rows_trained == NUM_STEPS * 32
        assert record.dataset_digest == dataset.record.digest()
        assert record.manifest_digest == dataset.manifest_digest()
        assert record.variant == sae.variant
        assert record.train_metrics["loss"] == history[-1]["loss"]
        assert "step" not in record.train_metrics


def test_an_advance_says_what_it_did_and_a_finished_loop_does_nothing(undisturbed: tuple[Storage, Dataset]) -> None:
    storage = _storage()
    loop = _loop(storage, _dataset(storage))
    first = loop.advance(0.0)
    assert (first.step, first.rows_trained, first.new_rows, first.finished) == (1, 32, 32, False)
    assert len(first.step_seconds) == 1
    assert first.results.keys() == {sae.name for sae in SAES}
    rest = loop.advance(1e6)
    assert (rest.step, rest.new_rows, rest.published, rest.finished) == (24, 23 * 32, [8, 16, 24], True)
    assert sum(rest.step_seconds) <= rest.busy_seconds
    loop.close()
    again = _loop(*undisturbed)
    after = again.advance(1e6)
    assert after.finished
    assert (after.new_rows, after.results, after.published) == (0, {}, [])
    again.close()


def test_a_state_of_another_dataset_is_refused_with_the_way_out() -> None:
    storage = _storage()
    loop = _loop(storage, _dataset(storage))
    _step(loop, 1)
    loop.save()
    loop.close()
    elsewhere = _storage()
    other = _dataset(elsewhere, seed=1)
    with pytest.raises(ValueError, match="pass --new"):
        TrainingLoop(storage, other, RUN, SLOT, SAES, TRAIN, device=torch.device("cpu"))


def test_nan_in_the_stored_activations_is_one_sentence_that_names_the_hook() -> None:
    """No harvester stores one, and a damaged chunk is found by its checksum; here checks are off."""
    storage = _storage()
    dataset = _dataset(storage)
    bad = torch.full((ROWS_PER_CHUNK, D), torch.nan).to(torch.bfloat16).view(torch.uint16).numpy()
    for chunk in range(dataset.record.num_chunks):
        data = encode_chunk(bad, hook_spec(HOOK, D, "bfloat16"), ROWS_PER_CHUNK)
        storage.put(layout.chunk("toy", HOOK, chunk, ndim=2), data)
    loop = TrainingLoop(storage, dataset, RUN, SLOT, SAES, TRAIN, device=torch.device("cpu"), verify=False)
    with pytest.raises(ValueError, match=f"{HOOK} holds NaN") as caught:
        loop.advance(0.0)
    assert "\n" not in str(caught.value)
    loop.close()
    checked = _loop(storage, dataset)
    with pytest.raises(ValueError, match="is damaged"):
        checked.advance(0.0)
    checked.close()


def test_the_published_weights_do_not_depend_on_how_steps_are_cut_into_slices(
    undisturbed: tuple[Storage, Dataset],
) -> None:
    storage = _storage()
    loop = _loop(storage, _dataset(storage))
    loop.advance(1e6)
    loop.close()
    assert _published(storage, NUM_STEPS) == _published(undisturbed[0], NUM_STEPS)
