"""Decoder norms, projection, clipping, schedule; and the two running counters: dead latents and threshold."""

import pytest
import torch
from torch import Tensor

from workers.config import SAEConfig, TrainConfig
from workers.sae.dead import DeadLatents
from workers.sae.initialise import initial_autoencoder
from workers.sae.module import PARAMETERS, SparseAutoencoder
from workers.sae.optimiser import Optimiser, learning_rate
from workers.sae.threshold import RunningThreshold

CPU = torch.device("cpu")


def small_sae() -> SparseAutoencoder:
    return initial_autoencoder(SAEConfig(name="a", hook="h", d_latent=12, k=2), torch.zeros(5))


def random_gradients(sae: SparseAutoencoder, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: size * torch.randn(sae.get_parameter(name).shape, generator=generator) for name in PARAMETERS}


def train_config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"rows": 1000, "batch_rows": 10, "warmup_share": 0.0, "decay_share": 0.0} | changes
    )


def test_projection_leaves_the_decoder_gradient_orthogonal_to_its_rows_and_returns_the_norm() -> None:
    sae = small_sae()
    gradients = random_gradients(sae)
    norm = Optimiser(sae, train_config()).project(gradients)
    torch.testing.assert_close((gradients["W_dec"] * sae.W_dec.detach()).sum(1), torch.zeros(12), atol=1e-6, rtol=0)
    assert float(norm) == pytest.approx(sum(float(g.square().sum()) for g in gradients.values()) ** 0.5, rel=1e-5)


def test_a_step_is_adam_followed_by_normalised_decoder_rows() -> None:
    sae, train = small_sae(), train_config(clip_norm=None)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    optimiser, gradients = Optimiser(sae, train), random_gradients(sae)
    optimiser.step(gradients, optimiser.project(gradients))
    moved = {name: before[name] - 1e-3 * gradients[name].sign() for name in PARAMETERS}  # Adam's first step
    moved["W_dec"] /= moved["W_dec"].norm(dim=1, keepdim=True)
    for name in PARAMETERS:
        torch.testing.assert_close(sae.tensors()[name], moved[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    sae = small_sae()
    optimiser, gradients = Optimiser(sae, train_config(clip_norm=0.5)), random_gradients(sae)
    norm = optimiser.project(gradients)
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    optimiser.step(gradients, norm)
    for name, moment in optimiser.tensors().items():
        if name.startswith("exp_avg."):
            expected = 0.1 * 0.5 / float(norm) * before[name.removeprefix("exp_avg.")]
            torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-8)


def test_gradients_below_the_clip_norm_are_left_alone() -> None:
    sae = small_sae()
    optimiser, gradients = Optimiser(sae, train_config(clip_norm=0.5)), random_gradients(sae, size=1e-4)
    norm = optimiser.project(gradients)
    before = gradients["W_enc"].clone()
    optimiser.step(gradients, norm)
    torch.testing.assert_close(optimiser.tensors()["exp_avg.W_enc"], 0.1 * before)


def test_learning_rate_rises_stays_and_falls_linearly() -> None:
    train = train_config(warmup_share=0.1, decay_share=0.2, learning_rate=2.0)
    rates = torch.tensor([learning_rate(train, step) for step in range(train.num_steps)], dtype=torch.float64)
    assert 0 < rates[0] == pytest.approx(2 / 11)
    assert bool((rates[10:80] == 2).all())
    assert float(rates[-1]) == pytest.approx(2 / 21)
    torch.testing.assert_close(rates[:10].diff(), torch.full((9,), 2 / 11, dtype=torch.float64))
    torch.testing.assert_close(rates[80:].diff(), torch.full((19,), -2 / 21, dtype=torch.float64))
    assert learning_rate(train, train.num_steps) == pytest.approx(0)
    assert learning_rate(train, 2 * train.num_steps) == 0


def test_constant_learning_rate_without_warmup_and_decay() -> None:
    assert {learning_rate(train_config(), step) for step in (0, 50, 99)} == {1e-3}


def test_dead_latents_are_counted_in_rows_whatever_the_batch_size() -> None:
    fired_first = torch.tensor([3, 0, 1])
    none = torch.zeros(3, dtype=torch.int64)
    for num_rows, num_batches in ((10, 10), (50, 2)):
        dead = DeadLatents(3, dead_after_rows=100, device=CPU)
        dead.update(fired_first, num_rows)
        for _ in range(num_batches - 1):
            dead.update(none, num_rows)
        assert dead.mask().tolist() == [
            False,
            True,
            False,
        ]  # latent 1 has been silent for 100 rows, the others for fewer
        dead.update(none, num_rows)
        assert dead.mask().tolist() == [True, True, True]
        dead.update(torch.tensor([0, 1, 0]), num_rows)
        assert dead.mask().tolist() == [True, False, True]


def test_running_threshold_is_bias_corrected_and_skips_silent_batches() -> None:
    running = RunningThreshold(0.1, CPU)
    assert float(running.value()) == 0
    running.update(torch.tensor(torch.inf))
    assert float(running.value()) == 0
    running.update(torch.tensor(2.0))
    assert float(running.value()) == pytest.approx(2.0)
    running.update(torch.tensor(torch.inf))
    running.update(torch.tensor(4.0))
    assert float(running.value()) == pytest.approx((0.9 * 2 + 4) / 1.9)
