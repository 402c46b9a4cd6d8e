"""The fast compute path: `gradients.reference_gradients` at sparse cost. Used by the trainer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workers.sae.gradients import BatchGradients, Objective
from workers.sae.kernels.auxk import add_auxk_gradients
from workers.sae.kernels.nested import nested_gradients
from workers.sae.kernels.products import grouped_sums
from workers.sae.kernels.selection import BatchTopKSelector
from workers.sae.module import SparseAutoencoder
from workers.sae.prefixes import Prefixes


class FastGradients:
    """One SAE's batches, one after another. Keeps buffers and a guess of the cut, neither of which changes a result."""

    def __init__(self) -> None:
        self._select = BatchTopKSelector()

    @torch.no_grad()
    def __call__(
        self,
        sae: SparseAutoencoder,
        x: Float[Tensor, "batch d_in"],
        prefixes: Prefixes,
        dead: Bool[Tensor, " d_latent"],
        objective: Objective,
    ) -> BatchGradients:
        """See `gradients.ComputesGradients`."""
        centred = x - sae.b_dec
        codes = self._select(centred, sae.W_enc, sae.b_enc, objective.k)
        nested = nested_gradients(centred, codes, sae.W_dec, prefixes)

        # what was selected is positive, so relu passes its gradient on as it is
        order = codes.by_latent
        d_b_enc = torch.zeros_like(sae.b_enc).index_add_(0, codes.cols, nested.d_acts)
        gradients = {
            "W_enc": grouped_sums(
                centred, codes.rows.index_select(0, order), nested.d_acts.index_select(0, order), codes.latent_offsets
            ),
            "W_dec": nested.d_decoder,
            "b_enc": d_b_enc,
            "b_dec": nested.d_bias - d_b_enc @ sae.W_enc,
        }
        aux = add_auxk_gradients(gradients, sae, centred, nested.residual, dead, objective.aux_k, objective.aux_weight)
        return BatchGradients(
            nested_loss=nested.loss,
            aux_loss=aux,
            squared_errors=nested.squared_errors,
            active_counts=codes.latent_offsets.diff(),
            smallest=codes.values.min() if len(codes.values) else x.new_tensor(torch.inf),
            gradients=gradients,
        )
