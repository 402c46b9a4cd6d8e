"""How long each latent has been silent, in rows (tokens), whatever the batch size. Used by the trainer."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class DeadLatents:
    """Counts rows since each latent last fired; a latent is dead once it was silent for `dead_after_rows` rows."""

    def __init__(self, d_latent: int, dead_after_rows: int, device: torch.device) -> None:
        self.rows_since_fired: Int64[Tensor, " d_latent"] = torch.zeros(d_latent, dtype=torch.int64, device=device)
        self.dead_after_rows = dead_after_rows

    def mask(self) -> Bool[Tensor, " d_latent"]:
        """Which latents are dead now."""
        return self.rows_since_fired >= self.dead_after_rows

    def update(self, active_counts: Int64[Tensor, " d_latent"], num_rows: int) -> None:
        """Account for a batch of `num_rows` rows in which each latent fired `active_counts` times."""
        self.rows_since_fired += num_rows
        self.rows_since_fired[active_counts > 0] = 0
