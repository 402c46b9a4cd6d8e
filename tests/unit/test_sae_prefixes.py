"""Prefix lengths and weights, and the laws they are drawn from."""

import pytest
import torch

from workers.config import SAEConfig
from workers.sae.prefixes import length_law, prefixes_of_step


def random_config(d_latent: int, num_prefixes: int, law: str = "sqrt", seed: int = 0) -> SAEConfig:
    nesting = {"nesting": "random", "num_prefixes": num_prefixes, "prefix_law": law}
    return SAEConfig.model_validate({"name": "a", "hook": "h", "d_latent": d_latent, "k": 1, "seed": seed, **nesting})


def test_sqrt_law_has_the_known_values() -> None:
    law = length_law(20, "sqrt")
    assert law[:4].tolist() == pytest.approx([0.229, 0.095, 0.073, 0.061], abs=5e-4)
    assert float(law.sum()) == pytest.approx(1)


def test_pareto_law_falls_as_the_power_of_minus_three_halves() -> None:
    law = length_law(100, "pareto")
    assert float(law[0] / law[15]) == pytest.approx(16**1.5)
    assert len(law) == 99


def test_no_nesting_is_the_full_width_and_fixed_nesting_weighs_widths_equally() -> None:
    plain = SAEConfig(name="a", hook="h", d_latent=32, k=1)
    assert prefixes_of_step(plain, 5).lengths == (32,)
    assert prefixes_of_step(plain, 5).weights == (1.0,)
    fixed = SAEConfig(name="a", hook="h", d_latent=32, k=1, nesting="fixed", widths=(4, 8, 16, 32))
    assert prefixes_of_step(fixed, 0).lengths == (4, 8, 16, 32)
    assert prefixes_of_step(fixed, 9).weights == (0.25,) * 4


@pytest.mark.parametrize("law", ["sqrt", "pareto"])
def test_random_lengths_are_distinct_increasing_and_end_in_the_full_width(law: str) -> None:
    config = random_config(20, 6, law)
    for step in range(50):
        prefixes = prefixes_of_step(config, step)
        assert len(set(prefixes.lengths)) == 6
        assert list(prefixes.lengths) == sorted(prefixes.lengths)
        assert prefixes.lengths[0] >= 1
        assert prefixes.lengths[-1] == 20
        assert sum(prefixes.weights) == pytest.approx(1)


def test_as_many_prefixes_as_latents_are_all_of_them() -> None:
    assert prefixes_of_step(random_config(7, 7), 3).lengths == tuple(range(1, 8))


def test_random_lengths_follow_the_law() -> None:
    config = random_config(20, 2)
    drawn = torch.tensor([prefixes_of_step(config, step).lengths[0] for step in range(4000)])
    shares = torch.bincount(drawn, minlength=20)[1:] / len(drawn)
    torch.testing.assert_close(shares, length_law(20, "sqrt").float(), atol=0.025, rtol=0)


def test_random_lengths_depend_on_seed_and_step_alone() -> None:
    config = random_config(1000, 5)
    torch.manual_seed(0)
    first = prefixes_of_step(config, 7)
    torch.manual_seed(1)
    assert prefixes_of_step(config, 7) == first
    assert prefixes_of_step(config, 8) != first
    assert prefixes_of_step(random_config(1000, 5, seed=1), 7) != first
