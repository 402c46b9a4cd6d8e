"""TPP: against really decoding and re-evaluating, and cases whose answer is known."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from workers.scores.erasure import WARNING, attribute, targeted_perturbations, top_positive
from workers.scores.probing import balanced_accuracy, dense_probes, mean_differences, sample_examples

NUM_ROWS, D_LATENT, D_IN, NUM_CONCEPTS = 1500, 40, 16, 4


def world(seed=0):
    """Latents that partly follow concepts, a decoder, and activations with an error that no latent explains."""
    rng = np.random.default_rng(seed)
    labels = rng.random((NUM_ROWS, NUM_CONCEPTS)) < 0.4
    latents = np.where(rng.random((NUM_ROWS, D_LATENT)) < 0.15, rng.random((NUM_ROWS, D_LATENT)), 0.0)
    for latent in range(20):
        latents[:, latent] += labels[:, latent % NUM_CONCEPTS] * (rng.random(NUM_ROWS) < 0.8)
    W_dec = rng.standard_normal((D_LATENT, D_IN))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    activations = latents @ W_dec + 0.1 * rng.standard_normal((NUM_ROWS, D_IN)) + 1.0
    fits = np.arange(NUM_ROWS) < 900
    examples = [sample_examples(f"c{column}", column, labels, fits, 200, 20, 0) for column in range(NUM_CONCEPTS)]
    return latents.astype(np.float32), W_dec.astype(np.float32), activations.astype(np.float32), labels, fits, examples


def brute_force(latents, W_dec, activations, probes, labels, fits, examples, nested, n):
    """(intended, unintended) of every concept, by taking the latents out of the activation and probing again."""
    found = []
    for c, target in enumerate(examples):
        y = labels[fits, target.column]
        differences = latents[fits][y].mean(0, dtype=float) - latents[fits][~y].mean(0, dtype=float)
        scores = [max(0.0, d) * float(probes[c].weights @ row) for d, row in zip(differences, W_dec, strict=True)]
        chosen = [j for j in sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:n] if scores[j] > 0]
        x = activations.astype(float)
        for j in chosen:
            x = x - latents[:, [j]].astype(float) * W_dec[j]
        falls = []
        for k, example in enumerate(examples):
            y = labels[example.test, example.column]
            clean = balanced_accuracy(probes[k].logits(activations[example.test]), y)
            falls.append(clean - balanced_accuracy(probes[k].logits(x[example.test]), y))
        others = [k for k in range(len(examples)) if not nested[target.column, examples[k].column]]
        found.append((falls[c], np.mean([falls[k] for k in others]), len(chosen)))
    return found


def test_no_decoding_gives_the_same_as_decoding():
    latents, W_dec, activations, labels, fits, examples = world()
    probes, _ = dense_probes(activations, labels, examples)
    nested = np.eye(NUM_CONCEPTS, dtype=bool)
    nested[0, 2] = nested[2, 0] = True
    results = targeted_perturbations(
        csr_array(latents), W_dec, activations, probes, labels, fits, examples, nested, (1, 3, 40)
    )
    for result, n in zip(results, (1, 3, 40), strict=True):
        expected = brute_force(latents, W_dec, activations, probes, labels, fits, examples, nested, n)
        assert result.num_latents == n
        for score, (intended, unintended, num_erased) in zip(result.scores, expected, strict=True):
            assert score.intended == pytest.approx(intended, abs=1e-12)
            assert score.unintended == pytest.approx(unintended, abs=1e-12)
            assert score.tpp == pytest.approx(intended - unintended, abs=1e-12)
            assert score.num_erased == num_erased <= n
        assert result.mean_tpp == pytest.approx(np.mean([score.tpp for score in result.scores]))
    assert results[0].scores[0].num_erased == 1
    assert results[2].scores[0].num_erased < 40  # only the positive ones
    assert [score.num_others for score in results[0].scores] == [2, 3, 2, 3]
    assert max(abs(score.intended) for score in results[1].scores) > 0.1  # the comparison is not of zeros


def test_a_concept_on_its_own_direction_is_erased_alone():
    rng = np.random.default_rng(1)
    labels = rng.random((1000, 3)) < 0.5
    latents = labels.astype(np.float32)
    activations = (latents + 0.01 * rng.standard_normal((1000, 3))).astype(np.float32)
    fits = np.arange(1000) < 600
    examples = [sample_examples(f"c{column}", column, labels, fits, 200, 20, 0) for column in range(3)]
    probes, clean = dense_probes(activations, labels, examples)
    assert clean.mean == 1.0
    (result,) = targeted_perturbations(
        csr_array(latents),
        np.eye(3, dtype=np.float32),
        activations,
        probes,
        labels,
        fits,
        examples,
        np.eye(3) > 0,
        (1,),
    )
    for score in result.scores:
        assert score.intended == pytest.approx(0.5)  # blind: every answer is no
        assert score.unintended == pytest.approx(0.0, abs=0.02)


def test_residual_channels_are_the_baseline_with_an_identity_decoder():
    _, _, activations, labels, fits, examples = world()
    probes, _ = dense_probes(activations, labels, examples)
    nested, identity = np.eye(NUM_CONCEPTS, dtype=bool), np.eye(D_IN, dtype=np.float32)
    (result,) = targeted_perturbations(activations, identity, activations, probes, labels, fits, examples, nested, (2,))
    expected = brute_force(activations, identity, activations, probes, labels, fits, examples, nested, 2)
    for score, (intended, unintended, _) in zip(result.scores, expected, strict=True):
        assert (score.intended, score.unintended) == (pytest.approx(intended), pytest.approx(unintended))


def test_the_scale_shared_out_between_latent_and_decoder_does_not_matter():
    latents, W_dec, activations, labels, fits, examples = world()
    probes, _ = dense_probes(activations, labels, examples)
    scale = np.float32(2.0) ** np.arange(-20, 20, dtype=np.float32)
    arguments = (activations, probes, labels, fits, examples, np.eye(NUM_CONCEPTS, dtype=bool), (2, 5))
    one = targeted_perturbations(csr_array(latents), W_dec, *arguments)
    other = targeted_perturbations(csr_array(latents * scale), W_dec / scale[:, None], *arguments)
    assert one == other


def test_attribution_ignores_latents_that_fire_less_with_the_label():
    latents, W_dec, activations, labels, _, examples = world()
    probes, _ = dense_probes(activations, labels, examples)
    projections = W_dec.astype(float) @ np.stack([probe.weights for probe in probes], axis=1)
    found = attribute(latents, labels, projections)
    differences = mean_differences(latents, labels)
    assert (found[differences < 0] == 0).all()
    assert np.allclose(found[differences > 0], (differences * projections.T)[differences > 0])


def test_only_positive_attributions_are_chosen_ties_to_the_lower_latent():
    attributions = np.array([[0.0, -1.0, 3.0, 1.0], [2.0, 2.0, 2.0, 0.0]])
    assert top_positive(attributions, 3).tolist() == [[False, False, True, True], [True, True, True, False]]
    assert top_positive(attributions, 2)[1].tolist() == [True, True, False, False]


def test_a_concept_nested_with_all_others_is_refused():
    latents, W_dec, activations, labels, fits, examples = world()
    probes, _ = dense_probes(activations, labels, examples)
    nested = np.eye(NUM_CONCEPTS, dtype=bool)
    nested[1] = nested[:, 1] = True
    with pytest.raises(ValueError, match="concept 'c1' is nested with all others"):
        targeted_perturbations(latents, W_dec, activations, probes, labels, fits, examples, nested, (1,))


def test_concepts_left_out_keep_the_columns_of_the_others():
    latents, W_dec, activations, labels, fits, examples = world()
    kept = examples[1:]
    probes, _ = dense_probes(activations, labels, kept)
    nested = np.eye(NUM_CONCEPTS, dtype=bool)
    (result,) = targeted_perturbations(latents, W_dec, activations, probes, labels, fits, kept, nested, (3,))
    expected = brute_force(latents, W_dec, activations, probes, labels, fits, kept, nested, 3)
    assert [score.concept for score in result.scores] == ["c1", "c2", "c3"]
    assert [score.intended for score in result.scores] == pytest.approx([intended for intended, _, _ in expected])


def test_the_warning_names_its_source():
    assert "arXiv 2605.18229" in WARNING
