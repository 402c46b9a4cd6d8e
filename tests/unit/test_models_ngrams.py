"""The n-gram yardsticks: hand-computed probabilities, and distributions that sum to one."""

import math

import numpy as np
import pytest

from workers.models.ngrams import Ids, Unigram, WittenBellBigram, cross_entropy_nats

VOCABULARY_SIZE = 4


def _ids(*values: int) -> Ids:
    return np.array(values, dtype=np.int64)


# Token 0 begins each sequence. Predicted: 1, 2, 1, 3 and 1, 2. Pairs: 0>1 twice, 1>2 twice, 2>1 once, 1>3 once.
SEQUENCES = [_ids(0, 1, 2, 1, 3), _ids(0, 1, 2)]


def test_the_unigram_adds_one_to_each_count() -> None:
    unigram = Unigram.fit(SEQUENCES, VOCABULARY_SIZE)
    probabilities = unigram.probability(_ids(0, 0, 0, 0), _ids(0, 1, 2, 3))
    np.testing.assert_allclose(probabilities, [1 / 10, 4 / 10, 3 / 10, 2 / 10])


def test_the_bigram_gives_the_mass_of_new_tokens_by_the_number_of_types_seen() -> None:
    bigram = WittenBellBigram.fit(SEQUENCES, VOCABULARY_SIZE)
    # After 1: three tokens of two types, so the unigram has a share of 2 / (3 + 2).
    probabilities = bigram.probability(_ids(1, 1, 1, 1), _ids(0, 1, 2, 3))
    np.testing.assert_allclose(probabilities, [2 * 0.1 / 5, 2 * 0.4 / 5, (2 + 2 * 0.3) / 5, (1 + 2 * 0.2) / 5])


def test_a_context_never_seen_leaves_the_unigram() -> None:
    bigram = WittenBellBigram.fit(SEQUENCES, VOCABULARY_SIZE)
    tokens = _ids(0, 1, 2, 3)
    contexts = np.full(4, 3)
    np.testing.assert_array_equal(bigram.probability(contexts, tokens), bigram.unigram.probability(contexts, tokens))


@pytest.mark.parametrize("model", [Unigram, WittenBellBigram])
def test_probabilities_sum_to_one_after_every_context(model: type[Unigram] | type[WittenBellBigram]) -> None:
    generator = np.random.default_rng(0)
    vocabulary_size = 30
    sequences = [generator.integers(0, 20, size=length) for length in (2, 17, 40)]  # 20 to 29 never occur
    fitted = model.fit(sequences, vocabulary_size)
    tokens = np.arange(vocabulary_size)
    for context in range(vocabulary_size):
        probabilities = fitted.probability(np.full(vocabulary_size, context), tokens)
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_cross_entropy_is_the_mean_surprise_of_all_but_the_first_token() -> None:
    bigram = WittenBellBigram.fit(SEQUENCES, VOCABULARY_SIZE)
    # 0>1: (2 + 1 * 0.4) / 3 = 0.8; 1>2: (2 + 2 * 0.3) / 5 = 0.52; 0>3: (0 + 1 * 0.2) / 3.
    expected = -(math.log(0.8) + math.log(0.52) + math.log(0.2 / 3)) / 3
    assert cross_entropy_nats(bigram, [_ids(0, 1, 2), _ids(0, 3), _ids(0)]) == pytest.approx(expected)


def test_sequences_without_a_token_to_predict_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one of two tokens"):
        Unigram.fit([_ids(0), _ids(1)], VOCABULARY_SIZE)
