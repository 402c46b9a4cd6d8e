"""BatchTopK, the training activation (Bussmann, Leask, Nanda 2024): the reference. `kernels/selection.py` must choose the same."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def batch_topk(pre: Float[Tensor, "*batch d_latent"], k: int) -> Float[Tensor, "*batch d_latent"]:
    """relu(pre) where it is among the (number of rows * k) largest of the whole batch and dictionary; zero elsewhere.

    One selection, shared by all prefixes. Differentiable: the selection is a constant mask.
    """
    num_rows = pre.numel() // pre.shape[-1]
    return pre.relu() * largest_positive(pre.detach().flatten(), num_rows * k).view_as(pre)


def largest_positive(values: Float[Tensor, " n"], num: int) -> Bool[Tensor, " n"]:
    """Mark the `num` largest values, or all positive ones if they are fewer; among equals at the cut, the first ones."""
    if values.numel() == 0:
        return values > 0
    num = min(num, values.numel())
    cut = values.kthvalue(values.numel() - num + 1).values.relu()
    above = values > cut
    ties = (values == cut) & (cut > 0)
    return above | (ties & (ties.cumsum(0) <= num - above.sum()))
