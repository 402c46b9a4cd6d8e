"""AuxK for the fast path: `losses.auxk_loss` on the rows of the dead latents alone; free when none is dead."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workers.sae.losses import auxk_loss
from workers.sae.module import SparseAutoencoder


@torch.no_grad()
def add_auxk_gradients(
    gradients: dict[str, Tensor],
    sae: SparseAutoencoder,
    centred: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_latent"],
    aux_k: int,
    aux_weight: float,
) -> Float[Tensor, ""]:
    """Add aux_weight times the gradients of AuxK, in place; return AuxK before its weight."""
    index = dead.nonzero().squeeze(1)
    if len(index) == 0 or aux_weight == 0:
        return centred.new_zeros(())
    leaves = [tensor[index].requires_grad_() for tensor in (sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach())]
    with torch.enable_grad():
        W_enc, b_enc, W_dec = leaves
        loss = auxk_loss(residual, torch.addmm(b_enc, centred, W_enc.T).relu(), W_dec, aux_k)
    d_W_enc, d_b_enc, d_W_dec = torch.autograd.grad(loss, leaves, grad_outputs=loss.new_tensor(aux_weight))
    gradients["W_enc"][index] += d_W_enc
    gradients["b_enc"][index] += d_b_enc
    gradients["W_dec"][index] += d_W_dec
    gradients["b_dec"] -= d_b_enc @ W_enc.detach()
    return loss.detach()
