"""BatchTopK: the reference against sorting, and the fast selection against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.sae.codes import SparseCodes
from workers.sae.kernels.selection import BFLOAT16, FLOAT32, BatchTopKSelector, LowPrecision
from workers.sae.selection import batch_topk


def problem(batch: int, d_in: int, d_latent: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, d_in), (d_latent, d_in), (d_latent,))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> SparseCodes:
    return SparseCodes.from_dense(batch_topk(x @ W_enc.T + b_enc, k))


def assert_same_codes(codes: SparseCodes, expected: SparseCodes) -> None:
    assert torch.equal(codes.rows, expected.rows)
    assert torch.equal(codes.cols, expected.cols)
    torch.testing.assert_close(codes.values, expected.values)


def test_reference_keeps_the_largest_of_the_whole_batch() -> None:
    pre = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    acts = batch_topk(pre, 2)
    largest = pre.flatten().sort(descending=True).values[:12]
    assert torch.equal(acts[acts > 0].sort(descending=True).values, largest)
    assert torch.equal(acts[acts > 0], pre[acts > 0])
    assert len(set((acts > 0).sum(1).tolist())) > 1  # per batch, not per row


def test_reference_keeps_positive_values_only() -> None:
    pre = torch.tensor([[3.0, -1.0, 0.0], [-2.0, 1.0, -0.5]])
    assert torch.equal(batch_topk(pre, 2), pre.relu())
    assert not batch_topk(-torch.ones(4, 3), 2).any()
    assert torch.equal(batch_topk(torch.ones(4, 3), 3), torch.ones(4, 3))


def test_ties_at_the_cut_go_to_the_first_in_row_major_order() -> None:
    pre = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert batch_topk(pre, 1).tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_three_dimensional_input_is_one_batch_of_all_its_rows() -> None:
    pre = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    acts = batch_topk(pre, 2)
    assert int((acts > 0).sum()) == 3 * 4 * 2
    assert torch.equal(acts, batch_topk(pre.view(12, 10), 2).view(3, 4, 10))


def test_gradient_passes_where_selected_only() -> None:
    pre = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    acts = batch_topk(pre, 2)
    acts.sum().backward()
    assert pre.grad is not None
    assert torch.equal(pre.grad, (acts > 0).float())


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    d_in=st.integers(1, 24),
    d_latent=st.integers(1, 60),
    k=st.integers(1, 60),
    seed=st.integers(0, 999),
    precision=st.sampled_from([BFLOAT16, FLOAT32]),
)
def test_fast_selection_equals_the_reference(
    batch: int, d_in: int, d_latent: int, k: int, seed: int, precision: LowPrecision
) -> None:
    select = BatchTopKSelector(precision)
    for step in range(2):  # the second call starts from the first one's cut
        x, W_enc, b_enc = problem(batch, d_in, d_latent, seed + step)
        assert_same_codes(select(x, W_enc, b_enc, min(k, d_latent)), dense(x, W_enc, b_enc, min(k, d_latent)))


@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("factor", [1e-3, 0.2, 5.0, 1e4])
def test_a_wrong_guess_of_the_cut_does_not_change_the_selection(precision: LowPrecision, factor: float) -> None:
    x, W_enc, b_enc = problem(64, 32, 256, seed=0)
    select = BatchTopKSelector(precision)
    select(factor * x, W_enc, factor * b_enc, 8)
    assert_same_codes(select(x, W_enc, b_enc, 8), dense(x, W_enc, b_enc, 8))


def test_bound_holds_for_rows_and_latents_of_very_different_size_that_nearly_tie() -> None:
    """Pre-activations within 1e-4 of each other, far below bf16's resolution: only the bound keeps the right ones."""
    x, W_enc, b_enc = problem(64, 32, 256, seed=3)
    pre = x @ W_enc.T
    x[::7] *= 300
    W_enc[::5] *= 0.01
    b_enc = 100 + 1e-4 * b_enc
    assert_same_codes(BatchTopKSelector(BFLOAT16)(x, W_enc, b_enc, 8), dense(x, W_enc, b_enc, 8))
    flat = 1e-6 * W_enc
    assert float((x @ flat.T).std()) < float(pre.std())
    assert_same_codes(BatchTopKSelector(BFLOAT16)(x, flat, b_enc, 8), dense(x, flat, b_enc, 8))


def test_nothing_positive_is_no_code_and_does_not_spoil_the_next_batch() -> None:
    x, W_enc, b_enc = problem(16, 8, 32, seed=0)
    select = BatchTopKSelector()
    assert len(select(x, W_enc, b_enc - 1e3, 4).values) == 0
    assert_same_codes(select(x, W_enc, b_enc, 4), dense(x, W_enc, b_enc, 4))


def test_in_float32_a_difference_lies_within_rounding_of_the_cut() -> None:
    x, W_enc, b_enc = problem(256, 64, 1024, seed=1, dtype=torch.float32)
    codes, expected = BatchTopKSelector()(x, W_enc, b_enc, 16), dense(x, W_enc, b_enc, 16)
    pre = x @ W_enc.T + b_enc
    differs = (codes.to_dense() > 0) != (expected.to_dense() > 0)
    rounding = 2 * (64 + 2) * 2.0**-24 * float(x.norm(dim=1).max() * W_enc.norm(dim=1).max())
    assert bool(((pre - expected.values.min()).abs()[differs] <= rounding).all())
    assert len(codes.values) == len(expected.values) == 256 * 16
