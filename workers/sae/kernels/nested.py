"""Loss and gradients of the nested loss for sparse codes, by hand. Equal to `losses.nested_loss` under autograd; used by `kernels/step.py`.

With prefixes m_1 < ... < m_G, a latent of group g (m_{g-1} <= latent < m_g) appears in the reconstructions g..G. With r_g = x - x_hat_{1:m_g} and N = batch * d_in

    loss = sum_g w_g |r_g|^2 / N          S_g = -2/N sum_{j >= g} w_j r_j
    d loss / d act = S_g . d_latent       d loss / d W_dec[latent] = sum over rows of act * S_g       d loss / d x_hat (all prefixes) = S_1

so any number of prefixes costs what one costs, plus O(G * N) for the suffix sums.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workers.sae.codes import SparseCodes, offsets
from workers.sae.kernels.products import grouped_sums, sampled_dots
from workers.sae.prefixes import Prefixes


@dataclass(frozen=True)
class NestedGradients:
    """Value and gradients of the nested loss."""

    loss: Float[Tensor, ""]
    squared_errors: Float[Tensor, " prefix"]
    """Summed over batch and d_in."""
    residual: Float[Tensor, "batch d_in"]
    """x - x_hat of the full width."""
    d_acts: Float[Tensor, " nnz"]
    d_W_dec: Float[Tensor, "d_latent d_in"]
    d_b_dec: Float[Tensor, " d_in"]
    """Through the decoder alone; b_dec also moves the encoder's input."""


def nested_gradients(
    centred: Float[Tensor, "batch d_in"], codes: SparseCodes, W_dec: Float[Tensor, "d_latent d_in"], prefixes: Prefixes
) -> NestedGradients:
    """For centred = x - b_dec."""
    batch, d_in = centred.shape
    num_groups = len(prefixes.lengths)
    group = torch.bucketize(codes.cols, torch.tensor(prefixes.lengths, device=codes.cols.device), right=True)
    place = codes.rows * num_groups + group  # sorted, since codes are sorted by row, then by latent
    place_offsets = offsets(place, batch * num_groups)

    parts = grouped_sums(W_dec, codes.cols, codes.values, place_offsets).view(batch, num_groups, d_in)
    residuals = centred[:, None] - parts.cumsum(1)
    squared_errors = torch.stack([residuals[:, g].square().sum() for g in range(num_groups)])
    weights = torch.tensor(prefixes.weights, dtype=centred.dtype, device=centred.device)
    weighted = residuals * (-2 / centred.numel() * weights)[:, None]
    suffix = weighted.flip(1).cumsum(1).flip(1)
    sums = suffix.view(batch * num_groups, d_in)

    order = codes.by_latent
    return NestedGradients(
        loss=weights @ squared_errors / centred.numel(),
        squared_errors=squared_errors,
        residual=residuals[:, -1],
        d_acts=sampled_dots(sums, W_dec, place_offsets, codes.cols),
        d_W_dec=grouped_sums(sums, place[order], codes.values[order], codes.latent_offsets),
        d_b_dec=suffix[:, 0].sum(0),
    )
