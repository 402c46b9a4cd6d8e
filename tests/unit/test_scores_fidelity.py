"""Cross-entropy, KL and FVU: hand-computed cases, the plain formulas, streaming."""

import math

import pytest
import torch

from workers.scores.fidelity import (
    FVUAccumulator,
    PredictionAccumulator,
    kl_divergences,
    log_probabilities,
    next_token_losses,
    recovered,
)


def random_pass(seed, batch=3, seq=5, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    return log_probabilities(torch.randn(batch, seq, vocab, generator=generator))


def everything(token_ids):
    return torch.ones_like(token_ids, dtype=torch.bool)


def test_a_uniform_prediction_costs_log_vocab_nats():
    losses = next_token_losses(log_probabilities(torch.zeros(2, 4, 8)), torch.zeros(2, 4, dtype=torch.int64))
    assert torch.allclose(losses, torch.full((2, 3), math.log(8)))


def test_the_loss_is_that_of_the_next_token():
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])
    losses = next_token_losses(probabilities.log(), torch.tensor([[2, 1]]))
    assert losses.tolist() == [[pytest.approx(math.log(4))]]


def test_kl_is_that_of_clean_from_patched():
    clean, patched = random_pass(0), random_pass(1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=patched)
    )
    assert torch.allclose(kl_divergences(clean, patched), expected, atol=1e-6)


def test_kl_survives_probabilities_that_underflow():
    clean, patched = (log_probabilities(torch.tensor([[[0.0, gap]]])) for gap in (-200.0, 200.0))
    assert kl_divergences(clean, patched).item() == pytest.approx(200.0)


def test_log_probabilities_of_bfloat16_logits_are_float32():
    found = log_probabilities(torch.randn(1, 2, 50, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert torch.allclose(found.exp().sum(-1), torch.ones(1, 2))


def test_masks_leave_out_context_tokens_and_targets():
    clean, patched = random_pass(0, batch=1, seq=4), random_pass(1, batch=1, seq=4)
    token_ids = torch.tensor([[0, 1, 2, 3]])
    is_context = torch.tensor([[False, True, True, False]])  # BOS, two tokens, padding
    is_target = torch.tensor([[True, True, True, False]])
    sums = PredictionAccumulator()
    sums.add(patched, clean, token_ids, is_context, is_target)
    assert sums.num_predictions == 1  # token 1 predicts 2; 2 would predict padding
    assert sums.num_tokens == 2
    assert sums.cross_entropy_nats == pytest.approx(-patched[0, 1, 2].item())
    assert sums.kl_nats == pytest.approx(kl_divergences(clean, patched)[0, 1:3].mean().item())


def test_batches_are_pooled_over_tokens():
    clean, patched = random_pass(0), random_pass(1)
    token_ids = torch.arange(15).reshape(3, 5) % 7
    is_context = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    whole, parts = PredictionAccumulator(), PredictionAccumulator()
    whole.add(patched, clean, token_ids, is_context, everything(token_ids))
    for some in (slice(0, 1), slice(1, 3)):
        parts.add(patched[some], clean[some], token_ids[some], is_context[some], everything(token_ids[some]))
    assert parts.cross_entropy_nats == pytest.approx(whole.cross_entropy_nats, rel=1e-6)
    assert parts.kl_nats == pytest.approx(whole.kl_nats, rel=1e-6)


def test_recovered_is_one_for_the_clean_pass_and_zero_for_the_ablated_one():
    token_ids = torch.tensor([[1, 2, 3, 4, 5]])
    clean_logits = torch.nn.functional.one_hot(token_ids.roll(-1), 7).float() * 5
    clean = log_probabilities(clean_logits)
    passes = {}
    for name, logits in {"clean": clean_logits, "half": clean_logits / 2, "ablated": torch.zeros(1, 5, 7)}.items():
        passes[name] = PredictionAccumulator()
        passes[name].add(log_probabilities(logits), clean, token_ids, everything(token_ids), everything(token_ids))
    best = recovered(passes["clean"], passes["ablated"], passes["clean"])
    worst = recovered(passes["clean"], passes["ablated"], passes["ablated"])
    between = recovered(passes["clean"], passes["ablated"], passes["half"])
    assert (best.cross_entropy, best.kl) == (1.0, 1.0)
    assert (worst.cross_entropy, worst.kl) == (0.0, 0.0)
    losses = {name: sums.cross_entropy_nats for name, sums in passes.items()}
    expected = (losses["ablated"] - losses["half"]) / (losses["ablated"] - losses["clean"])
    assert between.cross_entropy == pytest.approx(expected)
    assert between.kl == pytest.approx(1 - passes["half"].kl_nats / passes["ablated"].kl_nats)


def test_recovered_needs_an_ablation_that_harms():
    clean, token_ids = random_pass(0), torch.zeros(3, 5, dtype=torch.int64)
    sums = PredictionAccumulator()
    sums.add(clean, clean, token_ids, everything(token_ids), everything(token_ids))
    with pytest.raises(ValueError, match="no loss to recover"):
        recovered(sums, sums, sums)


def test_a_nan_is_refused_and_leaves_the_sums_unchanged():
    clean, token_ids = random_pass(0), torch.zeros(3, 5, dtype=torch.int64)
    broken = clean.clone()
    broken[0, 0, 0] = torch.nan
    sums = PredictionAccumulator()
    with pytest.raises(ValueError, match="not finite"):
        sums.add(broken, clean, token_ids, everything(token_ids), everything(token_ids))
    assert sums == PredictionAccumulator()


def test_a_mean_over_nothing_is_refused():
    with pytest.raises(ValueError, match="no prediction was counted"):
        _ = PredictionAccumulator().cross_entropy_nats
    with pytest.raises(ValueError, match="no token was counted"):
        _ = PredictionAccumulator().kl_nats


def textbook_fvu(x, reconstruction):
    x, reconstruction = x.double(), reconstruction.double()
    return ((x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_fvu_of_uneven_batches_is_the_textbook_formula(offset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, generator=generator) + offset
    found = {prefix: x + torch.randn(100, 6, generator=generator) / prefix for prefix in (1, 4)}
    accumulator = FVUAccumulator((1, 4))
    for some in (slice(0, 1), slice(1, 40), slice(40, 40), slice(40, 100)):
        accumulator.add(x[some], {prefix: part[some] for prefix, part in found.items()})
    expected = {prefix: textbook_fvu(x, part) for prefix, part in found.items()}
    assert accumulator.fvu() == pytest.approx(expected, rel=1e-9)
    assert accumulator.num_rows == 100


def test_fvu_is_one_for_the_mean_and_zero_for_the_rows_themselves():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).double()
    accumulator = FVUAccumulator((1, 2))
    accumulator.add(x, {1: x.mean(0).expand_as(x), 2: x})
    assert accumulator.fvu() == {1: pytest.approx(1.0), 2: 0.0}


def test_a_constant_error_counts():
    x = torch.tensor([[-1.0], [1.0]])
    accumulator = FVUAccumulator((1,))
    accumulator.add(x, {1: x + 1})
    assert accumulator.fvu() == {1: 1.0}  # dictionary_learning's variance of the residual would give 0


def test_fvu_needs_rows_that_differ_and_are_finite():
    same = FVUAccumulator((1,))
    with pytest.raises(ValueError, match="the 0 rows have no variance"):
        same.fvu()
    same.add(torch.ones(3, 2), {1: torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="the 3 rows have no variance"):
        same.fvu()
    same.add(torch.zeros(1, 2), {1: torch.full((1, 2), torch.nan)})
    with pytest.raises(ValueError, match="NaN"):
        same.fvu()
