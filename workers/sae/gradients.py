"""Loss and gradients of one batch: what both compute paths return, and the reference path, by autograd."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workers.sae.losses import auxk_loss, nested_loss
from workers.sae.module import PARAMETERS, SparseAutoencoder
from workers.sae.prefixes import Prefixes
from workers.sae.selection import batch_topk


@dataclass(frozen=True)
class Objective:
    """What is minimised, apart from the prefixes: nested loss of a BatchTopK code + aux_weight * AuxK."""

    k: int
    """Mean number of active latents per row."""
    aux_weight: float
    aux_k: int
    """Dead latents AuxK may use per row."""


@dataclass(frozen=True)
class BatchGradients:
    """What one batch says. Tensors stay on the SAE's device."""

    nested_loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    """AuxK before its weight; 0 when nothing is dead or it is off."""
    squared_errors: Float[Tensor, " prefix"]
    """Of each prefix's reconstruction, summed over batch and d_in."""
    active_counts: Int64[Tensor, " d_latent"]
    """Rows in which each latent was selected."""
    smallest: Float[Tensor, ""]
    """Smallest selected activation; inf if none was."""
    gradients: dict[str, Tensor]
    """Of nested_loss + aux_weight * aux_loss, by parameter name."""


class ComputesGradients(Protocol):
    """A compute path: `reference_gradients` or `kernels.step.FastGradients`."""

    def __call__(
        self,
        sae: SparseAutoencoder,
        x: Float[Tensor, "batch d_in"],
        prefixes: Prefixes,
        dead: Bool[Tensor, " d_latent"],
        objective: Objective,
    ) -> BatchGradients:
        """Loss and gradients of x (scaled, finite), given which latents were dead before it. Changes nothing."""
        ...


def reference_gradients(
    sae: SparseAutoencoder,
    x: Float[Tensor, "batch d_in"],
    prefixes: Prefixes,
    dead: Bool[Tensor, " d_latent"],
    objective: Objective,
) -> BatchGradients:
    """The dense formula and autograd. Cost: three dense products per prefix; memory: batch * d_latent several times."""
    pre = sae.pre_activations(x)
    acts = batch_topk(pre, objective.k)
    nested, errors = nested_loss(sae, x, acts, prefixes)
    aux = x.new_zeros(())
    if objective.aux_weight > 0:
        aux = auxk_loss(x - sae.decode(acts), pre.relu()[:, dead], sae.W_dec[dead], objective.aux_k)
    parameters = [sae.get_parameter(name) for name in PARAMETERS]
    gradients = torch.autograd.grad(nested + objective.aux_weight * aux, parameters)
    acts = acts.detach()
    return BatchGradients(
        nested_loss=nested.detach(),
        aux_loss=aux.detach(),
        squared_errors=errors.detach(),
        active_counts=(acts > 0).sum(0),
        smallest=torch.where(acts > 0, acts, torch.inf).min(),
        gradients=dict(zip(PARAMETERS, gradients, strict=True)),
    )
