"""How often latents fire: L0, firing rates, the share that never fires. Called by the evaluation."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.sparse import csr_array

LOG10_RATE_EDGES = np.linspace(-6.0, 0.0, 25)
"""Bin edges of log10 firing rates: quarters of a decade; rarer latents fall into the first bin."""


@dataclass(frozen=True, eq=False)
class Firing:
    """How often each latent fired on `num_rows` rows."""

    num_rows: int
    rates: Float64[np.ndarray, " d_latent"]
    """Share of the rows on which each latent fires."""

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return float(self.rates.sum())

    @property
    def dead_share(self) -> float:
        """Share of latents that fired on none of the `num_rows` rows; it falls as rows are added."""
        return float((self.rates == 0).mean())

    def histogram(self) -> dict[str, int | list[int] | list[float]]:
        """Number of latents in each bin of log10 rate, for a report; dead ones are in `num_dead`, not in a bin."""
        fired = self.rates[self.rates > 0]
        counts, edges = np.histogram(np.log10(fired).clip(min=LOG10_RATE_EDGES[0]), bins=LOG10_RATE_EDGES)
        return {
            "num_rows": self.num_rows,
            "num_dead": len(self.rates) - len(fired),
            "bin_edges": edges.tolist(),
            "counts": counts.tolist(),
        }


def firing(latents: csr_array) -> Firing:
    """Count firings in latents [rows, d_latent]; a latent fires where it is not zero.

    ValueError if there are no rows or a value is not finite.
    """
    num_rows, d_latent = latents.shape
    if not num_rows:
        raise ValueError("the latents have no rows: firing rates need at least one token")
    if not np.isfinite(latents.data).all():
        raise ValueError("the latents hold a NaN or infinity: look for it in the activations or the SAE's weights")
    fired = latents.indices[latents.data != 0]  # a zero may be stored
    return Firing(num_rows, np.bincount(fired, minlength=d_latent) / num_rows)
