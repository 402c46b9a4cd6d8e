"""The headline table in the terminal."""

import io

import pytest
from rich.console import Console

from services.report import build_report
from services.tables import print_report
from tests.unit.report_example import example


def _printed(**changed_metrics: object) -> str:
    stream = io.StringIO()
    print_report(build_report(**example(**changed_metrics).arguments()), Console(file=stream))
    return stream.getvalue()


def test_the_table_fits_100_columns_and_is_plain_text_when_piped() -> None:
    text = _printed()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for name in (
        "matryoshka ",
        "matryoshka-random ",
        "batch-topk ",
        "residual channels",
        "random directions",
        "dense probe",
    ):
        assert any(line.startswith(name) for line in text.splitlines()), name


def test_a_row_holds_the_headline_numbers() -> None:
    (line,) = (line for line in _printed(l0=31.25).splitlines() if line.startswith("batch-topk"))
    assert line.split()[1:4] == ["BatchTopK", "4,096", "31.2"]
    assert [f"{number:.2f}" in line for number in (0.66, 0.05)] == [False, True]


@pytest.mark.parametrize("section", ["fidelity", "probing", "erasure"])
def test_what_was_omitted_is_said(section: str) -> None:
    text = _printed(**{section: {"omitted": "Not for [this] model."}})
    assert "Omitted: Not for [this] model." in text
    assert "–" in text or section != "fidelity"
