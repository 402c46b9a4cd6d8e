"""Firing counts of latents: hand-computed cases."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from workers.scores.sparsity import LOG10_RATE_EDGES, firing

LATENTS = np.array([[1.0, 0.0, 2.0, 0.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], np.float32)


def test_l0_rates_and_dead_share_of_a_small_case():
    found = firing(csr_array(LATENTS))
    assert found.num_rows == 4
    assert found.rates.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert found.l0 == 1.5
    assert found.dead_share == 0.5


def test_a_stored_zero_is_no_firing_and_a_negative_value_is_one():
    latents = csr_array((np.array([0.0, -1.0], np.float32), (np.array([0, 1]), np.array([0, 1]))), shape=(2, 2))
    assert firing(latents).rates.tolist() == [0.0, 0.5]


def test_the_histogram_counts_live_latents_by_decade():
    rates = np.array([1.0, 0.5, 0.02, 0.0])
    latents = csr_array((np.arange(100)[:, None] < 100 * rates).astype(np.float32))
    found = firing(latents).histogram()
    assert found["num_rows"] == 100
    assert found["num_dead"] == 1
    assert len(found["counts"]) == len(found["bin_edges"]) - 1
    expected = [0] * (len(LOG10_RATE_EDGES) - 1)
    expected[-1] = 1  # log10 1 is the last edge
    expected[-2] = 1  # log10 0.5 = -0.30
    expected[-7] = 1  # log10 0.02 = -1.70
    assert found["counts"] == expected


def test_rates_below_the_first_edge_fall_into_the_first_bin():
    latents = csr_array((np.ones(1, np.float32), (np.array([0]), np.array([0]))), shape=(2_000_000, 1))
    assert firing(latents).histogram()["counts"][0] == 1


def test_no_rows_and_nan_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        firing(csr_array((0, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="NaN"):
        firing(csr_array(np.array([[np.nan]], np.float32)))
