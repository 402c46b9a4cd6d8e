"""How much of the activations, and of the model's predictions, a reconstruction keeps.

Sums over tokens, so that a caller streams batches: `PredictionAccumulator` for one forward pass of the language model
(clean, ablated or spliced), `FVUAccumulator` for reconstructions at many prefix lengths. Runs no model. Called by the
evaluation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def log_probabilities(logits: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, "batch seq vocab"]:
    """Natural log-probabilities in float32; `log(softmax)` would underflow to -inf, and KL to NaN."""
    return F.log_softmax(logits.float(), dim=-1)


def next_token_losses(
    log_probs: Float[Tensor, "batch seq vocab"], token_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq-1"]:
    """Cross-entropy in nats; entry t is the loss of predicting token t + 1 from tokens up to t."""
    return -log_probs[:, :-1].gather(-1, token_ids[:, 1:, None].long()).squeeze(-1)


def kl_divergences(
    clean_log_probs: Float[Tensor, "batch seq vocab"], log_probs: Float[Tensor, "batch seq vocab"]
) -> Float[Tensor, "batch seq"]:
    """KL(P_clean || P_patched) in nats of each position's prediction."""
    return (clean_log_probs.exp() * (clean_log_probs - log_probs)).sum(-1)


@dataclass
class PredictionAccumulator:
    """Sums over the tokens of one forward pass; the means are pooled over tokens, not over batches."""

    cross_entropy_sum_nats: float = 0.0
    num_predictions: int = 0
    kl_sum_nats: float = 0.0
    num_tokens: int = 0

    def add(
        self,
        log_probs: Float[Tensor, "batch seq vocab"],
        clean_log_probs: Float[Tensor, "batch seq vocab"],
        token_ids: Int[Tensor, "batch seq"],
        is_context: Bool[Tensor, "batch seq"],
        is_target: Bool[Tensor, "batch seq"],
    ) -> None:
        """Add a batch, both inputs from `log_probabilities`; for the clean pass they are the same.

        KL counts the tokens in `is_context` (neither special nor padding). Cross-entropy counts a prediction made from
        such a token of one in `is_target`: with all True, as SAEBench has it, predictions of special tokens count, and
        of padding too; pass False for padding. ValueError if a sum is not finite; the sums are then unchanged.
        """
        counted = is_context[:, :-1] & is_target[:, 1:]
        cross_entropy = next_token_losses(log_probs, token_ids)[counted].double().sum().item()
        kl = kl_divergences(clean_log_probs, log_probs)[is_context].double().sum().item()
        if not (math.isfinite(cross_entropy) and math.isfinite(kl)):
            raise ValueError(
                "log_probs give a cross-entropy or KL that is not finite: look for NaN in the forward pass"
            )
        self.cross_entropy_sum_nats += cross_entropy
        self.num_predictions += int(counted.sum().item())
        self.kl_sum_nats += kl
        self.num_tokens += int(is_context.sum().item())

    @property
    def cross_entropy_nats(self) -> float:
        """Mean loss of a counted prediction."""
        if not self.num_predictions:
            raise ValueError("no prediction was counted: the mask leaves out every token")
        return self.cross_entropy_sum_nats / self.num_predictions

    @property
    def kl_nats(self) -> float:
        """Mean KL(P_clean || P_patched) of a counted token."""
        if not self.num_tokens:
            raise ValueError("no token was counted: the mask leaves out every token")
        return self.kl_sum_nats / self.num_tokens


@dataclass(frozen=True)
class Recovered:
    """Share of an ablation's damage that the reconstruction undoes: 1 is the clean model, 0 the ablated one."""

    cross_entropy: float
    kl: float


def recovered(
    clean: PredictionAccumulator, ablated: PredictionAccumulator, spliced: PredictionAccumulator
) -> Recovered:
    """(CE_ablated - CE_spliced) / (CE_ablated - CE_clean), and (KL_ablated - KL_spliced) / KL_ablated.

    Say with the number what was ablated (to zero or to the mean): the shares differ. ValueError if ablation does no
    harm, since the share then has no meaning.
    """
    harm = ablated.cross_entropy_nats - clean.cross_entropy_nats
    if harm <= 0 or ablated.kl_nats <= 0:
        raise ValueError(
            "the ablated pass predicts no worse than the clean one: there is no loss to recover at this hook"
        )
    return Recovered(
        cross_entropy=(ablated.cross_entropy_nats - spliced.cross_entropy_nats) / harm,
        kl=(ablated.kl_nats - spliced.kl_nats) / ablated.kl_nats,
    )


class FVUAccumulator:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, all rows pooled, for each prefix.

    The mean is that of all rows (a vector), as in a textbook R^2; explained variance is 1 - FVU. This is SAELens'
    definition since its PR 665; SAEBench's and dictionary_learning's differ. Sums in float64; batches' means and
    squared deviations are merged as in Chan, Golub and LeVeque (1979), so a large mean costs no precision.
    """

    def __init__(self, prefixes: Sequence[int]) -> None:
        self.num_rows = 0
        self._residual_sums = dict.fromkeys(prefixes, 0.0)
        self._deviation_sum = 0.0
        self._mean: Tensor | None = None

    def add(self, x: Float[Tensor, "batch d_in"], reconstructions: Mapping[int, Float[Tensor, "batch d_in"]]) -> None:
        """Add a batch of rows and their reconstruction from each prefix."""
        assert reconstructions.keys() == self._residual_sums.keys()
        if not len(x):
            return
        rows = x.detach().double()
        for prefix, reconstruction in reconstructions.items():
            self._residual_sums[prefix] += (rows - reconstruction.detach()).square().sum().item()
        mean, total = rows.mean(0), self.num_rows + len(rows)
        shift = mean if self._mean is None else mean - self._mean
        self._deviation_sum += (rows - mean).square().sum().item()
        self._deviation_sum += shift.square().sum().item() * self.num_rows * len(rows) / total
        self._mean = mean if self._mean is None else self._mean + shift * (len(rows) / total)
        self.num_rows = total

    def fvu(self) -> dict[int, float]:
        """FVU of each prefix; ValueError if there are no rows, they are all equal, or one is not finite."""
        if not all(math.isfinite(value) for value in (self._deviation_sum, *self._residual_sums.values())):
            raise ValueError("the activations or their reconstructions hold a NaN or infinity: FVU has no value")
        if self._deviation_sum <= 0:
            raise ValueError(f"the {self.num_rows} rows have no variance: FVU needs rows that differ")
        return {prefix: value / self._deviation_sum for prefix, value in self._residual_sums.items()}
