"""SAETrainer: both compute paths agree, resume is exact, bad input changes nothing, and known features are found."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.config import SAEConfig, TrainConfig
from workers.sae.optimiser import Optimiser
from workers.sae.scaling import input_scale
from workers.sae.trainer import SAETrainer

D_IN, BATCH = 16, 64
NESTINGS: dict[str, dict[str, Any]] = {
    "none": {"nesting": "none"},
    "fixed": {"nesting": "fixed", "widths": (6, 16, 48)},
    "random": {"nesting": "random", "num_prefixes": 4},
}


def sae_config(nesting: str = "none", **changes: Any) -> SAEConfig:
    return SAEConfig.model_validate({"name": "a", "hook": "h", "d_latent": 48, "k": 3} | NESTINGS[nesting] | changes)


def train_config(**changes: Any) -> TrainConfig:
    defaults = {"rows": 40 * BATCH, "batch_rows": BATCH, "dead_after_rows": 2 * BATCH, "aux_k": 4, "aux_weight": 0.5}
    return TrainConfig.model_validate(defaults | changes)


def make_trainer(config: SAEConfig, train: TrainConfig, scale: float = 0.5) -> SAETrainer:
    return SAETrainer(config, train, D_IN, torch.full((D_IN,), 0.3), scale, "cpu")


def batches(num: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows along a few directions, so that latents die."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(5, D_IN, generator=generator, dtype=dtype)
    noise = 0.1 * torch.randn(num, BATCH, D_IN, generator=generator, dtype=dtype)
    return list(torch.randn(num, BATCH, 5, generator=generator, dtype=dtype).relu() @ directions + noise + 0.3)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_fast_steps_equal_reference_steps_with_dead_latents_at_work(nesting: str) -> None:
    trainers = [make_trainer(sae_config(nesting), train_config(compute=compute)) for compute in ("fast", "reference")]
    for trainer in trainers:
        trainer.sae.double()
        trainer.optimiser = Optimiser(trainer.sae, trainer.train)
    aux_losses = []
    for x in batches(12, torch.float64):
        fast, reference = (trainer.step(x).as_floats() for trainer in trainers)
        for name in ("loss", "aux_loss", "fvu", "l0", "dead_share", "threshold", "gradient_norm", "learning_rate"):
            assert getattr(fast, name) == pytest.approx(getattr(reference, name), rel=1e-6, abs=1e-12), name
        assert fast.prefix_fvu == pytest.approx(reference.prefix_fvu)
        aux_losses.append(fast.aux_loss)
    assert aux_losses[0] == 0
    assert aux_losses[-1] > 0
    for name, tensor in trainers[0].sae.tensors().items():
        torch.testing.assert_close(tensor, trainers[1].sae.tensors()[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("compute", ["fast", "reference"])
@pytest.mark.parametrize("nesting", ["fixed", "random"])
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(compute: str, nesting: str) -> None:
    config, train = sae_config(nesting), train_config(compute=compute)
    data = batches(16)
    whole = make_trainer(config, train)
    for x in data[:7]:
        whole.step(x)
    tensors, values = whole.state()
    resumed = make_trainer(config, train)
    resumed.load_state(tensors, values)
    for x in data[7:]:
        assert whole.step(x).as_floats() == resumed.step(x).as_floats()
    for name, tensor in whole.state()[0].items():
        assert torch.equal(tensor, resumed.state()[0][name]), name
    assert whole.num_steps == resumed.num_steps == 16


def test_state_is_a_copy() -> None:
    trainer = make_trainer(sae_config(), train_config())
    tensors, _ = trainer.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    trainer.step(batches(1)[0])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
    assert not torch.equal(trainer.state()[0]["W_enc"], tensors["W_enc"])


def test_resume_state_of_another_config_is_refused_and_changes_nothing() -> None:
    trainer, other = (make_trainer(sae_config(d_latent=n), train_config()) for n in (48, 50))
    other.step(batches(1)[0])
    with pytest.raises(ValueError, match=r"saes\.a: W_enc of the resume state is \[50, 16\].*another config"):
        trainer.load_state(*other.state())
    tensors, values = trainer.state()
    with pytest.raises(ValueError, match="rows_since_fired"):
        trainer.load_state({name: t for name, t in tensors.items() if name != "rows_since_fired"}, values)
    with pytest.raises(ValueError, match="num_steps"):
        trainer.load_state(tensors, {})
    assert trainer.num_steps == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_input_that_is_not_finite_is_named_and_changes_nothing(bad: float) -> None:
    trainer, x = make_trainer(sae_config(), train_config()), batches(1)[0]
    before = trainer.state()[0]
    x[17, 3] = bad
    with pytest.raises(ValueError, match=r"saes\.a: row 17 of the batch from h holds NaN or infinity"):
        trainer.step(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state()[0].items())
    assert trainer.num_steps == 0


@pytest.mark.parametrize("compute", ["fast", "reference"])
def test_loss_that_is_not_finite_is_refused_and_changes_nothing(compute: str) -> None:
    trainer = make_trainer(sae_config("random"), train_config(compute=compute))
    before = trainer.state()[0]
    with pytest.raises(ValueError, match=r"loss inf or gradient norm .* of step 0 is not finite"):
        trainer.step(torch.full((BATCH, D_IN), 1e30))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state()[0].items())


def test_mean_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mean of h has shape \[3\]: \[16\] is needed"):
        SAETrainer(sae_config(), train_config(), D_IN, torch.zeros(3), 1.0, "cpu")


def test_bfloat16_input_is_trained_on_in_float32() -> None:
    first, second = (make_trainer(sae_config(), train_config()) for _ in range(2))
    x = batches(1)[0].bfloat16()
    assert first.step(x).as_floats() == second.step(x.float()).as_floats()


def test_decoder_rows_have_unit_norm_after_every_step() -> None:
    trainer = make_trainer(sae_config("fixed"), train_config(learning_rate=0.1))
    for x in batches(10):
        trainer.step(x)
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(48))


def test_step_result_measures_what_it_says() -> None:
    trainer, x = make_trainer(sae_config("fixed"), train_config(aux_weight=0.0, compute="reference")), batches(1)[0]
    sae = trainer.sae
    scaled = 0.5 * x
    pre = ((scaled - sae.b_dec) @ sae.W_enc.T).detach()
    cut = pre.flatten().sort(descending=True).values[3 * BATCH - 1]
    acts = pre * (pre >= cut)
    variance = (scaled - scaled.mean(0)).square().sum()
    expected = {m: ((scaled - sae.decode(acts, m)).square().sum() / variance).item() for m in (6, 16, 48)}
    result = trainer.step(x).as_floats()
    assert result.prefix_fvu == pytest.approx(expected, rel=1e-5)
    assert result.fvu == pytest.approx(expected[48], rel=1e-5)
    assert result.loss == pytest.approx(sum(expected.values()) / 3 * float(variance) / scaled.numel(), rel=1e-5)
    assert result.l0 == 3
    assert result.threshold == pytest.approx(float(cut), rel=1e-5)


FEATURES = torch.nn.functional.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(9)), dim=1)


def known_features(num_rows: int, seed: int) -> Tensor:
    """Sums of 3 on average of 40 directions in 32 dimensions, off centre, in units far from 1."""
    generator = torch.Generator().manual_seed(seed)
    strengths = 1 + torch.rand(num_rows, 40, generator=generator)
    active = torch.rand(num_rows, 40, generator=generator) < 3 / 40
    return 40 * ((strengths * active) @ FEATURES + 0.5)


@functools.cache
def trained(nesting: str) -> SAETrainer:
    sample = known_features(4096, seed=0)
    scale = input_scale(32, float(sample.square().sum(1).mean()))
    train = TrainConfig(rows=300 * 256, batch_rows=256, learning_rate=0.01, dead_after_rows=5000)
    config = sae_config(nesting, d_latent=64, **({"widths": (16, 32, 64)} if nesting == "fixed" else {}))
    trainer = SAETrainer(config, train, 32, sample.mean(0), scale, "cpu")
    for step in range(train.num_steps):
        trainer.step(known_features(256, seed=step + 1))
    return trainer


def test_known_features_are_recovered() -> None:
    decoder = trained("none").sae.W_dec.detach()
    best_cosines = (FEATURES @ decoder.T).max(1).values
    assert float((best_cosines > 0.9).float().mean()) >= 0.95
    assert trained("none").step(known_features(256, seed=10_001)).as_floats().fvu < 0.06


def test_longer_prefixes_leave_less_unexplained_and_the_full_width_little() -> None:
    fvu = trained("fixed").step(known_features(256, seed=10_001)).as_floats().prefix_fvu
    assert fvu[16] > fvu[32] > fvu[64]
    assert fvu[64] < 0.15


@pytest.mark.parametrize("nesting", ["none", "fixed"])
def test_published_sae_has_the_l0_and_fvu_of_training_in_raw_units(nesting: str) -> None:
    raw = known_features(4096, seed=10_002)
    sae = trained(nesting).published()
    acts = sae.encode(raw).detach()
    assert float((acts > 0).float().sum(1).mean()) == pytest.approx(3, rel=0.1)
    fvu = (raw - sae.decode(acts)).square().sum() / (raw - raw.mean(0)).square().sum()
    assert fvu.item() == pytest.approx(trained(nesting).step(raw).as_floats().fvu, rel=0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
