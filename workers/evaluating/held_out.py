"""Held-out documents -> windows, their labels, and which documents fit probes and which test them. Runs no model."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from storage.records import TextIdentity
from workers.batches import Windows, concatenate
from workers.config import EvalConfig, HarvestConfig, TextConfig
from workers.models.tokens import Tokenizer, iter_windows
from workers.texts.concepts import Concept, label_document, load_concepts
from workers.texts.documents import Document
from workers.texts.sources import documents, identify

_POOL = 8  # windows to choose from, in multiples of those needed
_MOST_TABLES = 24


@dataclass(frozen=True)
class HeldOut:
    """What every SAE of a run is evaluated on; row r is token r % context of window r // context."""

    identity: TextIdentity
    documents: list[Document]
    windows: Windows
    """[windows, context]; fidelity reads the first ones, probing and erasure as many as they are told."""
    num_fidelity: int
    num_probing: int
    concepts: tuple[Concept, ...]
    """Empty when nothing is known of this kind of text."""
    labels: npt.NDArray[np.bool_]
    """[rows, concepts] over all windows."""
    labelled: npt.NDArray[np.bool_]
    """[rows]: usable tokens of documents that could be labelled."""
    fits: npt.NDArray[np.bool_]
    """[rows]: true where the document belongs to the half that probes are fitted on."""


def load_held_out(text: TextConfig, tokenizer: Tokenizer, harvest: HarvestConfig, evaluate: EvalConfig) -> HeldOut:
    """Choose windows of held-out documents by `evaluate.seed`, and label their tokens.

    Raises ValueError when the source has no held-out text.
    """
    needed = max(evaluate.max_sequences, evaluate.probing_sequences)
    kept: list[Document] = []
    blocks, found = [], 0
    source = _remember(documents(text, "held_out"), kept)
    for block in iter_windows(source, tokenizer, harvest.context_tokens, harvest.packing):
        blocks.append(block)
        found += len(block)
        if text.source == "hub" and found >= _POOL * needed:
            break
    if not blocks:
        raise ValueError(f"text: {text.source} has no held-out documents: raise text.held_out_share")
    generator = np.random.default_rng([evaluate.seed, 0])
    windows = concatenate(blocks)
    windows = windows.take(generator.permutation(len(windows))[:needed])
    concepts, labels, labelled = _label(text, kept, windows)
    return HeldOut(
        identity=identify(text, "held_out"),
        documents=kept,
        windows=windows,
        num_fidelity=min(len(windows), evaluate.max_sequences),
        num_probing=min(len(windows), evaluate.probing_sequences),
        concepts=concepts,
        labels=labels,
        labelled=labelled & windows.usable.ravel(),
        fits=_half_of_documents(windows.document_ids.ravel(), kept),
    )


def _remember(source: Iterable[Document], kept: list[Document]) -> Iterator[Document]:
    for document in source:
        kept.append(document)
        yield document


def _half_of_documents(document_ids: npt.NDArray[np.int32], kept: list[Document]) -> npt.NDArray[np.bool_]:
    """Every second document by name, so that a package of two files has one on each side."""
    by_name = sorted(np.unique(document_ids).tolist(), key=lambda number: kept[number].name)
    return np.isin(document_ids, by_name[::2])


def _label(
    text: TextConfig, kept: list[Document], windows: Windows
) -> tuple[tuple[Concept, ...], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    if text.source == "sae-probes":
        return _table_labels(kept, windows)
    if all(document.name.endswith(".py") for document in kept):
        return _python_labels(kept, windows)
    rows = windows.token_ids.size
    return (), np.zeros((rows, 0), np.bool_), np.zeros(rows, np.bool_)


def _python_labels(
    kept: list[Document], windows: Windows
) -> tuple[tuple[Concept, ...], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Python's own tokenizer and parser say what each token is."""
    concepts = load_concepts()
    owner, offsets = windows.document_ids.ravel(), windows.offsets.reshape(-1, 2)
    labels = np.zeros((len(owner), len(concepts)), np.bool_)
    labelled = np.zeros(len(owner), np.bool_)
    order = np.argsort(owner, kind="stable")
    edges = [0, *(np.flatnonzero(np.diff(owner[order])) + 1).tolist(), len(order)]
    for start, end in pairwise(edges):
        rows = order[start:end]
        document = kept[int(owner[rows[0]])]
        found = label_document(document.name, document.text, [tuple(pair) for pair in offsets[rows].tolist()], concepts)
        if found is not None:
            labels[rows], labelled[rows] = found, True
    return concepts, labels, labelled


def _table_labels(
    kept: list[Document], windows: Windows
) -> tuple[tuple[Concept, ...], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which labelled set a text is from: a label of the whole document, given to each of its tokens."""
    owner = windows.document_ids.ravel()
    tables = np.array([document.name.partition("/")[0] for document in kept])[owner]
    common = [name for name, _ in Counter(tables[windows.usable.ravel()].tolist()).most_common(_MOST_TABLES)]
    concepts = tuple(
        Concept(name=f"from:{name}", parent=None, kind="file", description=f"The text is from the set {name}")
        for name in common
    )
    return concepts, tables[:, None] == np.array(common)[None, :], np.ones(len(owner), np.bool_)
