"""Targeted probe perturbation (TPP): does erasing a concept's latents blind that concept's probe and no other?

SAEBench's TPP, for labelled tokens: the mean over a text's tokens falls away, and so does its leak of padding, since
rows are real tokens only. Clean and ablated accuracy are of the same examples. Called by the evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

from workers.scores.probing import Examples, Features, LinearProbe, balanced_accuracy, mean_differences

WARNING = (
    "Read TPP with care: an audit of SAEBench (Chanin 2026, arXiv 2605.18229) finds TPP and SCR unreliable at their "
    "canonical settings; TPP falls as SAEs train longer. Do not rank SAEs by it alone."
)
"""Printed beside every TPP."""


@dataclass(frozen=True)
class ErasureScore:
    """What erasing one concept's latents does to the probes' balanced accuracies."""

    concept: str
    intended: float
    """Fall of the concept's own probe."""
    unintended: float
    """Mean fall of the other concepts' probes, its ancestors and descendants left out."""
    num_erased: int
    """Latents erased: n, or fewer where fewer have a positive attribution."""
    num_others: int
    """Probes in the unintended mean."""

    @property
    def tpp(self) -> float:
        """Intended minus unintended."""
        return self.intended - self.unintended


@dataclass(frozen=True)
class ErasureResult:
    """Erasures of at most `num_latents` latents, one per concept."""

    num_latents: int
    scores: tuple[ErasureScore, ...]

    @property
    def mean_tpp(self) -> float:
        """Mean TPP over concepts."""
        return float(np.mean([score.tpp for score in self.scores]))


def targeted_perturbations(
    features: Features,
    W_dec: Float[np.ndarray, "features d_in"],
    activations: Float[np.ndarray, "rows d_in"],
    probes: Sequence[LinearProbe],
    labels: Bool[np.ndarray, "rows concepts"],
    fits: Bool[np.ndarray, " rows"],
    examples: Sequence[Examples],
    nested: Bool[np.ndarray, "concepts concepts"],
    ns: Sequence[int],
) -> tuple[ErasureResult, ...]:
    """TPP of every concept in `examples`, for each n: its top n latents are taken out of the activation.

    x' = x - sum of z_j W_dec[j] over the n latents with the largest attribution to the concept, if positive. `probes`
    read `activations`, one per example set. For the baseline on residual channels pass the activations as features and
    the identity as W_dec. `nested` marks pairs of which one is the other's ancestor, by column of the labels: erasing
    `if` should harm the probe of `keyword`, so neither counts as the other's bystander. ValueError if a concept has no
    other to be compared with.
    """
    columns = [example.column for example in examples]
    others = ~nested[np.ix_(columns, columns)]
    for example, row in zip(examples, others, strict=True):
        if not row.any():
            raise ValueError(f"concept {example.concept!r} is nested with all others: TPP needs one that is not")
    projections = W_dec.astype(np.float64) @ np.stack([probe.weights for probe in probes], axis=1)
    attributions = attribute(features[fits], labels[fits][:, columns], projections)
    erased = [top_positive(attributions, n) for n in ns]
    falls = _accuracy_falls(features, activations, probes, labels, examples, projections, erased)
    return tuple(
        ErasureResult(n, _scores(examples, others, chosen, fall))
        for n, chosen, fall in zip(ns, erased, falls, strict=True)
    )


def attribute(
    features: Features,
    labels: Bool[np.ndarray, "rows concepts"],
    projections: Float64[np.ndarray, "features concepts"],
) -> Float64[np.ndarray, "concepts features"]:
    """max(0, mean of z_j with the label - without) (w_c . W_dec[j]); `projections` are the W_dec[j] . w_c."""
    attributions: Float64[np.ndarray, "concepts features"] = (
        np.maximum(mean_differences(features, labels), 0.0) * projections.T
    )
    return attributions


def top_positive(
    attributions: Float64[np.ndarray, "concepts features"], n: int
) -> Bool[np.ndarray, "concepts features"]:
    """The n largest of each row, and of these only the positive ones (SAEBench fills up with zeros and negatives)."""
    order = np.argsort(-attributions, axis=1, kind="stable")[:, :n]
    chosen = np.zeros(attributions.shape, dtype=np.bool_)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & (attributions > 0)


def _accuracy_falls(
    features: Features,
    activations: Float[np.ndarray, "rows d_in"],
    probes: Sequence[LinearProbe],
    labels: Bool[np.ndarray, "rows concepts"],
    examples: Sequence[Examples],
    projections: Float64[np.ndarray, "features erased"],
    erased: Sequence[Bool[np.ndarray, "erased features"]],
) -> Float64[np.ndarray, "ns erased erased"]:
    """[n, c, k]: clean minus ablated accuracy of probe k where concept c is erased.

    Nothing is decoded: the probe's logit changes by the sum of z_j (W_dec[j] . w_k) over the erased latents.
    """
    falls = np.empty((len(erased), len(examples), len(examples)))
    for k, (example, probe) in enumerate(zip(examples, probes, strict=True)):
        y = labels[example.test, example.column]
        logits = probe.logits(activations[example.test])
        clean = balanced_accuracy(logits, y)
        latents = features[example.test]
        for number, chosen in enumerate(erased):
            changes = np.asarray(latents @ (chosen * projections[:, k]).T)
            for c in range(len(examples)):
                falls[number, c, k] = clean - balanced_accuracy(logits - changes[:, c], y)
    return falls


def _scores(
    examples: Sequence[Examples],
    others: Bool[np.ndarray, "erased erased"],
    chosen: Bool[np.ndarray, "erased features"],
    falls: Float64[np.ndarray, "erased erased"],
) -> tuple[ErasureScore, ...]:
    return tuple(
        ErasureScore(
            concept=example.concept,
            intended=float(falls[c, c]),
            unintended=float(falls[c, others[c]].mean()),
            num_erased=int(chosen[c].sum()),
            num_others=int(others[c].sum()),
        )
        for c, example in enumerate(examples)
    )
