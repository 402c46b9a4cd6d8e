"""The figures of the report as plotly graphs, one colour per SAE everywhere, colour-blind safe.

Built from the report's JSON and the training curves; knows nothing of HTML. Called by services/report.py.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

Json = dict[str, Any]
Series = Mapping[str, float]
"""Score by whole number (prefix length, k or n) as JSON spells it."""

# Okabe and Ito's palette, without the yellow that white paper swallows and the black that dark screens do.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
_NEUTRAL = "#8a8a8a"
_DECADES = [10.0**exponent for exponent in range(-6, 5)]
_LOG_TICKS = {
    "tickvals": [digit * decade for decade in _DECADES for digit in (1, 2, 5)],
    "ticktext": [f"{digit * decade:g}" for decade in _DECADES for digit in (1, 2, 5)],
}


@dataclass(frozen=True)
class Line:
    """One entry of a figure's key, drawn by the page so that it never covers the data."""

    label: str
    color: str
    dash: str = "solid"
    symbol: str | None = None


@dataclass(frozen=True)
class Figure:
    """A figure with its words: what it shows, and what stands behind it."""

    name: str
    title: str
    caption: str
    key: tuple[Line, ...]
    plot: Json
    """Plotly's JSON: data and layout. The page, which knows light from dark, adds colours of paper, ink and grid."""


def sae_lines(report: Json) -> dict[str, Line]:
    """SAE name -> its colour and symbol, the same in every figure and table."""
    return {
        row["name"]: Line(row["name"], _PALETTE[i % len(_PALETTE)], symbol=_SYMBOLS[i % len(_SYMBOLS)])
        for i, row in enumerate(report["saes"])
    }


def training_figures(report: Json, histories: Mapping[str, Sequence[Json]]) -> list[Figure]:
    """Curves over rows trained on, from training batches; none for a run without histories."""
    curves = (
        (
            "loss",
            "Training loss",
            "loss",
            "log",
            "The objective that is minimised, averaged over prefixes where nested.",
        ),
        ("fvu", "FVU on training batches", "fraction of variance unexplained", "log", "At full width."),
        ("l0", "L0 on training batches", "active latents per token", "linear", "BatchTopK holds its mean at k."),
        ("dead_share", "Dead latents in training", "share of all latents", "linear", _dead_caption(report)),
    )
    return [
        _training_figure(report, histories, *curve)
        for curve in curves
        if any(curve[0] in point for points in histories.values() for point in points)
    ]


def score_figures(report: Json, firing: Mapping[str, Json]) -> list[Figure]:
    """FVU by prefix, sparse probing by k, erasure by n and firing rates; a figure that nothing fills is left out."""
    figures = (_fvu_figure(report), _probing_figure(report), _erasure_figure(report), _firing_figure(report, firing))
    return [figure for figure in figures if figure.key]


def _training_figure(
    report: Json, histories: Mapping[str, Sequence[Json]], key: str, title: str, unit: str, scale: str, caption: str
) -> Figure:
    lines = {name: line for name, line in sae_lines(report).items() if histories.get(name)}
    traces = [
        go.Scatter(
            x=[point["rows"] for point in histories[name]],
            y=[point.get(key) for point in histories[name]],
            name=name,
            mode="lines",
            line={"color": line.color, "width": 1.6},
        )
        for name, line in lines.items()
    ]
    y_axis = {"title": unit, "type": scale, **(_LOG_TICKS if scale == "log" else {"rangemode": "tozero"})}
    plot = _plot(traces, {"title": "rows trained on (tokens)", "tickformat": "~s"}, y_axis)
    return Figure(f"training-{key}", title, caption, _without_symbols(lines.values()), plot)


def _fvu_figure(report: Json) -> Figure:
    series = [(line, row["fvu"]) for row, line in _rows_with(report, "fvu")]
    traces = [_series_trace(line, values) for line, values in series]
    plot = _plot(
        traces,
        {"title": "latents used (prefix length)", "type": "log", **_ticks(values for _, values in series)},
        {"title": "fraction of variance unexplained", "rangemode": "tozero"},
    )
    caption = f"Reconstruction from the first latents alone; {_held_out(report)}. Lower is better."
    return Figure("fvu", "Reconstruction by prefix", caption, tuple(line for line, _ in series), plot)


def _probing_figure(report: Json) -> Figure:
    own = [(line, row["sparse_probing"]) for row, line in _rows_with(report, "sparse_probing")]
    baselines = (
        _baselines(report, "residual stream channels", "dash", lambda base: base["residual_stream"]["sparse_probing"])
        + _baselines(report, "random directions", "dot", lambda base: base["random_directions"]["sparse_probing"])
        + _baselines(report, "dense probe", "longdashdot", _dense_series)
    )
    plot = _plot(
        [_series_trace(line, values) for line, values in baselines + own],
        {"title": "latents read by the probe (k)", "type": "log", **_ticks(values for _, values in own)},
        {"title": "mean balanced accuracy"},
    )
    caption = (
        f"Logistic probes on the k most telling latents, mean of {_concepts(report, 'probing')}. Higher is better."
    )
    return Figure("probing", "Sparse probing", caption, tuple(line for line, _ in own + baselines), plot)


