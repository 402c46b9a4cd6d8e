"""The reference losses against loops over rows and prefixes, and the traps that public codes have fallen into."""

import pytest
import torch
from torch import Tensor

from workers.sae.losses import auxk_loss, nested_loss
from workers.sae.module import SparseAutoencoder
from workers.sae.prefixes import Prefixes


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def sae(generator: torch.Generator) -> SparseAutoencoder:
    weights = [normal(generator, *shape) for shape in ((12, 5), (12, 5), (12,), (5,))]
    return SparseAutoencoder(*weights, threshold=torch.zeros((), dtype=torch.float64))


def test_nested_loss_is_the_weighted_mean_over_prefixes_rows_and_dimensions(
    sae: SparseAutoencoder, generator: torch.Generator
) -> None:
    x, acts = normal(generator, 7, 5), normal(generator, 7, 12).relu()
    prefixes = Prefixes((2, 6, 12), (0.5, 0.2, 0.3))
    total = 0.0
    for length, weight in zip(prefixes.lengths, prefixes.weights, strict=True):
        for row in range(7):
            x_hat = sae.b_dec.clone()
            for latent in range(length):
                x_hat += acts[row, latent] * sae.W_dec[latent]
            total += weight * float((x[row] - x_hat).detach().square().sum()) / (7 * 5)
    assert nested_loss(sae, x, acts, prefixes)[0].item() == pytest.approx(total, rel=1e-12)


def test_number_of_prefixes_divides_once(sae: SparseAutoencoder, generator: torch.Generator) -> None:
    """Prefixes that decode the same cost what one of them costs: 1/G is applied once, not twice and not never."""
    x, acts = normal(generator, 7, 5), torch.zeros(7, 12, dtype=torch.float64)
    one, _ = nested_loss(sae, x, acts, Prefixes.equal((12,)))
    four, _ = nested_loss(sae, x, acts, Prefixes.equal((3, 6, 9, 12)))
    torch.testing.assert_close(four, one)
    torch.testing.assert_close(one, (x - sae.b_dec).square().mean())


def test_errors_fall_with_the_prefix_when_each_latent_explains_something() -> None:
    eye, zeros = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    sae = SparseAutoencoder(eye, eye.clone(), zeros, zeros.clone(), torch.zeros((), dtype=torch.float64))
    x = torch.rand(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, errors = nested_loss(sae, x, sae.encode(x), Prefixes.equal((1, 3, 6)))
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(errors[1], x[:, 3:].square().sum())


def test_auxk_uses_each_rows_largest_dead_latents_without_bias(generator: torch.Generator) -> None:
    residual, acts, W_dec = normal(generator, 4, 5), normal(generator, 4, 6).relu(), normal(generator, 6, 5)
    error = 0.0
    for row in range(4):
        e_hat = torch.zeros(5, dtype=torch.float64)
        for latent in acts[row].argsort(descending=True)[:2]:
            e_hat += acts[row, latent] * W_dec[latent]
        error += float((residual[row] - e_hat).square().sum())
    variance = float((residual - residual.mean(0)).square().sum())
    assert float(auxk_loss(residual, acts, W_dec, aux_k=2)) == pytest.approx(error / variance, rel=1e-12)


def test_auxk_with_fewer_dead_than_aux_k_uses_all_of_them(generator: torch.Generator) -> None:
    residual, acts, W_dec = normal(generator, 4, 5), normal(generator, 4, 3).relu(), normal(generator, 3, 5)
    expected = (residual - acts @ W_dec).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(auxk_loss(residual, acts, W_dec, aux_k=100), expected)


def test_auxk_is_zero_without_dead_latents_and_finite_without_variance(generator: torch.Generator) -> None:
    residual = normal(generator, 4, 5)
    assert float(auxk_loss(residual, residual.new_zeros(4, 0), residual.new_zeros(0, 5), 3)) == 0
    still = torch.zeros(4, 5, dtype=torch.float64)
    assert float(auxk_loss(still, torch.zeros(4, 2, dtype=torch.float64), normal(generator, 2, 5), 3)) == 0


def test_auxk_takes_the_residual_as_a_constant(generator: torch.Generator) -> None:
    residual = normal(generator, 4, 5).requires_grad_()
    acts, W_dec = normal(generator, 4, 6).relu().requires_grad_(), normal(generator, 6, 5).requires_grad_()
    auxk_loss(residual, acts, W_dec, aux_k=2).backward()
    assert residual.grad is None
    assert acts.grad is not None
    assert bool(acts.grad.any())
