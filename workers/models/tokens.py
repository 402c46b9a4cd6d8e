"""Text -> windows of tokens, with flags, positions, document ids and character offsets.

One rule for harvesting and evaluating: a window starts with the model's BOS (or CLS) token, and text that happens to
contain the spelling of a special token is tokenised as text. Does not run the model.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from storage.arrays import Flag
from workers.batches import Windows
from workers.config import ModelConfig
from workers.models.catalog import resolve
from workers.texts.documents import Document

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face fast tokenizer and the ids that windows need."""

    hf: Any
    first_id: int
    """BOS or CLS: starts every window."""
    last_id: int | None
    """SEP of an encoder: ends every window; none for causal models."""
    padding_id: int
    special_ids: frozenset[int]

    @classmethod
    def load(cls, config: ModelConfig) -> "Tokenizer":
        """Load by the model's name. Raises ValueError when it is not a fast tokenizer or has no BOS or CLS token."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(str(resolve(config.name)), revision=config.revision)
        if not hf.is_fast:
            raise ValueError(
                f"model.name: the tokenizer of {config.name} gives no character offsets: it needs a tokenizer.json"
            )
        first = hf.bos_token_id if hf.bos_token_id is not None else hf.cls_token_id
        if first is None:
            raise ValueError(f"model.name: the tokenizer of {config.name} has neither a BOS nor a CLS token")
        last = hf.sep_token_id if hf.bos_token_id is None else None
        padding = next(i for i in (hf.pad_token_id, hf.eos_token_id, first) if i is not None)
        return cls(hf, first, last, padding, frozenset(hf.all_special_ids))

    def encode(self, texts: list[str]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
        """Token ids [n] and character offsets [n, 2] of each text, without special tokens."""
        encoded = self.hf(
            texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return [
            (np.asarray(ids, np.int32), np.asarray(offsets, np.int32).reshape(-1, 2))
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def strings(self, token_ids: npt.NDArray[np.int32]) -> list[str]:
        """Each token's own text, for display."""
        distinct, which = np.unique(token_ids, return_inverse=True)
        texts = [str(self.hf.decode([int(token)])) for token in distinct]
        return [texts[index] for index in which]


def iter_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, packing: Literal["document", "packed"]
) -> Iterator[Windows]:
    """Yield the windows of a source in order, in blocks; document ids count from 0.

    `document`: a document is cut into windows, the last one padded. `packed`: documents follow each other, each behind
    a BOS of its own, and only the very last window is padded.
    """
    builder = _Builder(tokenizer, context)
    numbered = enumerate(documents)
    while block := list(islice(numbered, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer.encode([document.text for _, document in block])
        for (number, _), (ids, offsets) in zip(block, encoded, strict=True):
            builder.add(number, ids, offsets, joined=packing == "packed")
        if len(builder.rows) and (windows := builder.take()) is not None:
            yield windows
    builder.flush()
    if (windows := builder.take()) is not None:
        yield windows


class _Builder:
    """Cuts token streams into windows; holds one unfinished window between documents when they are joined."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.room = context - 1 - (tokenizer.last_id is not None)
        self.context = context
        self.rows: list[npt.NDArray[np.int32]] = []
        self.pending = np.empty((0, 4), np.int32)

    def add(self, document: int, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int32], *, joined: bool) -> None:
        """Queue one document's tokens as rows of (id, document, start, end)."""
        rows = np.column_stack([ids, np.full(len(ids), document, np.int32), offsets]).astype(np.int32)
        if joined:
            boundary = np.array([[self.tokenizer.first_id, document, 0, 0]], np.int32)
            rows = np.concatenate([self.pending, boundary, rows])
            whole = len(rows) // self.room * self.room
            self.pending = rows[whole:]
            rows = rows[:whole]
        self.rows.extend(rows[start : start + self.room] for start in range(0, len(rows), self.room))

    def flush(self) -> None:
        """Queue the unfinished window, if any."""
        if len(self.pending):
            self.rows.append(self.pending)
            self.pending = np.empty((0, 4), np.int32)

    def take(self) -> Windows | None:
        """The queued windows, or none."""
        if not self.rows:
            return None
        rows, self.rows = self.rows, []
        return _pad(rows, self.tokenizer, self.context)


def _pad(rows: list[npt.NDArray[np.int32]], tokenizer: Tokenizer, context: int) -> Windows:
    shape = (len(rows), context)
    token_ids = np.full(shape, tokenizer.padding_id, np.int32)
    document_ids = np.zeros(shape, np.int32)
    offsets = np.zeros((*shape, 2), np.int32)
    flags = np.full(shape, int(Flag.PADDING), np.uint8)
    for index, row in enumerate(rows):
        end = 1 + len(row)
        token_ids[index, 1:end] = row[:, 0]
        offsets[index, 1:end] = row[:, 2:]
        document_ids[index] = row[-1, 1]
        document_ids[index, 1:end] = row[:, 1]
        flags[index, 1:end] = 0
        if tokenizer.last_id is not None:
            token_ids[index, end] = tokenizer.last_id
            flags[index, end] = int(Flag.SPECIAL)
    token_ids[:, 0] = tokenizer.first_id
    flags[:, 0] = int(Flag.BOS)
    text = flags == 0
    flags[text & np.isin(token_ids, list(tokenizer.special_ids))] = int(Flag.SPECIAL)
    flags[text & (token_ids == tokenizer.first_id)] = int(Flag.BOS)
    positions = np.broadcast_to(np.arange(context, dtype=np.int32), shape).copy()
    return Windows(token_ids, positions, document_ids, flags, offsets)
