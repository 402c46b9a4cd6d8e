"""What the page's tables show, row by row: plain values for the template, no HTML. Called by services/report.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.report_figures import sae_lines
from storage.records import Json, MetricsReport

VARIANTS = {
    "batch_topk": "BatchTopK",
    "matryoshka_batch_topk": "Matryoshka",
    "matryoshka_batch_topk_random_prefixes": "Matryoshka, random prefixes",
}
_MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column of numbers: its heading, and how to print a cell."""

    label: str
    format: Callable[[Any], str]
    color: str | None = None
    """Of the SAE whose numbers these are."""


@dataclass(frozen=True)
class Group:
    """Columns under one heading."""

    label: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Row:
    """A line of a table; `cells` run through the columns of all groups. A row without cells is a heading."""

    name: str
    cells: tuple[Any, ...]
    note: str = ""
    depth: int = 0
    baseline: bool = False


@dataclass(frozen=True)
class Table:
    """Groups of columns and the rows under them."""

    groups: tuple[Group, ...]
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of all groups, in order."""
        return tuple(column for group in self.groups for column in group.columns)


def fixed(digits: int) -> Callable[[float | None], str]:
    """A formatter with so many decimals, a true minus sign, and a dash for a missing value."""
    return lambda value: _MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return _MISSING if value is None else f"{value:.1%}"


def whole(value: float | None) -> str:
    """A whole number with separators."""
    return _MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate(value: float) -> str:
    """A firing rate as a percentage with two significant digits."""
    return f"{float(f'{100 * value:.2g}'):g} %"


def visible(token: str) -> str:
    """A token with its line breaks and tabs shown; spaces are kept by the page's style."""
    return token.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")


FILTERS = {
    "duration": duration,
    "percent": percent,
    "rate": rate,
    "variant": lambda name: VARIANTS.get(name, name),
    "visible": visible,
    "whole": whole,
}


def newest_reports(report: Json, reports: Sequence[MetricsReport]) -> dict[str, MetricsReport]:
    """SAE name -> the metrics that the report's row shows; nothing for an SAE without any."""
    steps = {row["name"]: row["step"] for row in report["saes"]}
    found = {metrics.name: metrics for metrics in reports if steps.get(metrics.name) == metrics.step}
    return {name: found[name] for name in steps if name in found}


def full_width_fvu(row: Json) -> float | None:
    """FVU with every latent in use."""
    value: float | None = (row["fvu"] or {}).get(str(row["d_latent"]))
    return value


def numbers_of(report: Json, key: str) -> list[str]:
    """The k of `sparse_probing` or the n of `tpp` that any SAE was scored at, ascending."""
    return sorted({number for row in report["saes"] for number in row[key] or {}}, key=int)


def headline(report: Json) -> Table:
    """One row per SAE, then the baselines of probing and erasure."""
    ks, ns = numbers_of(report, "sparse_probing"), numbers_of(report, "tpp")
    groups = (
        Group("", (Column("latents", whole), Column("L0", fixed(1)), Column("dead", percent))),
        Group("recovered", (Column("CE", percent), Column("CE, mean abl.", percent), Column("KL", percent))),
        Group("FVU", (Column("full width", fixed(3)),)),
        *([Group("sparse probing, accuracy", tuple(Column(f"k = {k}", fixed(3)) for k in ks))] if ks else []),
        *([Group("erasure, TPP", tuple(Column(f"n = {n}", fixed(3)) for n in ns))] if ns else []),
    )
    fidelity = ("ce_recovered", "ce_recovered_mean_ablation", "kl_recovered")
    rows = [
        Row(
            row["name"],
            (row["d_latent"], row["l0"], row["dead_share"], *(row[key] for key in fidelity), full_width_fvu(row))
            + _cells(row["sparse_probing"], ks)
            + _cells(row["tpp"], ns),
            VARIANTS.get(row["variant"], row["variant"]),
        )
        for row in report["saes"]
    ]
    return Table(groups, (*rows, *_baseline_rows(report, ks, ns)))