def _erasure_figure(report: Json) -> Figure:
    own = [(line, row["tpp"]) for row, line in _rows_with(report, "tpp")]
    channels = _baselines(report, "residual stream channels", "dash", lambda base: base["residual_stream"]["tpp"])
    plot = _plot(
        [_series_trace(line, values) for line, values in channels + own],
        {"title": "latents erased (n)", "type": "log", **_ticks(values for _, values in own)},
        {"title": "TPP (drop in accuracy)", "rangemode": "tozero"},
    )
    caption = (
        "Targeted probe perturbation: accuracy lost on the concept whose latents are erased, less the mean lost on the "
        f"others; {_concepts(report, 'erasure')}. Higher is better."
    )
    return Figure("erasure", "Concept erasure", caption, tuple(line for line, _ in own + channels), plot)


def _firing_figure(report: Json, firing: Mapping[str, Json]) -> Figure:
    lines = {name: line for name, line in sae_lines(report).items() if firing.get(name)}
    widths = {row["name"]: row["d_latent"] for row in report["saes"]}
    traces = []
    for name, line in lines.items():
        edges = [10.0**edge for edge in firing[name]["bin_edges"]]
        shares = [count / widths[name] for count in firing[name]["counts"]]
        traces.append(
            go.Scatter(
                x=[edges[0], *edges],
                y=[0, *shares, 0],
                name=name,
                mode="lines",
                line={"color": line.color, "width": 1.6, "shape": "hv"},
                hovertemplate="%{x:.2e}: %{y:.2%}",
            )
        )
    plot = _plot(
        traces,
        {
            "title": "firing rate (share of tokens)",
            "type": "log",
            "tickvals": _DECADES,
            "ticktext": [f"{100 * rate:g}%" for rate in _DECADES],
        },
        {"title": "share of all latents", "tickformat": ".0%", "rangemode": "tozero"},
    )
    num_rows = max((content["num_rows"] for content in firing.values() if content), default=0)
    caption = f"Over {num_rows:,} held-out tokens; latents that never fire there are off the scale."
    return Figure("firing", "How often latents fire", caption, _without_symbols(lines.values()), plot)


def _plot(traces: list[go.Scatter], x_axis: Json, y_axis: Json) -> Json:
    axis = {
        "automargin": True,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "showline": True,
        "title_standoff": 8,
    }
    figure = go.Figure(
        traces,
        {
            "template": go.layout.Template(),
            "showlegend": False,
            "margin": {"l": 8, "r": 24, "t": 8, "b": 8},
            "xaxis": {**axis, "showgrid": False, **x_axis},
            "yaxis": {**axis, "showline": False, "ticks": "", **y_axis},
            "hovermode": "closest",
        },
    )
    plot: Json = json.loads(figure.to_json())
    return plot


def _series_trace(line: Line, values: Series) -> go.Scatter:
    points = sorted((int(x), y) for x, y in values.items())
    marker = {"symbol": line.symbol, "size": 7, "color": line.color} if line.symbol else None
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=line.label,
        mode="lines+markers" if line.symbol else "lines",
        line={"color": line.color, "width": 1.8 if line.symbol else 1.4, "dash": line.dash},
        marker=marker,
        hovertemplate="%{x}: %{y:.3f}",
    )


def _rows_with(report: Json, key: str) -> list[tuple[Json, Line]]:
    lines = sae_lines(report)
    return [(row, lines[row["name"]]) for row in report["saes"] if row[key]]


def _baselines(report: Json, label: str, dash: str, pick: Callable[[Json], Series | None]) -> list[tuple[Line, Series]]:
    """A baseline that is the same for every SAE is drawn once and grey; else one line in each SAE's colour."""
    lines = sae_lines(report)
    found = {row["name"]: series for row in report["saes"] if (series := pick(row["baselines"]))}
    if len({json.dumps(series, sort_keys=True) for series in found.values()}) == 1:
        return [(Line(label, _NEUTRAL, dash), next(iter(found.values())))]
    return [(Line(f"{label}, {name}", lines[name].color, dash), series) for name, series in found.items()]


def _dense_series(baselines: Json) -> Series | None:
    """The dense probe reads everything, whatever k: a level line."""
    dense, ks = baselines["dense_probe"], baselines["residual_stream"]["sparse_probing"]
    return None if dense is None or not ks else dict.fromkeys(ks, dense)


def _ticks(series: Iterable[Series]) -> Json:
    values = sorted({int(x) for values in series for x in values})
    return {"tickvals": values, "ticktext": [f"{value:,}" for value in values]}


def _without_symbols(lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple(Line(line.label, line.color) for line in lines)


def _held_out(report: Json) -> str:
    tokens = [samples["fidelity"]["num_tokens"] for samples in report["samples"].values() if samples["fidelity"]]
    return f"{max(tokens, default=0):,} held-out tokens"


def _concepts(report: Json, section: str) -> str:
    counts = [samples[section]["num_concepts"] for samples in report["samples"].values() if samples[section]]
    return f"{max(counts, default=0)} concepts"


def _dead_caption(report: Json) -> str:
    rows = report["config"].get("train", {}).get("dead_after_rows")
    return (
        f"Latents that fired for none of the last {rows:,} rows." if rows else "Latents that have not fired for long."
    )
