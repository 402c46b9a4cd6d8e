"""How an SAE's directions lie to each other: weights in, cosines out. Called by the evaluation."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

_CHUNK_LATENTS = 1024  # bounds memory to this many rows of the d_latent x d_latent matrix of cosines


@dataclass(frozen=True, eq=False)
class Geometry:
    """Cosines of the latents kept; NaN for the others."""

    max_decoder_cosines: Float[Tensor, " d_latent"]
    """Largest signed cosine of each decoder row to any other; near 1 where two latents share a direction."""
    mean_max_decoder_cosine: float
    """Its mean over the latents kept (SAEBench's is over all, dead ones too)."""
    encoder_decoder_cosines: Float[Tensor, " d_latent"]
    """Cosine of each latent's encoder column to its decoder row."""
    mean_encoder_decoder_cosine: float
    """Its mean over the latents kept."""


def decoder_cosines(
    W_enc: Float[Tensor, "d_in d_latent"], W_dec: Float[Tensor, "d_latent d_in"], keep: Bool[Tensor, " d_latent"]
) -> Geometry:
    """Cosines between the latents in `keep` (all True, or the live ones), which also are the only neighbours counted.

    ValueError if fewer than two are kept, or one of those has a direction without length or with a NaN.
    """
    if keep.sum() < 2:
        raise ValueError(f"{int(keep.sum())} latents are kept: cosines between decoder rows need two")
    decoder = _unit_rows(W_dec.detach()[keep].float(), "decoder")
    encoder = _unit_rows(W_enc.detach().T[keep].float(), "encoder")
    nearest, own = _max_cosines(decoder), (encoder * decoder).sum(1)
    return Geometry(
        max_decoder_cosines=_scatter(nearest, keep),
        mean_max_decoder_cosine=nearest.double().mean().item(),
        encoder_decoder_cosines=_scatter(own, keep),
        mean_encoder_decoder_cosine=own.double().mean().item(),
    )


def _max_cosines(units: Float[Tensor, "kept d_in"]) -> Float[Tensor, " kept"]:
    nearest = []
    for start in range(0, len(units), _CHUNK_LATENTS):
        cosines = units[start : start + _CHUNK_LATENTS] @ units.T
        cosines.diagonal(offset=start).fill_(-torch.inf)  # a row is no neighbour of itself
        nearest.append(cosines.amax(1))
    return torch.cat(nearest)


def _unit_rows(rows: Float[Tensor, "kept d_in"], what: str) -> Float[Tensor, "kept d_in"]:
    norms = rows.norm(dim=1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError(f"a latent's {what} direction is zero or not finite: leave that latent out of keep")
    return F.normalize(rows, dim=1)


def _scatter(values: Float[Tensor, " kept"], keep: Bool[Tensor, " d_latent"]) -> Float[Tensor, " d_latent"]:
    full = torch.full(keep.shape, torch.nan, device=values.device)
    full[keep] = values
    return full
