"""Sparse probing: how well a few latents say whether a token bears a concept.

After SAEBench's k-sparse probing, for labelled tokens instead of pooled texts, with three changes. Columns are
standardised: with an L2 penalty on raw columns the score depends on the latents' scale, not only on what they tell.
Examples are balanced and the same for every SAE, k and baseline. Fit and test come from different documents, and
nothing is chosen on the test split.
The same probe on residual channels and on random directions is the baseline and the control. Called by the evaluation.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

Features: TypeAlias = csr_array | Float[np.ndarray, "rows features"]
"""Latents [rows, d_latent], or activations [rows, d_in] for the baselines; one row per token, no special tokens."""
_MAX_ITERATIONS = 1000
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Examples:
    """The rows on which one concept's probes are fitted and tested, as many with the label as without."""

    concept: str
    column: int
    """The concept's column in the labels."""
    fit: Int[np.ndarray, " fit"]
    test: Int[np.ndarray, " test"]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A token bears the concept where x . weights + bias > 0, for x as it comes (not standardised)."""

    weights: Float64[np.ndarray, " features"]
    bias: float

    def logits(self, x: Float[np.ndarray, "rows features"]) -> Float64[np.ndarray, " rows"]:
        """Log-odds of each row."""
        logits: Float64[np.ndarray, " rows"] = x.astype(np.float64) @ self.weights + self.bias
        return logits


@dataclass(frozen=True)
class ProbeScore:
    """One concept's probe on its test examples."""

    concept: str
    balanced_accuracy: float
    num_fit: int
    num_test: int
    features: tuple[int, ...] = ()
    """The latents or channels it reads, best first; empty where that is all of them or random directions."""


@dataclass(frozen=True)
class ProbingResult:
    """Probes that read `num_features` numbers each, one per concept."""

    num_features: int
    scores: tuple[ProbeScore, ...]

    @property
    def mean(self) -> float:
        """Mean balanced accuracy over concepts."""
        return float(np.mean([score.balanced_accuracy for score in self.scores]))


