"""Harvesting: rows are the model's own hidden states, commits tell the truth, equal inputs find their dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.arrays import Flag
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.moments import as_float32
from storage.records import ModelIdentity, TextIdentity
from workers.config import HarvestConfig, ModelConfig, TextConfig
from workers.harvesting.harvest import harvest_shard
from workers.harvesting.tokenise import dataset_id, tokenise
from workers.models.catalog import TINY
from workers.models.language_model import LanguageModel
from workers.models.tokens import Tokenizer
from workers.texts.sources import identify

CONTEXT, ROWS_PER_CHUNK, CHUNKS_PER_SHARD = 32, 128, 2
HOOKS = {"blocks.0.hook_resid_post": 256, "blocks.2.hook_resid_post": 256}
CONFIG = HarvestConfig(hooks=tuple(HOOKS), context_tokens=CONTEXT, batch_sequences=4)
MODEL = ModelConfig(name="tiny", device="cpu")
Make = Callable[..., Dataset]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    """Four documents of different lengths, all of them in the harvest part."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        lines = [f"def f{number}_{line}(x):\n    return x + {line}\n" for line in range(3 + 9 * number)]
        (folder / f"{number}.py").write_text("\n".join(lines))
    return TextConfig(source="files", paths=(str(folder / "*.py"),), held_out_share=1e-6)


@pytest.fixture(scope="module")
def make(model: LanguageModel, tokenizer: Tokenizer, text: TextConfig) -> Make:
    """Tokenises the four documents under a root, and harvests every shard."""

    def harvested(root: Path, config: HarvestConfig = CONFIG) -> Dataset:
        storage = Storage(StorageConfig(root=str(root)))
        dataset = _tokenise(storage, tokenizer, model.identity, text, config)
        for shard in dataset.missing_shards():
            harvest_shard(dataset, model, shard, config, "test")
        return dataset

    return harvested


@pytest.fixture(scope="module")
def dataset(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("root"))


def _tokenise(
    storage: Storage, tokenizer: Tokenizer, identity: ModelIdentity, text: TextConfig, config: HarvestConfig
) -> Dataset:
    steps = tokenise(
        storage,
        tokenizer,
        model=identity,
        text=identify(text, "harvest"),
        hooks={hook: HOOKS[hook] for hook in config.hooks},
        text_config=text,
        harvest=config,
        rows_per_chunk=ROWS_PER_CHUNK,
        chunks_per_shard=CHUNKS_PER_SHARD,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _tokens(dataset: Dataset) -> dict[str, np.ndarray]:
    shards = [dataset.read_tokens(shard) for shard in range(dataset.record.num_shards)]
    return {name: np.concatenate([tokens[name] for tokens in shards]) for name in shards[0]}


def _rows(dataset: Dataset, hook: str) -> np.ndarray:
    return np.concatenate([dataset.read_chunk(hook, chunk) for chunk in range(dataset.record.num_chunks)])


@pytest.fixture(scope="module")
def reference(dataset: Dataset) -> dict[str, torch.Tensor]:
    """Hidden states [rows, d] of the same tokens by the bare Hugging Face model, with every padded token masked."""
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32, attn_implementation="eager").eval()
    tokens = _tokens(dataset)
    ids = torch.from_numpy(tokens["token_ids"].reshape(-1, CONTEXT).astype(np.int64))
    text = torch.from_numpy((tokens["flags"].reshape(-1, CONTEXT) & int(Flag.PADDING)) == 0)
    with torch.no_grad():
        states = bare(ids, attention_mask=text.long(), output_hidden_states=True).hidden_states
    return {hook: states[int(hook.split(".")[1]) + 1].flatten(0, 1) for hook in HOOKS}


@pytest.mark.parametrize("hook", HOOKS)
def test_stored_rows_are_the_hidden_states_of_the_bare_model(
    dataset: Dataset, reference: dict[str, torch.Tensor], hook: str
) -> None:
    stored = as_float32(_rows(dataset, hook))
    real = (_tokens(dataset)["flags"] & int(Flag.PADDING)) == 0
    expected = reference[hook].numpy()
    assert stored.shape == expected.shape
    # one rounding to 8 bits of mantissa, and float32 sums in another order
    np.testing.assert_allclose(stored[real], expected[real], rtol=2**-8, atol=1e-3)
    assert np.abs(stored[real]).max() > 1


def test_rows_are_whole_documents_behind_bos_padded_at_the_right(
    dataset: Dataset, tokenizer: Tokenizer, text: TextConfig
) -> None:
    tokens = {name: values.reshape(-1, CONTEXT) for name, values in _tokens(dataset).items()}
    assert (tokens["flags"][:, 0] == int(Flag.BOS)).all()
    padding = (tokens["flags"] & int(Flag.PADDING)) != 0
    assert padding.any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert (tokens["positions"] == np.arange(CONTEXT)).all()
    folder = Path(text.paths[0]).parent
    for number in range(4):
        mine = (tokens["document_ids"] == number) & (tokens["flags"] == 0)
        assert tokenizer.hf.decode(tokens["token_ids"][mine]) == (folder / f"{number}.py").read_text()


