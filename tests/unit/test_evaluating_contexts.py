"""The latents chosen for the page and their contexts, on small hand-made latents."""

import numpy as np
import pytest
from scipy.sparse import csr_array, random_array

from workers.evaluating.contexts import ContextWindow, HeldOutTokens, choose_latents, describe_latents


def _tokens(num_windows: int, context_tokens: int, **changes: object) -> HeldOutTokens:
    rows = num_windows * context_tokens
    values: dict[str, object] = {
        "strings": [f"t{row}" for row in range(rows)],
        "document_ids": np.zeros(rows, dtype=np.int32),
        "usable": np.ones(rows, dtype=np.bool_),
        "document_names": {0: "first", 1: "second"},
        "context_tokens": context_tokens,
    }
    return HeldOutTokens(**{**values, **changes})  # type: ignore[arg-type]


def _latents(shape: tuple[int, int], entries: dict[tuple[int, int], float]) -> csr_array:
    dense = np.zeros(shape, dtype=np.float32)
    for place, value in entries.items():
        dense[place] = value
    return csr_array(dense)


def test_top_tokens_come_from_distinct_windows_strongest_first() -> None:
    latents = _latents((24, 1), {(1, 0): 5.0, (2, 0): 4.0, (9, 0): 3.0, (17, 0): 4.5})
    (described,) = describe_latents(latents, _tokens(3, 8), [1], num_latents=3, contexts_per_latent=2)
    assert [context["tokens"][context["peak"]] for context in described["contexts"]] == ["t1", "t17"]
    assert described["max_activation"] == 5.0
    assert described["firing_rate"] == 4 / 24
    assert described["contexts"][0]["values"][:3] == [0.0, 5.0, 4.0]


def test_context_is_as_wide_as_asked_inside_a_window() -> None:
    latents = _latents((32, 1), {(8, 0): 1.0})
    window = ContextWindow(left_tokens=3, right_tokens=2)
    (described,) = describe_latents(latents, _tokens(2, 16), [1], 1, 1, window)
    assert described["contexts"][0]["tokens"] == ["t5", "t6", "t7", "t8", "t9", "t10"]
    assert described["contexts"][0]["peak"] == 3


@pytest.mark.parametrize(("peak", "shown"), [(8, ["t8", "t9"]), (7, ["t5", "t6", "t7"])])
def test_context_never_crosses_a_window(peak: int, shown: list[str]) -> None:
    window = ContextWindow(left_tokens=2, right_tokens=1)
    (described,) = describe_latents(_latents((16, 1), {(peak, 0): 1.0}), _tokens(2, 8), [1], 1, 1, window)
    assert described["contexts"][0]["tokens"] == shown


def test_context_stops_at_another_document_and_at_unusable_tokens() -> None:
    documents = np.array([0, 0, 0, 1, 1, 1, 1, 1], dtype=np.int32)
    usable = np.array([True] * 6 + [False] * 2)
    tokens = _tokens(1, 8, document_ids=documents, usable=usable)
    (described,) = describe_latents(_latents((8, 1), {(4, 0): 2.0}), tokens, [1], 1, 1)
    (context,) = described["contexts"]
    assert (context["document"], context["tokens"], context["peak"]) == ("second", ["t3", "t4", "t5"], 1)
    assert described["firing_rate"] == 1 / 6


def test_every_prefix_group_is_represented_and_dead_latents_are_not() -> None:
    num_fired = np.arange(64)
    num_fired[[3, 40]] = 0
    chosen = choose_latents(num_fired, [8, 16, 64], num_latents=9)
    assert [sum(low <= latent < high for latent in chosen) for low, high in ((0, 8), (8, 16), (16, 64))] == [3, 3, 3]
    assert not {0, 3, 40} & set(chosen)


def test_latents_of_a_group_span_its_firing_rates() -> None:
    num_fired = np.random.default_rng(0).permutation(100) + 1
    rates = sorted(num_fired[choose_latents(num_fired, [100], num_latents=4)].tolist())
    assert rates == [13, 38, 63, 88]


def test_places_of_a_dead_group_go_to_the_others() -> None:
    num_fired = np.array([0, 0, 0, 0, 5, 4, 3, 2, 1, 1])
    assert choose_latents(num_fired, [4, 10], num_latents=6) == [4, 5, 6, 7, 8, 9]
    assert choose_latents(num_fired, [4, 10], num_latents=100) == [4, 5, 6, 7, 8, 9]


def test_the_prefix_group_is_the_smallest_width_that_holds_the_latent() -> None:
    latents = _latents((8, 4), {(0, 1): 1.0, (1, 2): 1.0, (2, 3): 1.0})
    described = describe_latents(latents, _tokens(1, 8), [2, 4], 4, 1)
    assert {entry["latent"]: entry["prefix_group"] for entry in described} == {1: 2, 2: 4, 3: 4}


def test_shown_values_equal_the_dense_matrix() -> None:
    latents = csr_array(random_array((64, 12), density=0.3, rng=np.random.default_rng(1), format="csr"))
    dense = latents.toarray()
    for entry in describe_latents(latents, _tokens(8, 8), [4, 12], 12, 3):
        column = dense[:, entry["latent"]]
        assert entry["firing_rate"] == np.count_nonzero(column) / 64
        best_per_window = sorted(column.reshape(8, 8).max(axis=1), reverse=True)[:3]
        peaks = [context["values"][context["peak"]] for context in entry["contexts"]]
        np.testing.assert_allclose(peaks, best_per_window, rtol=1e-3)
        for context in entry["contexts"]:
            rows = [int(token[1:]) for token in context["tokens"]]
            np.testing.assert_allclose(context["values"], column[rows], rtol=1e-3)


def test_mismatched_rows_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="every row of whole windows"):
        describe_latents(_latents((9, 2), {}), _tokens(1, 8), [2], 1, 1)
    with pytest.raises(ValueError, match="last nested width"):
        describe_latents(_latents((8, 2), {}), _tokens(1, 8), [1], 1, 1)
