"""Adam for an autoencoder whose decoder rows have unit norm, with clipping and a schedule. Used by the trainer.

Per step: the part of the decoder's gradient along each decoder row is removed (it would only change the norm, and would
be counted in Adam's moments), the global norm is clipped, Adam moves all parameters, the decoder rows are normalised
again. Normalising after the step, not before it, is what keeps the published rows at unit norm.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workers.config import TrainConfig
from workers.sae.module import PARAMETERS, SparseAutoencoder

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear rise over the first `warmup_share` of the steps, linear fall over the last `decay_share`; step from 0."""
    warmup_steps = round(train.warmup_share * train.num_steps)
    decay_steps = round(train.decay_share * train.num_steps)
    rise = (step + 1) / (warmup_steps + 1)
    fall = (train.num_steps - step) / (decay_steps + 1)
    return train.learning_rate * max(0.0, min(1.0, rise, fall))


class Optimiser:
    """Adam (torch's fused kernel) over the four parameters. Its state is the moments and the number of steps taken."""

    def __init__(self, sae: SparseAutoencoder, train: TrainConfig) -> None:
        self.sae = sae
        self.train = train
        self.num_steps = 0
        self._parameters = [sae.get_parameter(name) for name in PARAMETERS]
        self._adam = torch.optim.Adam(self._parameters, betas=(train.beta1, train.beta2), fused=True)
        for parameter in self._parameters:
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.detach()),
                "exp_avg_sq": torch.zeros_like(parameter.detach()),
            }

    @torch.no_grad()
    def project(self, gradients: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Remove from the decoder's gradient, in place, what lies along its rows; return the norm of all gradients."""
        W_dec, gradient = self.sae.W_dec, gradients["W_dec"]
        along = torch.linalg.vecdot(gradient, W_dec)
        gradient.addcmul_(along[:, None], W_dec, value=-1)
        return torch.nn.utils.get_total_norm(gradients.values())

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], norm: Float[Tensor, ""]) -> float:
        """Clip the projected gradients (in place) by their norm, move the parameters; return the learning rate used."""
        rate = learning_rate(self.train, self.num_steps)
        self._adam.param_groups[0]["lr"] = rate
        for name, parameter in zip(PARAMETERS, self._parameters, strict=True):
            parameter.grad = gradients[name]
        if self.train.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.train.clip_norm, norm)
        self._adam.step()
        self._adam.zero_grad()
        self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))
        self.num_steps += 1
        return rate

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, not copied; with `num_steps` they are the whole state."""
        return {
            f"{moment}.{name}": self._adam.state[parameter][moment]
            for name, parameter in zip(PARAMETERS, self._parameters, strict=True)
            for moment in _MOMENTS
        }

    def set_num_steps(self, num_steps: int) -> None:
        """Continue after so many steps; the moments are written through `tensors()`."""
        self.num_steps = num_steps
        for parameter in self._parameters:
            self._adam.state[parameter]["step"].fill_(num_steps)
