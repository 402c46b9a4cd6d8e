"""Windows: what a row is, which rows are flagged, and that text is never taken for a special token."""

import numpy as np
import pytest

from storage.arrays import Flag
from workers.batches import concatenate
from workers.config import ModelConfig
from workers.models.tokens import Tokenizer, iter_windows
from workers.texts.documents import Document

TEXTS = ["def one(x):\n    return x + 1\n", "# <bos> and <pad> are only text here: é → ü\n" * 9, ""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ModelConfig(name="tiny"))


def _windows(tokenizer: Tokenizer, packing: str, context: int = 16):
    documents = [Document(str(n), text) for n, text in enumerate(TEXTS)]
    return concatenate(list(iter_windows(documents, tokenizer, context, packing)))


@pytest.mark.parametrize("packing", ["document", "packed"])
def test_the_usable_tokens_of_all_windows_are_exactly_the_text(tokenizer: Tokenizer, packing: str) -> None:
    windows = _windows(tokenizer, packing)
    for number, text in enumerate(TEXTS):
        mine = windows.usable & (windows.document_ids == number)
        assert tokenizer.hf.decode(windows.token_ids[mine]) == text
        spans = windows.offsets[mine]
        assert [text[a:b] for a, b in spans] == [text[a:b] for a, b in tokenizer.encode([text])[0][1]]


@pytest.mark.parametrize("packing", ["document", "packed"])
def test_every_window_starts_with_bos_and_only_its_end_is_padded(tokenizer: Tokenizer, packing: str) -> None:
    windows = _windows(tokenizer, packing)
    assert (windows.token_ids[:, 0] == tokenizer.first_id).all()
    assert (windows.flags[:, 0] == int(Flag.BOS)).all()
    padding = (windows.flags & int(Flag.PADDING)) != 0
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert (windows.token_ids[padding] == tokenizer.padding_id).all()


def test_the_spelling_of_a_special_token_in_a_text_stays_text(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode(["<bos> <pad> <eos>"])[0]
    assert not set(ids.tolist()) & tokenizer.special_ids


def test_packed_windows_hold_several_documents_behind_a_bos_each(tokenizer: Tokenizer) -> None:
    windows = _windows(tokenizer, "packed")
    boundaries = (windows.flags & int(Flag.BOS)) != 0
    assert boundaries.sum() == len(windows) + len(TEXTS)
    assert not ((windows.flags[:-1] & int(Flag.PADDING)) != 0).any()