def test_the_statistics_of_the_commits_are_those_of_the_unflagged_rows(dataset: Dataset) -> None:
    kept = _tokens(dataset)["flags"] == 0
    commits = dataset.commits().values()
    assert len(commits) > 1
    assert sum(commit.num_flagged_rows for commit in commits) == (~kept).sum()
    for hook in HOOKS:
        rows = as_float32(_rows(dataset, hook))[kept].astype(np.float64)
        moments = dataset.moments(hook)
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-12, rtol=1e-9)
        np.testing.assert_allclose(moments.sum_squared_deviations, ((rows - rows.mean(0)) ** 2).sum(0), rtol=1e-9)


def test_a_second_harvest_adopts_every_object_of_the_first(make: Make, tmp_path: Path) -> None:
    first = make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = make(tmp_path)
    assert second.record == first.record
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_committed_shard_is_returned_without_another_forward_pass(dataset: Dataset, model: LanguageModel) -> None:
    again = harvest_shard(dataset, model, 0, CONFIG, "someone else")
    assert again.commit == dataset.commits()[0]
    assert again.forward_seconds == again.write_seconds == 0


def test_another_harvest_of_the_same_inputs_stores_the_same_bits(dataset: Dataset, make: Make, tmp_path: Path) -> None:
    again = make(tmp_path)
    for shard, commit in dataset.commits().items():
        assert again.commits()[shard].chunks == commit.chunks


def test_two_hooks_in_one_pass_store_what_one_alone_does(dataset: Dataset, make: Make, tmp_path: Path) -> None:
    hook = "blocks.0.hook_resid_post"
    alone = make(tmp_path, CONFIG.model_copy(update={"hooks": (hook,)}))
    assert alone.record.dataset_id != dataset.record.dataset_id
    assert (_rows(alone, hook) == _rows(dataset, hook)).all()


@pytest.mark.parametrize(("max_rows", "rows"), [(300, 288), (32, 32), (10**6, None)])
def test_max_rows_cuts_in_whole_windows(
    dataset: Dataset, tokenizer: Tokenizer, text: TextConfig, max_rows: int, rows: int | None
) -> None:
    storage = Storage(StorageConfig(root=f"memory://max-rows-{max_rows}"))
    config = CONFIG.model_copy(update={"max_rows": max_rows})
    cut = _tokenise(storage, tokenizer, dataset.record.model, text, config)
    assert cut.record.num_rows == (rows or dataset.record.num_rows)
    tokens = np.concatenate([cut.read_uncommitted_tokens(n)["token_ids"] for n in range(cut.record.num_shards)])
    assert (tokens == _tokens(dataset)["token_ids"][: len(tokens)]).all()


def test_a_source_without_harvest_text_is_refused(tokenizer: Tokenizer, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    text = TextConfig(source="files", paths=(str(tmp_path / "*.txt"),), held_out_share=1e-6)
    with pytest.raises(ValueError, match="holds no text to harvest"):
        _tokenise(Storage(StorageConfig(root="memory://empty")), tokenizer, dataset.record.model, text, CONFIG)


def _id(config: HarvestConfig = CONFIG, **changes: Any) -> str:
    model = ModelIdentity(name="m", fingerprint="f", num_layers=4, d_model=256, dtype="float32", causal=True)
    text = TextIdentity(source="files", fingerprint="t", description="d")
    model, text = model.model_copy(update=changes.get("model", {})), text.model_copy(update=changes.get("text", {}))
    return dataset_id(model, text, changes.get("hooks", HOOKS), config, ROWS_PER_CHUNK, CHUNKS_PER_SHARD)


@pytest.mark.parametrize(
    "changed",
    [
        _id(text={"fingerprint": "u"}),
        _id(model={"fingerprint": "g"}),
        _id(model={"dtype": "bfloat16"}),
        _id(hooks={"blocks.0.hook_resid_post": 256}),
        *(
            _id(CONFIG.model_copy(update=update))
            for update in (
                {"context_tokens": 64},
                {"dtype": "float32"},
                {"packing": "packed"},
                {"max_rows": 64},
                {"batch_sequences": 8},
            )
        ),
    ],
)
def test_the_dataset_id_changes_with_all_that_changes_its_rows(changed: str) -> None:
    assert changed != _id()


def test_the_dataset_id_does_not_change_with_names_and_descriptions() -> None:
    assert _id(model={"name": "n"}, text={"description": "other words"}) == _id()
    assert len(_id()) == 16