def _baseline_rows(report: Json, ks: list[str], ns: list[str]) -> list[Row]:
    """Baselines of every hook that an SAE reads; hooks are named where there are several."""
    first = {row["hook"]: row["baselines"] for row in reversed(report["saes"]) if row["sparse_probing"]}
    rows = []
    for hook, base in reversed(first.items()):
        residual, note = base["residual_stream"], hook if len(first) > 1 else ""
        cells = {
            "Residual stream channels": _cells(residual["sparse_probing"], ks) + _cells(residual["tpp"], ns),
            "Random directions": _cells(base["random_directions"]["sparse_probing"], ks) + _cells(None, ns),
            "Dense probe": (base["dense_probe"],) * len(ks) + _cells(None, ns),
        }
        rows += [Row(name, (None,) * 7 + values, note, baseline=True) for name, values in cells.items()]
    return rows


def concept_table(report: Json, newest: Mapping[str, MetricsReport]) -> Table | None:
    """Accuracy and erasure concept by concept, children under their parents; None where nothing was probed."""
    probed = {name: m.metrics["probing"] for name, m in newest.items() if "omitted" not in m.metrics["probing"]}
    if not probed:
        return None
    lines = sae_lines(report)
    ks, ns = numbers_of(report, "sparse_probing"), numbers_of(report, "tpp")[-1:]
    erased = {name: newest[name].metrics["erasure"] for name in probed if "omitted" not in newest[name].metrics["erasure"]}
    own = tuple(Column(name, fixed(3), lines[name].color) for name in probed)
    groups = [
        Group("test examples", (Column("number", whole),)),
        Group("dense", (Column("probe", fixed(3)),)),
        *(Group(f"probe of k = {k}", (*own, Column("channels", fixed(3)))) for k in dict.fromkeys((ks[0], ks[-1]))),
        *(Group(f"TPP at n = {n}", tuple(Column(name, fixed(3), lines[name].color) for name in erased)) for n in ns),
    ]
    concepts = {name: content for probing in probed.values() for name, content in reversed(probing["concepts"].items())}
    concepts = dict(reversed(concepts.items()))

    def cells(concept: str) -> tuple[Any, ...]:
        any_sae = concepts[concept]
        values: list[Any] = [any_sae["num_test"], any_sae["dense"]]
        for k in dict.fromkeys((ks[0], ks[-1])):
            values += [probing["concepts"].get(concept, {}).get("sparse", {}).get(k) for probing in probed.values()]
            values.append(any_sae["residual"].get(k))
        values += [erasure["concepts"].get(concept, {}).get(n) for n in ns for erasure in erased.values()]
        return tuple(values)

    parents = {name: content["parent"] for name, content in concepts.items()}
    rows = [Row(name, cells(name) if name in concepts else (), depth=depth) for name, depth in outline(parents)]
    return Table(tuple(groups), tuple(rows))


def outline(parents: Mapping[str, str | None]) -> list[tuple[str, int]]:
    """Concept -> parent as an indented list: (name, depth), parents before children, a parent that is no concept included."""
    children: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    unlisted = [parent for parent in children if parent is not None and parent not in parents]
    order: list[tuple[str, int]] = []
    ahead = [(name, 0) for name in reversed([*children.get(None, []), *unlisted])]
    while ahead:
        name, depth = ahead.pop()
        order.append((name, depth))
        ahead += [(child, depth + 1) for child in reversed(children.get(name, []))]
    return order


def left_out(newest: Mapping[str, MetricsReport]) -> dict[str, str]:
    """Concept -> why it was not probed."""
    return {
        name: reason
        for metrics in newest.values()
        for name, reason in metrics.metrics["probing"].get("left_out", {}).items()
    }


def omitted_sentences(report: Json) -> list[str]:
    """Each reason for an omitted score once, in the order in which the SAEs give them."""
    return list(dict.fromkeys(sentence for row in report["saes"] for sentence in row["omitted"].values()))


def erasure_warnings(newest: Mapping[str, MetricsReport]) -> list[str]:
    """Each warning of the erasure scores once."""
    found = (metrics.metrics["erasure"].get("warning") for metrics in newest.values())
    return list(dict.fromkeys(warning for warning in found if warning))


def _cells(scores: Mapping[str, float] | None, numbers: Sequence[str]) -> tuple[float | None, ...]:
    return tuple((scores or {}).get(number) for number in numbers)
