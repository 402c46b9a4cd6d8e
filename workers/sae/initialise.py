"""Initial weights of a sparse autoencoder. Called by the trainer."""

import torch
from jaxtyping import Float
from torch import Tensor

from workers.config import SAEConfig
from workers.sae.module import SparseAutoencoder
from workers.sae.randomness import named_generator


def initial_autoencoder(config: SAEConfig, mean: Float[Tensor, " d_in"]) -> SparseAutoencoder:
    """Decoder rows uniform on the unit sphere, encoder equal to decoder, b_enc 0, b_dec the mean of the scaled inputs.

    An encoder that starts as the decoder's transpose leaves few dead latents (Gao et al. 2024, appendix A.1). Same
    config, same weights, on every device: they are drawn on the CPU, in float32.
    """
    generator = named_generator(config.seed, "initial weights")
    directions = torch.randn(config.d_latent, mean.shape[0], generator=generator)
    W_dec = directions / directions.norm(dim=1, keepdim=True)
    return SparseAutoencoder(
        W_enc=W_dec.clone(),
        W_dec=W_dec,
        b_enc=torch.zeros(config.d_latent),
        b_dec=mean.to("cpu", torch.float32, copy=True),
        threshold=torch.zeros(()),
    )
