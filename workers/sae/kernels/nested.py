"""Value and gradients of `losses.nested_loss` for sparse codes, by hand. Used by `kernels/step.py`.

With prefixes m_1 < ... < m_G, a latent of group g (m_{g-1} <= latent < m_g) appears in the reconstructions g..G. With
r_g = x - x_hat_{1:m_g} and N = batch * d_in

    loss = sum_g w_g |r_g|^2 / N          S_g = -2/N sum_{j >= g} w_j r_j
    d loss / d act = S_g . W_dec[latent]  d loss / d W_dec[latent] = sum over rows of act * S_g
    d loss / d b_dec = sum over rows of S_1

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
    d_decoder: Float[Tensor, "d_latent d_in"]
    d_bias: Float[Tensor, " d_in"]
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

    # one buffer, in place: first what each group decodes to, then the residuals r_g, then their suffix sums S_g
    buffer = grouped_sums(W_dec, codes.cols, codes.values, place_offsets).view(batch, num_groups, d_in)
    previous = centred
    for residual in buffer.unbind(1):
        previous = torch.sub(previous, residual, out=residual)
    full_residual = previous.clone()
    squared_errors = torch.stack([residual.square().sum() for residual in buffer.unbind(1)])
    weights = torch.tensor(prefixes.weights, dtype=centred.dtype, device=centred.device)
    buffer *= (-2 / centred.numel() * weights)[:, None]
    for g in reversed(range(num_groups - 1)):
        buffer[:, g] += buffer[:, g + 1]
    sums = buffer.view(batch * num_groups, d_in)

    order = codes.by_latent
    return NestedGradients(
        loss=weights @ squared_errors / centred.numel(),
        squared_errors=squared_errors,
        residual=full_residual,
        d_acts=sampled_dots(sums, W_dec, place_offsets, codes.cols),
        d_decoder=grouped_sums(
            sums, place.index_select(0, order), codes.values.index_select(0, order), codes.latent_offsets
        ),
        d_bias=buffer[:, 0].sum(0),
    )
