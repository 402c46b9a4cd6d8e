"""SparseAutoencoder, its sparse codes, its initial weights and the folding of the input scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.config import SAEConfig
from workers.sae import module
from workers.sae.codes import SparseCodes
from workers.sae.initialise import initial_autoencoder
from workers.sae.module import SparseAutoencoder
from workers.sae.scaling import folded, input_scale


def random_sae(d_in: int, d_latent: int, seed: int = 0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    threshold = torch.tensor(0.7, dtype=torch.float64)
    return SparseAutoencoder(normal(d_latent, d_in), normal(d_latent, d_in), normal(d_latent), normal(d_in), threshold)


def random_rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 9), d_latent=st.integers(1, 17), batch=st.integers(0, 7), seed=st.integers(0, 99))
def test_sparse_encode_and_decode_equal_the_dense_ones(d_in: int, d_latent: int, batch: int, seed: int) -> None:
    sae, x = random_sae(d_in, d_latent, seed), random_rows(batch, d_in, seed=seed + 1)
    codes = sae.encode_sparse(x)
    acts = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), acts.detach())
    for prefix in (None, 0, d_latent // 2, d_latent):
        torch.testing.assert_close(sae.decode_sparse(codes, prefix), sae.decode(acts, prefix).detach())


def test_sparse_encoding_in_chunks_equals_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = random_sae(8, 20), random_rows(11, 8)
    whole = sae.encode_sparse(x)
    monkeypatch.setattr(module, "_ENCODE_CELLS", 60)
    chunked = sae.encode_sparse(x)
    assert torch.equal(whole.rows, chunked.rows)
    assert torch.equal(whole.cols, chunked.cols)
    torch.testing.assert_close(whole.values, chunked.values)


def test_codes_are_sorted_and_their_offsets_frame_each_row_and_latent() -> None:
    codes = random_sae(8, 20).encode_sparse(random_rows(11, 8))
    keys = codes.rows * codes.d_latent + codes.cols
    assert bool((keys.diff() > 0).all())
    dense = codes.to_dense()
    row, latent = 3, 5
    of_row = slice(*codes.row_offsets[row : row + 2].tolist())
    assert torch.equal(codes.cols[of_row], dense[row].nonzero().squeeze(1))
    of_latent = codes.by_latent[slice(*codes.latent_offsets[latent : latent + 2].tolist())]
    assert torch.equal(codes.rows[of_latent], dense[:, latent].nonzero().squeeze(1))
    assert torch.equal(SparseCodes.from_dense(dense).values, codes.values)


def test_activation_at_the_threshold_is_off_and_a_negative_one_stays_off() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1)
    sae = SparseAutoencoder(one, one.clone(), zero, zero.clone(), torch.tensor(0.5))
    x = torch.tensor([[0.5], [0.51], [-1.0]])
    assert sae.encode(x).flatten().tolist() == pytest.approx([0, 0.51, 0])
    sae.threshold.fill_(-2.0)
    assert sae.encode(x).flatten().tolist() == pytest.approx([0.5, 0.51, 0])


def test_leading_dimensions_are_kept() -> None:
    sae, x = random_sae(8, 20), random_rows(2, 3, 8)
    assert sae(x).shape == (2, 3, 8)
    torch.testing.assert_close(sae(x), sae(x.view(6, 8)).view(2, 3, 8))
    torch.testing.assert_close(sae(x)[1, 2], sae(x[1, 2]))


def test_prefix_reads_the_first_latents_only_and_counts_the_bias_once() -> None:
    sae, acts = random_sae(8, 20), random_rows(4, 20)
    expected = acts[:, :7] @ sae.W_dec[:7] + sae.b_dec
    torch.testing.assert_close(sae.decode(acts, 7), expected)
    torch.testing.assert_close(sae.decode(acts, 0), sae.b_dec.expand(4, 8))


def test_tensors_round_trip() -> None:
    sae, x = random_sae(8, 20), random_rows(5, 8)
    assert torch.equal(SparseAutoencoder.from_tensors(sae.tensors())(x), sae(x))


def test_missing_or_misshapen_tensors_are_refused_by_name() -> None:
    tensors = random_sae(8, 20).tensors()
    with pytest.raises(ValueError, match="exactly W_enc, W_dec, b_enc, b_dec, threshold"):
        SparseAutoencoder.from_tensors({name: tensor for name, tensor in tensors.items() if name != "b_enc"})
    with pytest.raises(ValueError, match=r"W_dec has shape \[8, 20\].* it must be \[20, 8\]"):
        SparseAutoencoder.from_tensors(tensors | {"W_dec": tensors["W_dec"].T})
    with pytest.raises(ValueError, match=r"threshold has shape \[20\]"):
        SparseAutoencoder.from_tensors(tensors | {"threshold": tensors["b_enc"]})
    with pytest.raises(ValueError, match="W_enc has shape"):
        SparseAutoencoder.from_tensors(tensors | {"W_enc": tensors["b_enc"]})


def test_initial_weights_are_tied_unit_rows_that_depend_on_the_seed_alone() -> None:
    config = SAEConfig(name="a", hook="h", d_latent=40, k=2, seed=3)
    mean = torch.arange(6.0)
    torch.manual_seed(1)
    first = initial_autoencoder(config, mean)
    torch.manual_seed(2)
    again = initial_autoencoder(config, mean)
    other = initial_autoencoder(config.model_copy(update={"seed": 4}), mean)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(first.W_enc, first.W_dec)
    assert torch.equal(first.b_dec, mean)
    assert not first.b_enc.any()
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_folded_scale_gives_the_same_active_set_and_everything_in_raw_units() -> None:
    sae, raw, scale = random_sae(8, 20), 5 * random_rows(50, 8), 0.3
    published = folded(sae, scale)
    scaled_acts, acts = sae.encode(raw * scale), published.encode(raw)
    assert torch.equal(acts > 0, scaled_acts > 0)
    assert bool((acts > 0).any())
    torch.testing.assert_close(acts, scaled_acts / scale)
    torch.testing.assert_close(published(raw), sae(raw * scale) / scale)
    torch.testing.assert_close(published.decode(acts, 6), sae.decode(scaled_acts, 6) / scale)
    assert torch.equal(published.W_dec, sae.W_dec)


def test_input_scale_makes_the_mean_squared_norm_d_in() -> None:
    raw = 7 * random_rows(100, 12)
    scale = input_scale(12, float(raw.square().sum(1).mean()))
    assert float((raw * scale).square().sum(1).mean()) == pytest.approx(12)
    with pytest.raises(ValueError, match="positive and finite"):
        input_scale(12, 0.0)
