"""The losses, dense and differentiable: what the fast kernels must equal, written as the formulas are."""

import torch
from jaxtyping import Float
from torch import Tensor

from workers.sae.module import SparseAutoencoder
from workers.sae.prefixes import Prefixes


def nested_loss(
    sae: SparseAutoencoder, x: Float[Tensor, "batch d_in"], acts: Float[Tensor, "batch d_latent"], prefixes: Prefixes
) -> tuple[Float[Tensor, ""], Float[Tensor, " prefix"]]:
    """sum_g w_g * mean over batch and d_in of (x - x_hat_{1:m_g})^2, with sum_g w_g = 1.

    With E||x||^2 = d_in this is of the order of the fraction of variance unexplained, whatever d_in and the number of
    prefixes. Public codes differ by a factor, which matters beside AuxK and gradient clipping: the paper's listing sums
    over prefixes (G times this); matryoshka_sae averages over G + 1 terms, b_dec alone among them; dictionary_learning
    sums over d_in and divides by G twice (d_in / G times this with its default weights); SAELens sums over d_in and
    over prefixes (G d_in times this).

    Returns the loss, and the squared error of each prefix summed over batch and d_in, for the FVU.
    """
    errors = torch.stack([(x - sae.decode(acts, length)).square().sum() for length in prefixes.lengths])
    return errors.new_tensor(prefixes.weights) @ errors / x.numel(), errors


def auxk_loss(
    residual: Float[Tensor, "batch d_in"],
    dead_acts: Float[Tensor, "batch num_dead"],
    dead_W_dec: Float[Tensor, "num_dead d_in"],
    aux_k: int,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, section 2.4): how badly dead latents explain what the living leave over; 1 if not at all.

    e = residual x - x_hat, a constant here; e_hat = decoding, without b_dec (the residual already lacks it), of each
    row's `aux_k` largest relu pre-activations among dead latents; loss = sum (e - e_hat)^2 / sum (e - batch mean of
    e)^2; 0 when nothing is dead. As in dictionary_learning; matryoshka_sae neither detaches nor divides; SAELens scales
    it down while few are dead.
    """
    num_dead = dead_acts.shape[1]
    if num_dead == 0:
        return residual.new_zeros(())
    if num_dead > aux_k:
        values, index = dead_acts.topk(aux_k, dim=1, sorted=False)
        dead_acts = torch.zeros_like(dead_acts).scatter(1, index, values)
    residual = residual.detach()
    variance = (residual - residual.mean(0)).square().sum()
    error = (residual - dead_acts @ dead_W_dec).square().sum()
    return error / variance.clamp_min(torch.finfo(variance.dtype).tiny)
