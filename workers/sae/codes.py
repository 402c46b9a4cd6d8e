"""Sparse activations of a batch: the few (row, latent, value) triples that are not zero.

A value, without arithmetic: products with a decoder are in `kernels/products.py`. Made by
`SparseAutoencoder.encode_sparse` and by the selection kernel; read by the nested loss kernel and by whoever counts,
probes or shows activations.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """Activations in coordinate form, sorted by row, then by latent; no pair occurs twice."""

    rows: Int64[Tensor, " nnz"]
    """Row of the batch."""
    cols: Int64[Tensor, " nnz"]
    """Latent."""
    values: Float[Tensor, " nnz"]
    """Activation."""
    batch: int
    """Number of rows, empty ones included."""
    d_latent: int
    """Number of latents, silent ones included."""

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "batch d_latent"]) -> "SparseCodes":
        """The nonzero entries of a dense matrix."""
        rows, cols = acts.nonzero(as_tuple=True)
        return cls(rows, cols, acts[rows, cols], *acts.shape)

    def to_dense(self) -> Float[Tensor, "batch d_latent"]:
        """The matrix these codes stand for."""
        dense = self.values.new_zeros(self.batch, self.d_latent)
        dense[self.rows, self.cols] = self.values
        return dense

    @cached_property
    def row_offsets(self) -> Int64[Tensor, " batch_plus_1"]:
        """Where each row starts, and the end of the last: the CSR form, together with `cols` and `values`."""
        return offsets(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> Int64[Tensor, " nnz"]:
        """The order of the triples by latent, then by row: the CSC form, together with `latent_offsets`."""
        return torch.argsort(self.cols.int(), stable=True)  # a stable sort of int32 is a radix sort on CPUs

    @cached_property
    def latent_offsets(self) -> Int64[Tensor, " d_latent_plus_1"]:
        """Where each latent starts in that order, and the end of the last."""
        return offsets(self.cols, self.d_latent)

    def within(self, prefix: int) -> "SparseCodes":
        """The codes of the first `prefix` latents; the others are dropped, the shape stays."""
        kept = self.cols < prefix
        return SparseCodes(self.rows[kept], self.cols[kept], self.values[kept], self.batch, self.d_latent)


def offsets(groups: Int64[Tensor, " nnz"], num_groups: int) -> Int64[Tensor, " num_groups_plus_1"]:
    """Where each group starts once the groups lie one after another, and the end of the last."""
    counts = torch.bincount(groups, minlength=num_groups)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
