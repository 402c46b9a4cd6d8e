"""Hand-written gradients against autograd of the dense formulas, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.sae.codes import SparseCodes
from workers.sae.gradients import Objective, reference_gradients
from workers.sae.kernels.nested import nested_gradients
from workers.sae.kernels.step import FastGradients
from workers.sae.losses import nested_loss
from workers.sae.module import PARAMETERS, SparseAutoencoder
from workers.sae.prefixes import Prefixes

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_sae(generator: torch.Generator, d_in: int, d_latent: int) -> SparseAutoencoder:
    weights = [draw(generator, *shape) for shape in ((d_latent, d_in), (d_latent, d_in), (d_latent,), (d_in,))]
    return SparseAutoencoder(*weights, threshold=torch.zeros((), dtype=torch.float64))


def random_prefixes(generator: torch.Generator, d_latent: int, num: int) -> Prefixes:
    lengths = torch.randperm(d_latent - 1, generator=generator)[: num - 1].add(1).sort().values.tolist()
    weights = torch.rand(len(lengths) + 1, generator=generator, dtype=torch.float64)
    return Prefixes((*lengths, d_latent), tuple((weights / weights.sum()).tolist()))


shapes = {
    "batch": st.integers(1, 20),
    "d_in": st.integers(1, 12),
    "d_latent": st.integers(2, 40),
    "num_prefixes": st.integers(1, 8),
    "seed": st.integers(0, 999),
}


@settings(max_examples=60, deadline=None)
@given(**shapes, density=st.sampled_from([0.0, 0.05, 0.4, 1.0]))
def test_nested_gradients_equal_autograd(
    batch: int, d_in: int, d_latent: int, num_prefixes: int, seed: int, density: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae, x = random_sae(generator, d_in, d_latent), draw(generator, batch, d_in)
    prefixes = random_prefixes(generator, d_latent, num_prefixes)
    mask = torch.rand(batch, d_latent, generator=generator) < density
    acts = (draw(generator, batch, d_latent).abs() * mask).requires_grad_()
    codes = SparseCodes.from_dense(acts.detach())

    expected, errors = nested_loss(sae, x, acts, prefixes)
    d_acts, d_W_dec, d_b_dec = torch.autograd.grad(expected, [acts, sae.W_dec, sae.b_dec])
    fast = nested_gradients((x - sae.b_dec).detach(), codes, sae.W_dec, prefixes)

    torch.testing.assert_close(fast.loss, expected.detach(), **TOLERANCE)
    torch.testing.assert_close(fast.squared_errors, errors.detach(), **TOLERANCE)
    torch.testing.assert_close(fast.residual, (x - sae.decode(acts)).detach(), **TOLERANCE)
    torch.testing.assert_close(fast.d_acts, d_acts[codes.rows, codes.cols], **TOLERANCE)
    torch.testing.assert_close(fast.d_decoder, d_W_dec, **TOLERANCE)
    torch.testing.assert_close(fast.d_bias, d_b_dec, **TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(**shapes, k=st.integers(1, 8), aux_k=st.integers(1, 6), dead_share=st.sampled_from([0.0, 0.3, 1.0]))
def test_all_gradients_of_a_batch_equal_the_reference(
    batch: int, d_in: int, d_latent: int, num_prefixes: int, seed: int, k: int, aux_k: int, dead_share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae, x = random_sae(generator, d_in, d_latent), draw(generator, batch, d_in)
    prefixes = random_prefixes(generator, d_latent, num_prefixes)
    dead = torch.rand(d_latent, generator=generator) < dead_share
    # one row leaves a residual without variance, which AuxK would be divided by
    objective = Objective(k=min(k, d_latent), aux_weight=0.5 if batch > 1 else 0.0, aux_k=aux_k)

    expected = reference_gradients(sae, x, prefixes, dead, objective)
    fast = FastGradients()(sae, x, prefixes, dead, objective)

    for name in ("nested_loss", "aux_loss", "squared_errors", "smallest"):
        torch.testing.assert_close(getattr(fast, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    assert torch.equal(fast.active_counts, expected.active_counts)
    for name in PARAMETERS:
        torch.testing.assert_close(fast.gradients[name], expected.gradients[name], rtol=1e-8, atol=1e-9)


def test_auxk_moves_dead_latents_only_and_the_decoder_bias_through_the_encoder() -> None:
    generator = torch.Generator().manual_seed(0)
    sae, x = random_sae(generator, 6, 20), draw(generator, 30, 6)
    dead = torch.arange(20) % 4 == 0
    prefixes = Prefixes.equal((20,))
    without, with_aux = (FastGradients()(sae, x, prefixes, dead, Objective(3, weight, 2)) for weight in (0.0, 1.0))
    for name in ("W_enc", "W_dec", "b_enc"):
        changed = (without.gradients[name] != with_aux.gradients[name]).view(20, -1).any(1)
        assert bool(changed.any())
        assert not bool((changed & ~dead).any())
    aux_b_enc = with_aux.gradients["b_enc"] - without.gradients["b_enc"]
    aux_b_dec = with_aux.gradients["b_dec"] - without.gradients["b_dec"]
    torch.testing.assert_close(aux_b_dec, -aux_b_enc @ sae.W_enc.detach())
