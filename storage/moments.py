"""Mergeable statistics of activations: count, mean and squared deviations, in float64.

Called by `shards`, for each chunk as it is written, and by `manifest`, which merges those of all shards.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from storage.records import Moments

_BLOCK_ROWS = 256  # as many rows as stay in a processor's cache at float64


def as_float32(values: NDArray[np.uint16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Stored numbers as float32: uint16 is taken for the bits of bfloat16, the upper half of a float32."""
    if values.dtype == np.float32:
        return values.astype(np.float32, copy=False)
    return (values.astype(np.uint32) << 16).view(np.float32)


def moments_of(values: NDArray[np.uint16] | NDArray[np.float32], kept: NDArray[np.bool_]) -> Moments:
    """Statistics of the rows `kept` [rows] of `values` [rows, d]; both passes see one block of rows at a time."""
    rows = np.flatnonzero(kept)
    total = _Sums(0, np.zeros(values.shape[1]), np.zeros(values.shape[1]))
    for first in range(0, len(rows), _BLOCK_ROWS):
        block = as_float32(values[rows[first : first + _BLOCK_ROWS]]).astype(np.float64)
        mean = block.mean(axis=0)
        block -= mean
        total.add(_Sums(len(block), mean, np.einsum("rd,rd->d", block, block)))
    return total.record()


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Statistics of the union of disjoint sets of rows, merged from left to right."""
    if not parts:
        raise ValueError("there are no moments to merge")
    total = _Sums.of(parts[0])
    for part in parts[1:]:
        total.add(_Sums.of(part))
    return total.record()


class _Sums:
    """Moments as arrays, which add up.

    T. F. Chan, G. H. Golub, R. J. LeVeque: Updating formulae and a pairwise algorithm for computing sample variances,
    1979, eq. 2.1.
    """

    def __init__(self, count: int, mean: NDArray[np.float64], deviations: NDArray[np.float64]) -> None:
        self.count, self.mean, self.deviations = count, mean, deviations

    @classmethod
    def of(cls, record: Moments) -> "_Sums":
        return cls(record.count, np.array(record.mean), np.array(record.sum_squared_deviations))

    def add(self, other: "_Sums") -> None:
        count = self.count + other.count
        if other.count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.deviations = self.deviations + other.deviations + delta**2 * (self.count * other.count / count)
        self.count = count

    def record(self) -> Moments:
        return Moments(count=self.count, mean=self.mean.tolist(), sum_squared_deviations=self.deviations.tolist())
