"""First half of a harvest: every row's token is written before any activation: row r is the same token for ever.

A plain function that any harvester can run again after a crash: identical chunks are adopted. Called by the harvester
actor.
"""

from collections.abc import Generator, Iterator

from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import DatasetRecord, ModelIdentity, TextIdentity, digest_of
from storage.shards import TokenWriter
from workers.batches import Windows
from workers.config import HarvestConfig, TextConfig
from workers.models.tokens import Tokenizer, iter_windows
from workers.texts.sources import documents


def dataset_id(
    model: ModelIdentity,
    text: TextIdentity,
    hooks: dict[str, int],
    harvest: HarvestConfig,
    rows_per_chunk: int,
    chunks_per_shard: int,
) -> str:
    """Sixteen hexadecimal digits that name what a harvest would produce: equal inputs find the same dataset again."""
    content = {
        "model": model.fingerprint,
        "model_dtype": model.dtype,
        "text": text.fingerprint,
        "hooks": hooks,
        "context_tokens": harvest.context_tokens,
        "packing": harvest.packing,
        "max_rows": harvest.max_rows,
        "dtype": harvest.dtype,
        "layout": [rows_per_chunk, chunks_per_shard],
        # A forward pass in other batches rounds differently.
        "batch_sequences": harvest.batch_sequences,
    }
    return digest_of(content)[:16]


def tokenise(
    storage: Storage,
    tokenizer: Tokenizer,
    *,
    model: ModelIdentity,
    text: TextIdentity,
    hooks: dict[str, int],
    text_config: TextConfig,
    harvest: HarvestConfig,
    rows_per_chunk: int,
    chunks_per_shard: int,
) -> Generator[int, None, Dataset]:
    """Write the token arrays of a dataset and then its record; yields the rows written so far, returns the dataset.

    Raises ValueError when the source holds no text.
    """
    name = dataset_id(model, text, hooks, harvest, rows_per_chunk, chunks_per_shard)
    writer = TokenWriter(storage, name, rows_per_chunk)
    num_rows = num_documents = 0
    for windows in _limited(
        iter_windows(documents(text_config, "harvest"), tokenizer, harvest.context_tokens, harvest.packing),
        harvest.max_rows,
    ):
        writer.append(
            windows.token_ids.ravel(), windows.positions.ravel(), windows.document_ids.ravel(), windows.flags.ravel()
        )
        num_rows += windows.token_ids.size
        num_documents = int(windows.document_ids.max()) + 1
        yield num_rows
    if num_rows == 0:
        raise ValueError(f"text: {text.description} holds no text to harvest")
    writer.finish()
    record = DatasetRecord(
        dataset_id=name,
        model=model,
        text=text,
        hooks=hooks,
        context_tokens=harvest.context_tokens,
        packing=harvest.packing,
        dtype=harvest.dtype,
        num_rows=num_rows,
        num_documents=num_documents,
        rows_per_chunk=rows_per_chunk,
        chunks_per_shard=chunks_per_shard,
    )
    return Dataset.create(storage, record)


def _limited(blocks: Iterator[Windows], max_rows: int | None) -> Iterator[Windows]:
    """Stop after `max_rows` rows, in whole windows."""
    rows = 0
    for windows in blocks:
        context = windows.token_ids.shape[1]
        if max_rows is not None and rows + windows.token_ids.size > max_rows:
            kept = (max_rows - rows) // context
            if kept:
                yield windows.take(slice(0, kept))
            return
        yield windows
        rows += windows.token_ids.size
