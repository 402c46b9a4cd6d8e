"""Cosines between an SAE's directions: hand-computed cases and brute force."""

import pytest
import torch

from workers.scores.geometry import decoder_cosines


def random_weights(d_latent, d_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(d_in, d_latent, generator=generator),
        torch.randn(d_latent, d_in, generator=generator),
    )


def all_of(W_dec):
    return torch.ones(len(W_dec), dtype=torch.bool)


def test_a_small_case_by_hand():
    W_dec = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    W_enc = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]]) * 3
    found = decoder_cosines(W_enc, W_dec, all_of(W_dec))
    half = 0.5**0.5
    assert found.max_decoder_cosines.tolist() == pytest.approx([half, half, half])
    assert found.mean_max_decoder_cosine == pytest.approx(half)
    assert found.encoder_decoder_cosines.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-7)
    assert found.mean_encoder_decoder_cosine == pytest.approx(2 / 3)


def test_the_cosine_is_signed():
    W_dec = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert decoder_cosines(W_dec.T, W_dec, all_of(W_dec)).max_decoder_cosines.tolist() == [-1.0, -1.0]


def test_chunks_change_nothing():
    W_enc, W_dec = random_weights(d_latent=1500, d_in=8)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    found = decoder_cosines(W_enc, W_dec, all_of(W_dec))
    assert torch.allclose(found.max_decoder_cosines, cosines.amax(1), atol=1e-6)


def test_latents_left_out_are_neither_scored_nor_neighbours():
    W_enc, W_dec = random_weights(d_latent=6, d_in=4)
    W_dec[5] = W_dec[0]
    W_dec[4] = 0
    keep = torch.tensor([True, True, True, True, False, False])
    found, alone = decoder_cosines(W_enc, W_dec, keep), decoder_cosines(W_enc[:, :4], W_dec[:4], keep[:4])
    assert torch.equal(found.max_decoder_cosines[:4], alone.max_decoder_cosines)
    assert found.max_decoder_cosines[4:].isnan().all()
    assert found.encoder_decoder_cosines[4:].isnan().all()
    assert found.mean_max_decoder_cosine == alone.mean_max_decoder_cosine


def test_lengths_do_not_matter():
    W_enc, W_dec = random_weights(d_latent=5, d_in=3)
    scale = torch.tensor([0.1, 1.0, 2.0, 30.0, 4.0])
    one, other = (
        decoder_cosines(W_enc, W_dec, all_of(W_dec)),
        decoder_cosines(W_enc * scale, W_dec / scale[:, None], all_of(W_dec)),
    )
    assert torch.allclose(one.max_decoder_cosines, other.max_decoder_cosines, atol=1e-6)
    assert torch.allclose(one.encoder_decoder_cosines, other.encoder_decoder_cosines, atol=1e-6)


def test_directions_without_length_and_lone_latents_are_refused():
    W_enc, W_dec = random_weights(d_latent=3, d_in=2)
    with pytest.raises(ValueError, match="1 latents are kept"):
        decoder_cosines(W_enc, W_dec, torch.tensor([True, False, False]))
    W_dec[1] = 0
    with pytest.raises(ValueError, match="decoder direction is zero"):
        decoder_cosines(W_enc, W_dec, all_of(W_dec))
    W_enc[0, 0] = torch.nan
    with pytest.raises(ValueError, match="encoder direction is zero or not finite"):
        decoder_cosines(W_enc, W_dec, torch.tensor([True, False, True]))
