"""Unigram and bigram models over token ids: the yardsticks that say what a cross-entropy of the tiny model is worth.

Sequences are 1-D integer arrays that start with a token that is given (the beginning-of-sequence token): it serves as
context and is never predicted. numpy only. Called by the script that trains the tiny model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class NextTokenModel(Protocol):
    """A model of the next token given the one before it."""

    def probability(self, contexts: Ids, tokens: Ids) -> Floats:
        """p(token | context) for each pair; `contexts` and `tokens` are [n], the result is [n]."""
        ...


@dataclass(frozen=True)
class Unigram:
    """Add-one smoothed frequencies: p(w) = (c(w) + 1) / (N + V), with c the count of w, N all counts, V the vocabulary.

    `counts` is [vocabulary].
    """

    counts: Ids

    @classmethod
    def fit(cls, sequences: Iterable[Ids], vocabulary_size: int) -> "Unigram":
        """Count every token of `sequences` but the first of each, which is given."""
        _, tokens = _pairs(sequences)
        return cls(np.bincount(tokens, minlength=vocabulary_size))

    def probability(self, contexts: Ids, tokens: Ids) -> Floats:
        """p(token), the same after every context; [n]."""
        return np.asarray((self.counts[tokens] + 1) / (self.counts.sum() + len(self.counts)), dtype=np.float64)


@dataclass(frozen=True)
class WittenBellBigram:
    """Bigram interpolated with a unigram by Witten and Bell's rule.

    p(w | h) = (c(h, w) + T(h) p(w)) / (c(h) + T(h)), with c(h, w) the count of w after h, c(h) that of all tokens after
    h, T(h) the number of distinct tokens seen after h, and p(w) the unigram. T(h) / (c(h) + T(h)) is the chance that
    the next token is one never seen after h: method C of Witten & Bell, "The zero-frequency problem" (IEEE Trans.
    Information Theory 37(4), 1991); interpolated as in Chen & Goodman, "An empirical study of smoothing techniques for
    language modeling" (1998, section 2.4). A context that was never seen leaves the unigram.

    `pair_keys` holds h * V + w of the pairs seen, ascending, and `pair_counts` their counts; both are [pairs].
    `context_counts` is c(h) and `context_types` T(h); both are [vocabulary].
    """

    unigram: Unigram
    pair_keys: Ids
    pair_counts: Ids
    context_counts: Ids
    context_types: Ids

    @classmethod
    def fit(cls, sequences: Iterable[Ids], vocabulary_size: int) -> "WittenBellBigram":
        """Count every pair of neighbours within each of `sequences`."""
        contexts, tokens = _pairs(sequences)
        keys, counts = np.unique(contexts * vocabulary_size + tokens, return_counts=True)
        return cls(
            unigram=Unigram(np.bincount(tokens, minlength=vocabulary_size)),
            pair_keys=keys,
            pair_counts=counts,
            context_counts=np.bincount(contexts, minlength=vocabulary_size),
            context_types=np.bincount(keys // vocabulary_size, minlength=vocabulary_size),
        )

    def probability(self, contexts: Ids, tokens: Ids) -> Floats:
        """p(token | context) for each pair; [n]."""
        lower = self.unigram.probability(contexts, tokens)
        types = self.context_types[contexts]
        totals = self.context_counts[contexts] + types
        seen = (self._count(contexts, tokens) + types * lower) / np.maximum(totals, 1)
        return np.where(totals > 0, seen, lower)

    def _count(self, contexts: Ids, tokens: Ids) -> Ids:
        keys = contexts * len(self.context_counts) + tokens
        places = np.minimum(np.searchsorted(self.pair_keys, keys), len(self.pair_keys) - 1)
        return np.where(self.pair_keys[places] == keys, self.pair_counts[places], 0)


def cross_entropy_nats(model: NextTokenModel, sequences: Iterable[Ids]) -> float:
    """Mean of -ln p(token | token before it) over every token of `sequences` but the first of each, in nats."""
    contexts, tokens = _pairs(sequences)
    return float(-np.log(model.probability(contexts, tokens)).mean())


def _pairs(sequences: Iterable[Ids]) -> tuple[Ids, Ids]:
    """Every (context, token) of neighbours within a sequence, as two arrays [n]."""
    kept = list(sequences)
    contexts = np.concatenate([sequence[:-1] for sequence in kept])
    tokens = np.concatenate([sequence[1:] for sequence in kept])
    if len(tokens) == 0:
        raise ValueError("sequences hold no token after the first of each: give at least one of two tokens")
    return contexts.astype(np.int64), tokens.astype(np.int64)
