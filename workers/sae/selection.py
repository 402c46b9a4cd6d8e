"""BatchTopK, the training activation (Bussmann, Leask, Nanda 2024): the reference of `kernels/selection.py`."""

from jaxtyping import Bool, Float
from torch import Tensor


def batch_topk(pre: Float[Tensor, "*batch d_latent"], k: int) -> Float[Tensor, "*batch d_latent"]:
    """relu(pre) where it is among the (number of rows * k) largest of the whole batch and dictionary; zero elsewhere.

    One selection, shared by all prefixes. Differentiable: the selection is a constant mask.
    """
    values = pre.detach().flatten()
    num = min(k * (pre.numel() // pre.shape[-1]), pre.numel())
    cut = float(values.kthvalue(pre.numel() - num + 1).values)
    return pre.relu() * largest_positive(values, num, cut).view_as(pre)


def largest_positive(values: Float[Tensor, " n"], num: int, cut: float) -> Bool[Tensor, " n"]:
    """Mark the `num` largest values, as far as positive. `cut` is the num-th; of its equals the first are taken."""
    if cut <= 0:
        return values > 0
    above = values > cut
    ties = values == cut
    return above | (ties & (ties.cumsum(0) <= num - above.sum()))
