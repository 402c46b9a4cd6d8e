"""Sparse probing: balanced paired examples, the choice of latents, the probe itself, baselines and controls."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from workers.scores.probing import (
    balanced_accuracy,
    dense_probes,
    fit_probe,
    mean_differences,
    random_direction_probes,
    sample_examples,
    sparse_probes,
)

NUM_ROWS, D_LATENT = 1200, 12


def planted(seed=0):
    """Latents of which 3 fires with concept 0, and 5 and 7 each with half of concept 1; the first half fits."""
    rng = np.random.default_rng(seed)
    labels = rng.random((NUM_ROWS, 2)) < [0.3, 0.4]
    latents = np.where(rng.random((NUM_ROWS, D_LATENT)) < 0.2, rng.random((NUM_ROWS, D_LATENT)), 0.0)
    first_half = rng.random(NUM_ROWS) < 0.5
    latents[:, 3] = 2.0 * labels[:, 0]
    latents[:, 5] = 2.0 * (labels[:, 1] & first_half)
    latents[:, 7] = 2.0 * (labels[:, 1] & ~first_half)
    return latents.astype(np.float32), labels, np.arange(NUM_ROWS) < NUM_ROWS // 2


def examples_of(labels, fits, per_class=100, seed=0):
    return [
        sample_examples(f"c{column}", column, labels, fits, per_class, 10, seed) for column in range(labels.shape[1])
    ]


def test_examples_are_balanced_and_stay_in_their_split():
    _, labels, fits = planted()
    for example in examples_of(labels, fits):
        assert len(set(example.fit.tolist())) == 200
        assert len(set(example.test.tolist())) == 100
        assert fits[example.fit].all()
        assert not fits[example.test].any()
        assert labels[example.fit, example.column].sum() == 100
        assert labels[example.test, example.column].sum() == 50


def test_a_rare_concept_gets_as_many_without_the_label_as_with_it():
    _, _, fits = planted()
    labels = (np.arange(NUM_ROWS) % 60 == 0)[:, None]  # 10 in each split
    (example,) = examples_of(labels, fits)
    assert len(example.fit) == len(example.test) == 20


def test_examples_depend_on_the_seed_and_the_name_but_not_on_other_concepts():
    _, labels, fits = planted()
    one = sample_examples("c", 1, labels, fits, 100, 10, 0)
    moved = sample_examples("c", 0, labels[:, 1:], fits, 100, 10, 0)
    assert np.array_equal(one.fit, moved.fit)
    assert np.array_equal(one.test, moved.test)
    assert not np.array_equal(one.fit, sample_examples("c", 1, labels, fits, 100, 10, 1).fit)
    assert not np.array_equal(one.fit, sample_examples("d", 1, labels, fits, 100, 10, 0).fit)


@pytest.mark.parametrize(("where", "split"), [(slice(0, 600), "fit"), (slice(600, 1200), "test")])
@pytest.mark.parametrize("value", [False, True])
def test_too_few_of_either_class_are_refused(where, split, value):
    labels = (np.arange(NUM_ROWS) % 2 == 0)[:, None]
    labels[where] = value
    fits = np.arange(NUM_ROWS) < 600
    with pytest.raises(ValueError, match=rf"concept 'rare' .* to {split}, of 10 needed"):
        sample_examples("rare", 0, labels, fits, 100, 10, 0)


def test_mean_differences_of_sparse_and_dense_features_are_the_formula():
    latents, labels, _ = planted()
    expected = np.stack([latents[y].mean(0, dtype=float) - latents[~y].mean(0, dtype=float) for y in labels.T])
    assert np.allclose(mean_differences(csr_array(latents), labels), expected, atol=1e-12)
    assert np.allclose(mean_differences(latents, labels), expected, atol=1e-12)


def test_mean_differences_need_both_classes_and_finite_features():
    latents, labels, _ = planted()
    with pytest.raises(ValueError, match="both classes"):
        mean_differences(latents, np.zeros_like(labels))
    latents[4, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        mean_differences(csr_array(latents), labels)


def test_the_probe_is_the_minimum_of_the_penalised_loss():
    rng = np.random.default_rng(0)
    y = np.arange(200) < 80
    x = rng.standard_normal((200, 3)) * [1, 10, 0.1] + y[:, None] * [1, 5, 0.0] + 4
    probe = fit_probe(x, y)
    standardised = (x - x.mean(0)) / x.std(0)
    scaled = probe.weights * x.std(0)
    errors = 1 / (1 + np.exp(-probe.logits(x))) - y
    assert np.allclose(standardised.T @ errors + scaled, 0, atol=0.05)  # gradient of the loss plus that of |w|^2 / 2
    assert abs(errors.sum()) < 0.05  # the bias bears no penalty


def test_a_constant_column_gets_no_weight():
    y = np.arange(40) < 20
    x = np.stack([np.full(40, 0.1), y + np.linspace(0, 1, 40)], axis=1)
    assert fit_probe(x, y).weights[0] == pytest.approx(0.0, abs=1e-12)


def test_a_probe_needs_both_classes_and_finite_columns():
    x, y = np.ones((4, 1)), np.array([True, True, False, False])
    with pytest.raises(ValueError, match="one class"):
        fit_probe(x, np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        fit_probe(x * np.inf, y)
    with pytest.raises(ValueError, match="one class"):
        balanced_accuracy(np.ones(4), np.zeros(4, dtype=bool))


def test_balanced_accuracy_weighs_classes_alike():
    logits = np.array([1.0, 1.0, 1.0, -1.0, 1.0])
    assert balanced_accuracy(logits, np.array([True, True, True, True, False])) == 0.375


def test_the_planted_latents_are_found_and_suffice():
    latents, labels, fits = planted()
    one, two = sparse_probes(csr_array(latents), labels, fits, examples_of(labels, fits), (1, 2))
    assert [score.features[0] for score in one.scores] == [3, pytest.approx(5, abs=2)]
    assert set(two.scores[1].features) == {5, 7}
    assert one.scores[0].balanced_accuracy == 1.0
    assert 0.6 < one.scores[1].balanced_accuracy < 0.9  # one of its two latents
    assert two.scores[1].balanced_accuracy == 1.0
    assert (one.num_features, one.scores[0].num_fit, one.scores[0].num_test) == (1, 200, 100)
    assert one.mean == pytest.approx((1.0 + one.scores[1].balanced_accuracy) / 2)


def test_sparse_and_dense_features_score_alike_whatever_other_k_are_asked():
    latents, labels, fits = planted()
    examples = examples_of(labels, fits)
    expected = sparse_probes(latents, labels, fits, examples, (2,))[0]
    assert sparse_probes(csr_array(latents), labels, fits, examples, (1, 2, 5))[1] == expected


def test_the_test_split_has_no_part_in_the_choice():
    latents, labels, fits = planted()
    other = latents.copy()
    other[~fits, 3], other[~fits, 0] = 0.0, 9.0 * labels[~fits, 0]
    result = sparse_probes(other, labels, fits, examples_of(labels, fits), (1,))[0]
    assert result.scores[0].features == (3,)
    assert result.scores[0].balanced_accuracy == 0.5


def test_the_scale_of_a_latent_does_not_change_its_probe():
    latents, labels, fits = planted()
    examples = examples_of(labels, fits)
    scaled = latents * np.where(np.arange(D_LATENT) == 5, 100.0, 1.0).astype(np.float32)
    before, after = (sparse_probes(z, labels, fits, examples, (2,))[0].scores[1] for z in (latents, scaled))
    assert set(before.features) == set(after.features) == {5, 7}
    assert before.balanced_accuracy == after.balanced_accuracy
    overall = sparse_probes(latents * np.float32(0.001), labels, fits, examples, (1, 2, 5))
    assert overall == sparse_probes(latents, labels, fits, examples, (1, 2, 5))


def test_k_above_the_number_of_latents_is_refused():
    latents, labels, fits = planted()
    with pytest.raises(ValueError, match="k is 13, above the 12 features"):
        sparse_probes(latents, labels, fits, examples_of(labels, fits), (1, 13))


def residual_stream(num_channels=64):
    """Activations in which concept 0 moves one direction that no channel is."""
    rng = np.random.default_rng(5)
    _, labels, fits = planted()
    direction = rng.standard_normal(num_channels)
    direction /= np.linalg.norm(direction)
    noise = rng.standard_normal((NUM_ROWS, num_channels))
    activations = noise + 5.0 * labels[:, :1] * direction
    return activations.astype(np.float32), labels[:, :1], fits


def test_a_dense_probe_reads_what_single_channels_and_random_directions_cannot():
    activations, labels, fits = residual_stream()
    examples = examples_of(labels, fits)
    probes, dense = dense_probes(activations, labels, examples)
    channels = sparse_probes(activations, labels, fits, examples, (1,))[0]
    control = random_direction_probes(activations, labels, examples, k=1, num_controls=20, seed=0)
    assert dense.mean > 0.95
    assert dense.num_features == 64
    assert dense.mean > channels.mean + 0.1 > control.mean + 0.1
    y = labels[examples[0].test, 0]
    assert dense.mean == balanced_accuracy(probes[0].logits(activations[examples[0].test]), y)


def test_controls_are_a_mean_over_draws_and_follow_their_seed():
    activations, labels, fits = residual_stream(num_channels=4)
    examples = examples_of(labels, fits)

    def control(num_controls, seed):
        return random_direction_probes(activations, labels, examples, 1, num_controls, seed).mean

    assert control(3, 0) == control(3, 0)
    assert control(3, 0) != control(3, 1)
    everything = random_direction_probes(activations, labels, examples, 4, 2, 0)  # four directions span the space
    assert everything.mean == pytest.approx(dense_probes(activations, labels, examples)[1].mean, abs=0.03)
