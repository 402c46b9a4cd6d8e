"""BatchTopK without the dense encoder product in full precision: `sae.selection.batch_topk` for `kernels/step.py`.

1. One low-precision product gives an upper bound U >= pre of every pre-activation: x and W_enc are rounded, and two
   more columns add b_enc and what the rounding can at most have taken away.
2. Candidates are the places where U >= tau, tau a little below the previous batch's cut. Whatever is not among them
   has pre < tau.
3. Candidates are computed again in full precision. If at least batch * k of them reach tau, the batch * k largest of
   them are those of the whole matrix; otherwise tau is lowered. At tau = 0 every positive value is a candidate, so the
   search ends.

The selection is thus exact, not approximate: it may differ from a dense product in the same precision only where two
pre-activations lie within that precision's own rounding of the cut. A poor tau costs time, never correctness.

With u the unit roundoff of the low precision and g = (d_in + 2) 2^-24 that of a float32 sum, by Cauchy-Schwarz

    |x.w - lowp(x).lowp(w)| <= (2u + u^2) |x||w|

and the float32 sums, of this product and of the second look, are each off by at most g (1 + u)^2 |x||w|.

Measured on a CPU with bf16 instructions, one thread, at (d_in 256, 4096 latents) and (768, 16384): the product is 4.5
times as fast in bf16 as in float32, and the whole step 1.7 and 2.3 times, though the looser bound lets in nearly twice
as many candidates. Elsewhere the same code runs with float32.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workers.sae.codes import SparseCodes, offsets
from workers.sae.kernels.products import sampled_dots
from workers.sae.selection import largest_positive

_NUM_BOUND_COLUMNS = 2
_SAMPLE_ROWS = 64  # rows from which the cut is guessed when there is no previous batch
_TAU_SHARES = (0.97, 0.9, 0.75, 0.4, 0.0)  # of the expected cut; successive cuts differ by a percent or two


@dataclass(frozen=True)
class LowPrecision:
    """The type of the bounding product, its bits as integers, and its unit roundoff."""

    dtype: torch.dtype
    bits: torch.dtype
    roundoff: float


BFLOAT16 = LowPrecision(torch.bfloat16, torch.int16, 2.0**-8)
FLOAT32 = LowPrecision(torch.float32, torch.int32, 2.0**-24)


def preferred_precision(device: torch.device) -> LowPrecision:
    """bf16 where the CPU multiplies it; else float32, as a GPU may sum bf16 products in bf16, beyond the bound."""
    native = any("bf16" in name and present for name, present in torch.cpu.get_capabilities().items())
    return BFLOAT16 if device.type == "cpu" and native else FLOAT32


class BatchTopKSelector:
    """Selects the codes of one batch after another. Keeps its large buffer, and the last cut as a guess of the next."""

    def __init__(self, precision: LowPrecision | None = None) -> None:
        self._precision = precision
        self._cut: float | None = None
        self._bounds = torch.empty(0, 0)

    def __call__(
        self,
        centred: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_latent d_in"],
        b_enc: Float[Tensor, " d_latent"],
        k: int,
    ) -> SparseCodes:
        """The batch * k largest positive values of centred W_enc^T + b_enc, where centred = x - b_dec."""
        precision = self._precision or preferred_precision(centred.device)
        bounds = self._upper_bounds(centred, W_enc, b_enc, precision)
        num = centred.shape[0] * k
        guess = self._cut if self._cut is not None else _sampled_cut(centred, W_enc, b_enc, k)
        for share in _TAU_SHARES:
            tau = torch.tensor(share * guess, dtype=precision.dtype)
            candidates = _candidates(bounds, tau, precision)
            values = _rescored(candidates, centred, W_enc, b_enc)
            if share == 0 or int((values >= float(tau)).sum()) >= num:
                break
        kept = _places(largest_positive(values, num, _cut(values, num)))
        rows, cols, values = (tensor.index_select(0, kept) for tensor in (*candidates, values))
        codes = SparseCodes(rows, cols, values, centred.shape[0], W_enc.shape[0])
        self._cut = float(values.min()) if len(kept) else None
        return codes

    def _upper_bounds(self, centred: Tensor, W_enc: Tensor, b_enc: Tensor, precision: LowPrecision) -> Tensor:
        """U of the module docstring, [batch d_latent], in a buffer that the next call overwrites."""
        batch, d_in = centred.shape
        u, g = precision.roundoff, (d_in + _NUM_BOUND_COLUMNS) * 2.0**-24
        slack = 2 * u + u**2 + 3 * g

        def rounded_up(tensor: Tensor) -> Tensor:
            return tensor + (2 * u + 2 * g) * tensor.abs()

        left = torch.empty(batch, d_in + _NUM_BOUND_COLUMNS, dtype=precision.dtype, device=centred.device)
        left[:, :d_in] = centred
        left[:, d_in] = rounded_up(slack * centred.norm(dim=1))
        left[:, d_in + 1] = 1
        right = torch.empty(W_enc.shape[0], d_in + _NUM_BOUND_COLUMNS, dtype=precision.dtype, device=centred.device)
        right[:, :d_in] = W_enc
        right[:, d_in] = rounded_up(W_enc.norm(dim=1))
        right[:, d_in + 1] = rounded_up(b_enc)
        if self._bounds.shape != (batch, W_enc.shape[0]) or self._bounds.device != centred.device:
            self._bounds = torch.empty(batch, W_enc.shape[0], dtype=precision.dtype, device=centred.device)
        return torch.mm(left, right.T, out=self._bounds)


def _sampled_cut(centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> float:
    """The cut of a few rows of the batch, spread over it."""
    sample = centred[:: max(1, centred.shape[0] // _SAMPLE_ROWS)]
    pre = torch.addmm(b_enc, sample, W_enc.T).flatten()
    rank = max(1, pre.numel() - sample.shape[0] * k + 1)
    return max(0.0, float(pre.kthvalue(rank).values))


def _candidates(
    bounds: Float[Tensor, "batch d_latent"], tau: Float[Tensor, ""], precision: LowPrecision
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]:
    """Rows and latents, in row-major order, where the bound is positive and at least tau.

    Rounding the bounds cannot hide one: tau has their precision, and rounding is monotone. Positive floats are ordered
    as their bits are as integers, which compare several times faster than bf16.
    """
    lowest = max(1, int(tau.view(precision.bits)))
    bits = bounds.view(precision.bits).flatten()
    flat = _places(torch.from_numpy(bits.numpy() >= lowest) if bits.device.type == "cpu" else bits >= lowest)
    rows = flat // bounds.shape[1]
    return rows, flat - rows * bounds.shape[1]


def _places(mask: Bool[Tensor, " n"]) -> Int64[Tensor, " nnz"]:
    """Where a mask is true. NumPy does this several times faster than torch on a CPU."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def _cut(values: Float[Tensor, " n"], num: int) -> float:
    """The num-th largest value, 0 if there are fewer. On a CPU NumPy is twenty times faster than torch's kthvalue."""
    if len(values) < num:
        return 0.0
    rank = len(values) - num
    if values.device.type == "cpu":
        return float(np.partition(values.numpy(), rank)[rank])
    return float(values.kthvalue(rank + 1).values)


def _rescored(
    candidates: tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]],
    centred: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_latent d_in"],
    b_enc: Float[Tensor, " d_latent"],
) -> Float[Tensor, " nnz"]:
    """Pre-activations of the candidates in full precision."""
    rows, cols = candidates
    return sampled_dots(centred, W_enc, offsets(rows, centred.shape[0]), cols) + b_enc.index_select(0, cols)
