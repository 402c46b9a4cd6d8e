"""The page without a browser: text is escaped, nothing is fetched, and omitted scores leave no hole."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from services import report_views as views
from services.report import build_report, render_page
from tests.unit.report_example import HOSTILE, Example, example


class _Page(HTMLParser):
    """Scripts, their attributes, and the text outside them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.policy = ""
        self.text = ""
        self._within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value for key, value in attrs if key in {"src", "href"} and value]
        self.ids += [value for key, value in attrs if key == "id" and value]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag == "script":
            self.scripts.append((found, ""))
        self._within = tag

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            attributes, content = self.scripts[-1]
            self.scripts[-1] = (attributes, content + data)
        elif self._within != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._within = ""


def _page(run: Example) -> _Page:
    report = build_report(**run.arguments())
    return _Page(render_page(report, run.reports, run.histories))


@pytest.fixture(scope="module")
def page() -> _Page:
    return _page(example())


def test_hostile_tokens_and_names_are_text(page: _Page) -> None:
    assert HOSTILE in page.text
    assert "email/<policy>.py" in page.text
    assert len(page.scripts) == 3


def test_hostile_names_in_figures_stay_inside_their_json() -> None:
    run = example()
    report = build_report(**run.arguments())
    renamed = json.loads(json.dumps(report).replace('"batch-topk"', json.dumps(HOSTILE)))
    parsed = _Page(render_page(renamed, run.reports, run.histories | {HOSTILE: run.histories["batch-topk"]}))
    assert len(parsed.scripts) == 3
    names = [trace["name"] for plot in json.loads(parsed.scripts[0][1]).values() for trace in plot["data"]]
    assert HOSTILE in names


def test_the_policy_allows_exactly_the_pages_own_scripts(page: _Page) -> None:
    runnable = [content for attributes, content in page.scripts if attributes.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in runnable]
    assert len(hashes) == 2
    assert re.findall(r"'sha256-([^']+)'", page.policy) == hashes
    assert "default-src 'none'" in page.policy


def test_nothing_is_fetched(page: _Page) -> None:
    assert [address for address in page.addresses if not address.startswith("#")] == []


def test_every_figure_has_a_place_on_the_page(page: _Page) -> None:
    plots = json.loads(page.scripts[0][1])
    assert {"fvu", "probing", "erasure", "firing", "training-loss"} <= set(plots)
    assert set(plots) <= set(page.ids)
    assert all(plot["layout"][axis]["title"]["text"] for plot in plots.values() for axis in ("xaxis", "yaxis"))


def test_an_sae_has_one_colour_everywhere(page: _Page) -> None:
    colors: dict[str, set[str]] = {}
    for plot in json.loads(page.scripts[0][1]).values():
        for trace in plot["data"]:
            colors.setdefault(trace["name"], set()).add(trace["line"]["color"])
    own = [colors[name] for name in ("matryoshka", "matryoshka-random", "batch-topk")]
    assert all(len(found) == 1 for found in own)
    assert len(set.union(*own)) == 3


def test_omitted_scores_are_explained_and_their_figures_left_out() -> None:
    omitted = {"fidelity": "An encoder.", "probing": "No labels.", "erasure": "No probes."}
    page = _page(example(**{key: {"omitted": sentence} for key, sentence in omitted.items()}, latents=[]))
    assert all(f"Omitted: {sentence}" in page.text for sentence in omitted.values())
    assert {"probing", "erasure", "concepts", "latents"}.isdisjoint(page.ids)
    assert "fvu" in page.ids


def test_a_run_without_any_score_or_curve_still_has_a_page() -> None:
    run = example()
    run.reports.clear()
    run.histories.clear()
    page = _page(run)
    assert json.loads(page.scripts[0][1]) == {}
    assert "No checkpoint has been evaluated yet." in page.text


def test_baselines_that_differ_are_drawn_in_the_colour_of_their_sae() -> None:
    run = example()
    run.reports[-1].metrics["probing"]["mean"]["residual"]["1"] = 0.5
    plot = json.loads(_page(run).scripts[0][1])["probing"]
    named = [trace["name"] for trace in plot["data"] if trace["name"].startswith("residual")]
    assert named == [f"residual stream channels, {name}" for name in ("matryoshka", "matryoshka-random", "batch-topk")]


def test_concepts_are_listed_under_their_parents_in_order() -> None:
    parents = {"b": None, "b2": "b", "a1": "a", "b1": "b", "b21": "b2"}
    assert views.outline(parents) == [("b", 0), ("b2", 1), ("b21", 2), ("b1", 1), ("a", 0), ("a1", 1)]


def test_concept_rows_hold_the_numbers_of_their_own_sae() -> None:
    run = example()
    report = build_report(**run.arguments())
    newest = views.newest_reports(report, run.reports)
    table = views.concept_table(report, newest)
    assert table is not None
    row = next(row for row in table.rows if row.name == "docstring")
    assert row.depth == 1
    assert len(row.cells) == len(table.columns)
    assert row.cells[2:5] == tuple(
        m.metrics["probing"]["concepts"]["docstring"]["sparse"]["1"] for m in newest.values()
    )
    assert row.cells[-3:] == tuple(m.metrics["erasure"]["concepts"]["docstring"]["20"] for m in newest.values())


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (views.fixed(2)(-0.125), "−0.12"),
        (views.fixed(1)(None), "–"),
        (views.percent(0.9512), "95.1%"),
        (views.whole(2_498_560), "2,498,560"),
        (views.rate(0.000434), "0.043%"),
        (views.duration(59.94), "59.9 s"),
        (views.duration(185.2), "3 min 05 s"),
        (views.duration(7_640), "2 h 07 min"),
        (views.visible("\tif x:\r\n"), "⇥if x:↵"),
    ],
)
def test_numbers_and_tokens_read_well(shown: str, expected: str) -> None:
    assert shown == expected