def sample_examples(
    concept: str,
    column: int,
    labels: Bool[np.ndarray, "rows concepts"],
    fits: Bool[np.ndarray, " rows"],
    per_class: int,
    min_examples: int,
    seed: int,
) -> Examples:
    """At most `per_class` rows with the label and as many without to fit, half as many to test.

    `fits` marks the rows of the documents to fit on; the other rows are for testing. The draw depends on `seed` and the
    concept's name, not on which other concepts there are. ValueError if either split has fewer than `min_examples` rows
    of either class.
    """
    rng = np.random.default_rng([seed, zlib.crc32(concept.encode())])
    drawn = []
    for split, rows, most in (("fit", fits, per_class), ("test", ~fits, per_class // 2)):
        classes = [np.flatnonzero(rows & (labels[:, column] == value)) for value in (True, False)]
        fewest = min(len(members) for members in classes)
        if fewest < max(min_examples, 1):
            with_label, without = (len(members) for members in classes)
            raise ValueError(
                f"concept {concept!r} has {with_label} tokens with the label and {without} without to {split}, "
                f"of {min_examples} needed: raise evaluate.probing_sequences or lower evaluate.min_examples"
            )
        size = min(most, fewest)
        drawn.append(np.sort(np.concatenate([rng.choice(members, size, replace=False) for members in classes])))
    return Examples(concept, column, *drawn)


def mean_differences(
    features: Features, labels: Bool[np.ndarray, "rows concepts"]
) -> Float64[np.ndarray, "concepts features"]:
    """Mean over rows with the label minus mean over rows without, of every feature for every concept, in float64."""
    num_rows, num_with = len(labels), labels.sum(0)[:, None]
    if (num_with == 0).any() or (num_with == num_rows).any():
        raise ValueError(f"a concept's label is the same on all {num_rows} rows: mean differences need both classes")
    check_finite(features)
    # One product in float64 for all sums: scipy's sum(axis=0, dtype=float64) adds up in the array's own float32.
    sums = np.asarray(features.T @ np.column_stack([labels, np.ones(num_rows)])).T
    sums_with, sums_all = sums[:-1], sums[-1]
    means_with, means_without = sums_with / num_with, (sums_all - sums_with) / (num_rows - num_with)
    differences: Float64[np.ndarray, "concepts features"] = means_with - means_without
    return differences


def fit_probe(x: Float[np.ndarray, "rows features"], y: Bool[np.ndarray, " rows"]) -> LinearProbe:
    """L2 logistic regression (C = 1) on columns standardised by these rows; its weights are those of raw columns."""
    if y.all() or not y.any():
        raise ValueError("the examples are all of one class: a probe needs both")
    check_finite(x)
    columns = x.astype(np.float64)
    mean, deviation = columns.mean(0), columns.std(0)
    deviation[deviation <= _ROUNDING * np.abs(mean)] = 1.0  # a constant column tells nothing, and its weight stays 0
    model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=_MAX_ITERATIONS)
    model.fit((columns - mean) / deviation, y)
    weights = model.coef_[0] / deviation
    return LinearProbe(weights, float(model.intercept_[0] - mean @ weights))


def balanced_accuracy(logits: Float[np.ndarray, " rows"], y: Bool[np.ndarray, " rows"]) -> float:
    """Mean of the shares of each class that a probe gets right; ValueError if there is only one class."""
    if y.all() or not y.any():
        raise ValueError("the examples are all of one class: balanced accuracy needs both")
    return float(((logits[y] > 0).mean() + (logits[~y] <= 0).mean()) / 2)


def sparse_probes(
    features: Features,
    labels: Bool[np.ndarray, "rows concepts"],
    fits: Bool[np.ndarray, " rows"],
    examples: Sequence[Examples],
    ks: Sequence[int],
) -> tuple[ProbingResult, ...]:
    """For each k, probes on the k features whose mean differs most between rows with and without the label.

    The choice is made on all rows of the fit split (ties: the lower index), as in SAEBench on raw values.
    """
    if max(ks) > features.shape[1]:
        raise ValueError(f"k is {max(ks)}, above the {features.shape[1]} features: lower probing_k")
    columns = [example.column for example in examples]
    differences = np.abs(mean_differences(features[fits], labels[fits][:, columns]))
    scores: dict[int, list[ProbeScore]] = {k: [] for k in ks}
    for example, difference in zip(examples, differences, strict=True):
        chosen = np.argsort(-difference, kind="stable")[: max(ks)]
        fit, test = (_dense(features[rows][:, chosen]) for rows in (example.fit, example.test))
        for k in ks:
            picked = tuple(int(index) for index in chosen[:k])
            scores[k].append(_score(example, labels, fit[:, :k], test[:, :k], picked))
    return tuple(ProbingResult(k, tuple(scores[k])) for k in ks)


def dense_probes(
    activations: Float[np.ndarray, "rows d_in"], labels: Bool[np.ndarray, "rows concepts"], examples: Sequence[Examples]
) -> tuple[tuple[LinearProbe, ...], ProbingResult]:
    """Probes on the whole activation, and their scores: what there is to know, and the probes that TPP perturbs."""
    probes = tuple(fit_probe(activations[example.fit], labels[example.fit, example.column]) for example in examples)
    scores = tuple(
        ProbeScore(
            example.concept,
            balanced_accuracy(probe.logits(activations[example.test]), labels[example.test, example.column]),
            len(example.fit),
            len(example.test),
        )
        for example, probe in zip(examples, probes, strict=True)
    )
    return probes, ProbingResult(activations.shape[1], scores)


def random_direction_probes(
    activations: Float[np.ndarray, "rows d_in"],
    labels: Bool[np.ndarray, "rows concepts"],
    examples: Sequence[Examples],
    k: int,
    num_controls: int,
    seed: int,
) -> ProbingResult:
    """Control: probes on k random unit directions, not chosen by the labels; the mean over `num_controls` draws."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((num_controls, activations.shape[1], k))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    scores = []
    for example in examples:
        fit, test = (activations[rows].astype(np.float64) for rows in (example.fit, example.test))
        draws = [_score(example, labels, fit @ drawn, test @ drawn).balanced_accuracy for drawn in directions]
        scores.append(ProbeScore(example.concept, float(np.mean(draws)), len(example.fit), len(example.test)))
    return ProbingResult(k, tuple(scores))


def check_finite(features: Features) -> None:
    """ValueError if an array or a sparse array holds a NaN or infinity."""
    if not np.isfinite(features.data if isinstance(features, csr_array) else features).all():
        raise ValueError("the features hold a NaN or infinity: look for it in the activations or the SAE's weights")


def _dense(features: Features) -> Float[np.ndarray, "rows features"]:
    values: Float[np.ndarray, "rows features"] = features.toarray() if isinstance(features, csr_array) else features
    return values


def _score(
    example: Examples,
    labels: Bool[np.ndarray, "rows concepts"],
    fit: Float[np.ndarray, "fit features"],
    test: Float[np.ndarray, "test features"],
    picked: tuple[int, ...] = (),
) -> ProbeScore:
    probe = fit_probe(fit, labels[example.fit, example.column])
    accuracy = balanced_accuracy(probe.logits(test), labels[example.test, example.column])
    return ProbeScore(example.concept, accuracy, len(example.fit), len(example.test), picked)
