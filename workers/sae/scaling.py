"""The scale factor between a model's activations and the SAE's inputs, and how it is folded away for publication.

Training multiplies every activation by s = sqrt(d_in / mean squared norm), so that E||x||^2 = d_in and one learning
rate suits every layer of every model. A published SAE reads raw activations. relu and a threshold are positively
homogeneous, so

    W_enc((s x) - b_dec) + b_enc = s (W_enc(x - b_dec / s) + b_enc / s)

and dividing both biases and the threshold by s divides latents and reconstruction by s: the decoder keeps its unit
rows, the active set is the same, and latents come out in the model's units.
"""

import math

from workers.sae.module import SparseAutoencoder


def input_scale(d_in: int, mean_squared_norm: float) -> float:
    """s = sqrt(d_in / mean_squared_norm). ValueError if the mean squared norm is not a positive number."""
    if not (math.isfinite(mean_squared_norm) and mean_squared_norm > 0):
        raise ValueError(f"mean squared norm of the activations is {mean_squared_norm}: it must be positive and finite")
    return math.sqrt(d_in / mean_squared_norm)


def folded(sae: SparseAutoencoder, scale: float) -> SparseAutoencoder:
    """A copy that does to raw x what `sae` does to scale * x, with latents and reconstruction divided by `scale`."""
    tensors = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    for name in ("b_enc", "b_dec", "threshold"):
        tensors[name] /= scale
    return SparseAutoencoder.from_tensors(tensors)
