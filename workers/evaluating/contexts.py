"""Which latents to show, and where each fires most: tokens in context with the activation of every token shown.

Numbers and strings in, JSON out; it reads no model, no dataset and draws no page (services/report.py does).
Called by the evaluation, once per checkpoint, on the latents of held-out windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array

Json = dict[str, Any]


@dataclass(frozen=True)
class HeldOutTokens:
    """Tokens behind the rows of a latents matrix [windows * context_tokens, d_latent], window by window."""

    strings: Sequence[str]
    """[rows]: text of each token, as people should read it."""
    document_ids: npt.NDArray[np.integer[Any]]
    """[rows]: keys of `document_names`."""
    usable: npt.NDArray[np.bool_]
    """[rows]: false for BOS, padding and special tokens, which are not shown."""
    document_names: dict[int, str]
    """Document id -> name."""
    context_tokens: int
    """Rows per window."""


@dataclass(frozen=True)
class ContextWindow:
    """How much to show around a top activating token."""

    left_tokens: int = 8
    right_tokens: int = 5


def describe_latents(
    latents: csr_array,
    tokens: HeldOutTokens,
    widths: Sequence[int],
    num_latents: int,
    contexts_per_latent: int,
    window: ContextWindow | None = None,
) -> list[Json]:
    """The chosen latents, by number, each with its top activating tokens in distinct windows, strongest first.

    `latents` is [rows, d_latent] with unusable rows zero; `widths` are the nested widths, the last one d_latent.
    Deterministic: ties go to the earlier row. `prefix_group` is the smallest nested width that holds the latent;
    `firing_rate` is a share of usable tokens. Raises ValueError where the rows do not match the tokens.
    """
    num_rows, d_latent = latents.shape
    if num_rows != len(tokens.strings) or num_rows % tokens.context_tokens:
        raise ValueError(
            f"latents have {num_rows} rows for {len(tokens.strings)} tokens in windows of {tokens.context_tokens}: "
            "pass every row of whole windows"
        )
    if not widths or widths[-1] != d_latent:
        raise ValueError(f"widths is {list(widths)}: the last nested width must be d_latent = {d_latent}")
    columns = latents.tocsc()
    columns.sort_indices()
    columns.eliminate_zeros()
    num_fired = np.diff(columns.indptr)
    num_usable = int(tokens.usable.sum())
    descriptions = []
    for latent in choose_latents(num_fired, widths, num_latents):
        rows, values = _column(columns, latent)
        peaks = _top_rows(rows, values, tokens.context_tokens, contexts_per_latent)
        activations = dict(zip(rows.tolist(), values.tolist(), strict=True))
        descriptions.append(
            {
                "latent": latent,
                "prefix_group": int(next(width for width in widths if latent < width)),
                "firing_rate": len(rows) / num_usable,
                "max_activation": _short(values.max()),
                "contexts": [_context(peak, activations, tokens, window or ContextWindow()) for peak in peaks],
            }
        )
    return descriptions


def choose_latents(num_fired: npt.NDArray[np.integer[Any]], widths: Sequence[int], num_latents: int) -> list[int]:
    """Latents to show, ascending: alive ones from every prefix group, at evenly spaced quantiles of its firing rates.

    `num_fired` [d_latent] counts the tokens on which each latent fires. Places are dealt to the groups in turn, so that
    a group with few living latents leaves its places to the others.
    """
    groups = []
    for start, stop in zip([0, *widths], widths, strict=False):
        alive = start + np.flatnonzero(num_fired[start:stop])
        groups.append(alive[np.argsort(num_fired[alive], kind="stable")])
    places = [0] * len(groups)
    wanted = min(num_latents, sum(len(group) for group in groups))
    while sum(places) < wanted:
        for index, group in enumerate(groups):
            if places[index] < len(group) and sum(places) < wanted:
                places[index] += 1
    chosen: list[int] = []
    for group, count in zip(groups, places, strict=True):
        quantiles = ((np.arange(count) + 0.5) * len(group) / max(count, 1)).astype(np.intp)
        chosen += group[quantiles].tolist()
    return sorted(chosen)


def _column(columns: csc_array, latent: int) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.floating[Any]]]:
    """Rows on which a latent fires, ascending, and its values there."""
    span = slice(columns.indptr[latent], columns.indptr[latent + 1])
    return columns.indices[span], columns.data[span]


def _top_rows(
    rows: npt.NDArray[np.integer[Any]], values: npt.NDArray[np.floating[Any]], context_tokens: int, count: int
) -> list[int]:
    """The `count` rows of largest value, at most one per window."""
    by_value = rows[np.argsort(-values, kind="stable")]
    _, first = np.unique(by_value // context_tokens, return_index=True)
    return [int(row) for row in by_value[np.sort(first)[:count]]]


def _context(peak: int, activations: dict[int, float], tokens: HeldOutTokens, window: ContextWindow) -> Json:
    """The tokens around `peak` that share its window and its document, up to the nearest unusable one."""

    def belongs(row: int) -> bool:
        same_window = row // tokens.context_tokens == peak // tokens.context_tokens
        return same_window and bool(tokens.usable[row]) and tokens.document_ids[row] == tokens.document_ids[peak]

    start = stop = peak
    while peak - start < window.left_tokens and start > 0 and belongs(start - 1):
        start -= 1
    while stop - peak < window.right_tokens and stop + 1 < len(tokens.strings) and belongs(stop + 1):
        stop += 1
    shown = range(start, stop + 1)
    return {
        "document": tokens.document_names[int(tokens.document_ids[peak])],
        "tokens": [tokens.strings[row] for row in shown],
        "values": [_short(activations.get(row, 0.0)) for row in shown],
        "peak": peak - start,
    }


def _short(value: float) -> float:
    """Four significant digits: enough for a page, and a fraction of the bytes."""
    return float(f"{value:.4g}")
