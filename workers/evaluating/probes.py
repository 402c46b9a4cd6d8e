"""Sparse probing and concept erasure of every SAE of one hook: the same examples, baselines, controls for all.

The arithmetic is in `workers.scores`; what the concepts are is in `workers.evaluating.held_out`.
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from storage.records import Json
from workers.config import EvalConfig
from workers.evaluating.held_out import HeldOut
from workers.scores.erasure import WARNING, ErasureResult, targeted_perturbations
from workers.scores.probing import (
    Examples,
    LinearProbe,
    ProbingResult,
    dense_probes,
    random_direction_probes,
    sample_examples,
    sparse_probes,
)
from workers.texts.concepts import nested_concepts

_FEWEST_CONCEPTS = 2


class ConceptProbes:
    """Everything about the concepts that does not depend on an SAE, and `scores`, which does."""

    def __init__(self, held_out: HeldOut, activations: npt.NDArray[np.float32], config: EvalConfig) -> None:
        """`activations` is [rows, d_in] over all held-out windows."""
        self.config, self.concepts = config, held_out.concepts
        chosen = held_out.labelled.copy()
        chosen[held_out.num_probing * held_out.windows.token_ids.shape[1] :] = False
        self.rows = np.flatnonzero(chosen)
        self.activations = activations[self.rows]
        self.labels = held_out.labels[self.rows]
        self.fits = held_out.fits[self.rows]
        self.left_out: dict[str, str] = {}
        self.examples = self._sample()

    def _sample(self) -> list[Examples]:
        """Balanced examples of each concept; one that is too rare is left out, with the reason."""
        found: list[Examples] = []
        for column, concept in enumerate(self.concepts):
            try:
                found.append(
                    sample_examples(
                        concept.name,
                        column,
                        self.labels,
                        self.fits,
                        self.config.examples_per_class,
                        self.config.min_examples,
                        self.config.seed,
                    )
                )
            except ValueError as error:
                self.left_out[concept.name] = str(error)
        return found

    def scores(self, latents: csr_array, w_dec: npt.NDArray[np.float32]) -> Json:
        """The report's `probing` and `erasure` of one SAE; `latents` is [rows, d_latent] over all held-out windows."""
        # The problems are small: threads of a linear algebra library would wait for each other most of the time.
        with threadpool_limits(1):
            return self._scores(latents, w_dec)

    def _scores(self, latents: csr_array, w_dec: npt.NDArray[np.float32]) -> Json:
        if not self.concepts:
            omitted = {"omitted": "nothing is known of this kind of text: there are no labels to probe for"}
            return {"probing": omitted, "erasure": omitted}
        if len(self.examples) < _FEWEST_CONCEPTS:
            reason = f"fewer than {_FEWEST_CONCEPTS} concepts have {self.config.min_examples} examples in both splits"
            omitted = {"omitted": f"{reason}: raise evaluate.probing_sequences"}
            return {"probing": omitted | {"left_out": self.left_out}, "erasure": omitted}
        mine = latents[self.rows]
        probing = self._probing(self._sparse(mine))
        if not self._have_bystanders():
            omitted = {
                "omitted": "a concept is nested with every other one: TPP has nothing to compare its erasure with"
            }
            return {"probing": probing, "erasure": omitted}
        return {"probing": probing, "erasure": self._erasure(self._perturb(mine, w_dec))}

    def _have_bystanders(self) -> bool:
        columns = [example.column for example in self.examples]
        return not nested_concepts(self.concepts)[np.ix_(columns, columns)].all(axis=1).any()

    def _sparse(self, features: csr_array | npt.NDArray[np.float32]) -> tuple[ProbingResult, ...]:
        ks = [k for k in self.config.probing_k if k <= features.shape[1]]
        return sparse_probes(features, self.labels, self.fits, self.examples, ks) if ks else ()

    def _perturb(
        self, features: csr_array | npt.NDArray[np.float32], w_dec: npt.NDArray[np.float32]
    ) -> tuple[ErasureResult, ...]:
        return targeted_perturbations(
            features,
            w_dec,
            self.activations,
            self._dense[0],
            self.labels,
            self.fits,
            self.examples,
            nested_concepts(self.concepts),
            self.config.erasure_n,
        )

    @cached_property
    def _dense(self) -> tuple[tuple[LinearProbe, ...], ProbingResult]:
        return dense_probes(self.activations, self.labels, self.examples)

    @cached_property
    def _residual(self) -> tuple[ProbingResult, ...]:
        return self._sparse(self.activations)

    @cached_property
    def _control(self) -> tuple[ProbingResult, ...]:
        return tuple(
            random_direction_probes(
                self.activations, self.labels, self.examples, k, self.config.num_controls, self.config.seed
            )
            for k in self.config.probing_k
        )

    @cached_property
    def _residual_erasure(self) -> tuple[ErasureResult, ...]:
        return self._perturb(self.activations, np.eye(self.activations.shape[1], dtype=np.float32))

    def _probing(self, sparse: tuple[ProbingResult, ...]) -> Json:
        dense: ProbingResult = self._dense[1]
        families = {"sparse": sparse, "residual": self._residual, "control": self._control}
        concepts: Json = {}
        for index, example in enumerate(self.examples):
            widest = sparse[-1].scores[index]
            concepts[example.concept] = {
                "parent": self.concepts[example.column].parent,
                "dense": dense.scores[index].balanced_accuracy,
                "num_fit": widest.num_fit,
                "num_test": widest.num_test,
                "latents": list(widest.features),
                **{
                    family: {str(result.num_features): result.scores[index].balanced_accuracy for result in results}
                    for family, results in families.items()
                },
            }
        means = {
            family: {str(result.num_features): result.mean for result in results}
            for family, results in families.items()
        }
        return {
            "concepts": concepts,
            "mean": {"dense": dense.mean, **means},
            "left_out": self.left_out,
            "num_controls": self.config.num_controls,
        }

    def _erasure(self, results: tuple[ErasureResult, ...]) -> Json:
        by_n = {str(result.num_latents): result for result in results}
        return {
            "tpp": {n: result.mean_tpp for n, result in by_n.items()},
            "intended": {n: float(np.mean([s.intended for s in result.scores])) for n, result in by_n.items()},
            "unintended": {n: float(np.mean([s.unintended for s in result.scores])) for n, result in by_n.items()},
            "residual_tpp": {str(result.num_latents): result.mean_tpp for result in self._residual_erasure},
            "concepts": {
                example.concept: {n: result.scores[index].tpp for n, result in by_n.items()}
                for index, example in enumerate(self.examples)
            },
            "num_concepts": len(self.examples),
            "num_examples": sum(len(example.test) for example in self.examples),
            "warning": WARNING,
        }
