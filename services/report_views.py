"""What the page's tables show, row by row: plain values for the template, no HTML. Called by services/report.py."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    shaded: bool = False
    """Whether the page shades a cell by its value."""

    def shade(self, value: float | None) -> float | None:
        """How strong the shade is, 0 to 1: none at an accuracy of 0.5, full at 1."""
        return None if value is None or not self.shaded else round(min(max(2 * value - 1, 0.0), 1.0), 2)


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

    @property
    def firsts(self) -> set[int]:
        """Positions of the columns that begin a group."""
        return set(accumulate((len(group.columns) for group in self.groups[:-1]), initial=0))


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
    return f"{float(f'{100 * value:.2g}'):g}%"


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON for people to read."""
    return json.dumps(value, indent=indent, ensure_ascii=False)


def visible(token: str) -> str:
    """A token with its line breaks and tabs shown; spaces are kept by the page's style."""
    return token.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")


FILTERS = {
    "duration": duration,
    "json": as_json,
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


def full_width_fvu(row: Json, d_latent: int) -> float | None:
    """FVU with every latent in use, of an SAE's row or of one of its earlier checkpoints."""
    value: float | None = (row["fvu"] or {}).get(str(d_latent))
    return value


def numbers_of(report: Json, key: str) -> list[str]:
    """The k of `sparse_probing` or the n of `tpp` that any SAE was scored at, ascending."""
    return sorted({number for row in report["saes"] for number in row[key] or {}}, key=int)


def headline(report: Json) -> Table:
    """One row per SAE, then the baselines of probing and erasure."""
    ks, ns = numbers_of(report, "sparse_probing"), numbers_of(report, "tpp")
    rows = [
        Row(
            row["name"],
            (row["d_latent"], *_scores(row, row["d_latent"], ks, ns)),
            VARIANTS.get(row["variant"], row["variant"]),
        )
        for row in report["saes"]
    ]
    return Table(_score_groups("latents", ks, ns), (*rows, *_baseline_rows(report, ks, ns)))


def trajectory_table(report: Json) -> Table | None:
    """The same scores of earlier checkpoints; None where there are none."""
    ks, ns = numbers_of(report, "sparse_probing"), numbers_of(report, "tpp")
    rows = [
        Row(row["name"], (milestone["rows_trained"], *_scores(milestone, row["d_latent"], ks, ns)))
        for row in report["saes"]
        for milestone in row["trajectory"]
    ]
    return Table(_score_groups("rows trained", ks, ns), tuple(rows)) if rows else None


def _score_groups(first: str, ks: list[str], ns: list[str]) -> tuple[Group, ...]:
    return (
        Group("", (Column(first, whole), Column("L0", fixed(1)), Column("dead", percent))),
        Group("recovered", (Column("CE", percent), Column("CE (mean)", percent), Column("KL", percent))),
        Group("FVU", (Column("full width", fixed(3)),)),
        *([Group("sparse probing, accuracy", tuple(Column(f"k = {k}", fixed(3)) for k in ks))] if ks else []),
        *([Group("erasure, TPP", tuple(Column(f"n = {n}", fixed(3)) for n in ns))] if ns else []),
    )


def _scores(row: Json, d_latent: int, ks: list[str], ns: list[str]) -> tuple[float | None, ...]:
    keys = ("l0", "dead_share", "ce_recovered", "ce_recovered_mean_ablation", "kl_recovered")
    probing, tpp = _cells(row["sparse_probing"], ks), _cells(row["tpp"], ns)
    return (*(row[key] for key in keys), full_width_fvu(row, d_latent), *probing, *tpp)


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
    probed = {
        name: m.metrics["probing"]["concepts"] for name, m in newest.items() if "concepts" in m.metrics["probing"]
    }
    erased = {
        name: m.metrics["erasure"]["concepts"] for name, m in newest.items() if "concepts" in m.metrics["erasure"]
    }
    if not probed:
        return None
    lines, all_ks = sae_lines(report), numbers_of(report, "sparse_probing")
    ks, ns = list(dict.fromkeys((all_ks[0], all_ks[-1]))), numbers_of(report, "tpp")[-1:]
    own = tuple(Column(name, fixed(3), lines[name].color, shaded=True) for name in probed)
    channels, dense = Column("channels", fixed(3), shaded=True), Column("probe", fixed(3), shaded=True)
    groups = (
        Group("test", (Column("examples", whole),)),
        Group("dense", (dense,)),
        *(Group(f"probe of k = {k}", (*own, channels)) for k in ks),
        *(Group(f"TPP at n = {n}", tuple(Column(name, fixed(3), lines[name].color) for name in erased)) for n in ns),
    )
    concepts = _first_mentions(probed)

    def cells(concept: str) -> tuple[Any, ...]:
        content = concepts[concept]
        values = [content["num_test"], content["dense"]]
        for k in ks:
            values += [found.get(concept, {}).get("sparse", {}).get(k) for found in probed.values()]
            values.append(content["residual"].get(k))
        return (*values, *(found.get(concept, {}).get(n) for n in ns for found in erased.values()))

    parents = {name: content["parent"] for name, content in concepts.items()}
    rows = (Row(name, cells(name) if name in concepts else (), depth=depth) for name, depth in outline(parents))
    return Table(groups, tuple(rows))


def _first_mentions(probed: Mapping[str, Json]) -> Json:
    """Concept -> what the first SAE that has it says; sample sizes, dense and channel probes are the same for all."""
    concepts: Json = {}
    for found in probed.values():
        for name, content in found.items():
            concepts.setdefault(name, content)
    return concepts


def outline(parents: Mapping[str, str | None]) -> list[tuple[str, int]]:
    """Concept -> parent as an indented list: (name, depth), parents first, a parent that is no concept included."""
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


def sample_groups(report: Json) -> list[tuple[list[str], Json]]:
    """SAEs whose scores stand on the same samples, together; those without scores are left out."""
    groups: list[tuple[list[str], Json]] = []
    for name, samples in report["samples"].items():
        if samples["firing"] is None:
            continue
        same = next((names for names, content in groups if content == samples), None)
        if same is None:
            groups.append(([name], samples))
        else:
            same.append(name)
    return groups


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
