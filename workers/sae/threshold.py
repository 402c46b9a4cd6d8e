"""The running inference threshold: a moving mean of each batch's smallest selected activation. Used by the trainer."""

import torch
from jaxtyping import Float
from torch import Tensor


class RunningThreshold:
    """sum_t (1 - rate)^(T - t) a_t / sum_t (1 - rate)^(T - t) over the batches that had an active latent; 0 before.

    Dividing by the sum of the weights corrects the bias of the first batches.
    """

    def __init__(self, rate: float, device: torch.device) -> None:
        self.rate = rate
        self.weighted_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, smallest: Float[Tensor, ""]) -> None:
        """Take in a batch's smallest positive activation; inf stands for a batch without one, and changes nothing."""
        some = smallest.isfinite()
        rate = self.rate * some
        self.weighted_sum += rate * (torch.where(some, smallest.double(), 0.0) - self.weighted_sum)
        self.weight += rate * (1 - self.weight)

    def value(self) -> Float[Tensor, ""]:
        """The threshold, float32."""
        return torch.where(self.weight > 0, self.weighted_sum / self.weight, 0.0).float()
