"""The exporter against real HTTP on loopback."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from services.exporter import Exporter
from workers import telemetry
from workers.telemetry import METRICS, Counter, Gauge, Histogram, Snapshot, Telemetry

SILENT_SECONDS = 60.0


class Clock:
    """Stands still until told otherwise."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def exporter(clock: Clock) -> Iterator[Exporter]:
    exporter = Exporter("127.0.0.1", 0, run_id="tiny-0", silent_seconds=SILENT_SECONDS, clock=clock)
    yield exporter
    exporter.close()


def get(exporter: Exporter, path: str, accept: str = "*/*") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{exporter.port}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def series(exporter: Exporter) -> dict[tuple[str, str], float]:
    """Value by sample name and worker."""
    _, _, text = get(exporter, "/metrics")
    return {
        (sample.name, sample.labels["worker"]): sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.labels.get("le", "+Inf") == "+Inf"
    }


def health(exporter: Exporter) -> tuple[int, dict[str, object]]:
    status, _, text = get(exporter, "/health")
    return status, json.loads(text)


def trained(rows: int, loss: float = 1.0, step_seconds: float = 0.5) -> Snapshot:
    counted = Telemetry()
    counted.count(telemetry.TRAINED_ROWS_TOTAL, rows, sae="small")
    counted.set(telemetry.TRAIN_LOSS, loss, sae="small")
    counted.observe(telemetry.TRAIN_STEP_SECONDS, step_seconds)
    return counted.snapshot()


ROWS, LOSS, UP = "dollhouse_trained_rows_total", "dollhouse_train_loss", "dollhouse_up"
STEPS, STEPS_SUM, STEPS_BUCKET = (f"dollhouse_train_step_seconds_{end}" for end in ("count", "sum", "bucket"))


def test_answers_before_any_worker_exists(exporter: Exporter) -> None:
    assert get(exporter, "/metrics") == (200, "text/plain; version=0.0.4; charset=utf-8", "")
    assert health(exporter) == (200, {"status": "ok", "run_id": "tiny-0", "stage": "starting", "workers": {}})


def test_workers_are_told_apart_by_label_and_only_their_latest_report_counts(exporter: Exporter) -> None:
    exporter.update("trainer-0", trained(100))
    exporter.update("trainer-0", trained(300))
    exporter.update("trainer-1", trained(50))
    values = series(exporter)
    assert (values[ROWS, "trainer-0"], values[ROWS, "trainer-1"]) == (300, 50)
    assert (values[UP, "trainer-0"], values[UP, "trainer-1"]) == (1, 1)


def test_a_replacement_continues_totals_and_starts_without_gauges(exporter: Exporter) -> None:
    exporter.update("trainer-0", trained(300, step_seconds=0.5))
    exporter.replaced("trainer-0")
    values = series(exporter)
    assert (values[ROWS, "trainer-0"], values[STEPS, "trainer-0"], values[UP, "trainer-0"]) == (300, 1, 1)
    assert (LOSS, "trainer-0") not in values
    exporter.update("trainer-0", trained(20, loss=7.0, step_seconds=0.25))
    exporter.replaced("trainer-0")
    exporter.update("trainer-0", trained(3, loss=5.0, step_seconds=0.125))
    values = series(exporter)
    assert (values[ROWS, "trainer-0"], values[LOSS, "trainer-0"]) == (323, 5.0)
    assert (values[STEPS, "trainer-0"], values[STEPS_BUCKET, "trainer-0"], values[STEPS_SUM, "trainer-0"]) == (
        3,
        3,
        0.875,
    )


def test_a_dropped_worker_loses_its_gauges_at_once_and_keeps_its_totals(exporter: Exporter) -> None:
    exporter.update("trainer-0", trained(300))
    exporter.drop("trainer-0")
    exporter.update("trainer-0", trained(301))  # sent before its death, read after: already out of date
    values = series(exporter)
    assert (LOSS, "trainer-0") not in values
    assert (values[ROWS, "trainer-0"], values[UP, "trainer-0"]) == (300, 0)


def test_dropping_twice_counts_once(exporter: Exporter) -> None:
    exporter.update("trainer-0", trained(300))
    exporter.drop("trainer-0")
    exporter.replaced("trainer-0")
    exporter.update("trainer-0", trained(1))
    assert series(exporter)[ROWS, "trainer-0"] == 301


def test_health_is_503_only_while_a_working_slot_is_silent(exporter: Exporter, clock: Clock) -> None:
    exporter.stage = "train"
    exporter.begin("trainer-0")
    exporter.begin("evaluator-0")
    exporter.rest("evaluator-0")
    assert health(exporter)[0] == 200
    clock.seconds += SILENT_SECONDS + 1
    status, body = health(exporter)
    assert (status, body["status"], body["stage"]) == (503, "silent", "train")
    exporter.update("trainer-0", trained(1))
    status, body = health(exporter)
    assert status == 200
    assert body["workers"] == {
        "trainer-0": {"state": "working", "silent_seconds": 0.0},
        "evaluator-0": {"state": "resting", "silent_seconds": SILENT_SECONDS + 1},
    }


@pytest.mark.parametrize(
    ("act", "status"), [("rest", 200), ("drop", 200), ("begin", 200), ("replaced", 200), (None, 503)]
)
def test_what_ends_a_silence(exporter: Exporter, clock: Clock, act: str | None, status: int) -> None:
    exporter.begin("trainer-0")
    clock.seconds += SILENT_SECONDS + 1
    if act:
        getattr(exporter, act)("trainer-0")
    assert health(exporter)[0] == status


def test_a_resting_slot_that_gets_work_is_expected_to_report_again(exporter: Exporter, clock: Clock) -> None:
    exporter.begin("evaluator-0")
    exporter.rest("evaluator-0")
    exporter.update("evaluator-0", Snapshot())
    clock.seconds += SILENT_SECONDS + 1
    assert health(exporter)[0] == 200
    exporter.begin("evaluator-0")
    clock.seconds += SILENT_SECONDS + 1
    assert health(exporter)[0] == 503


def test_every_declared_metric_is_served_with_its_type_in_both_formats(exporter: Exporter) -> None:
    counted = Telemetry()
    for metric in METRICS.values():
        labels = dict.fromkeys(metric.labels, 'odd "\\\n label')
        match metric:
            case Counter():
                counted.count(metric, 2, **labels)
            case Gauge():
                counted.set(metric, 2, **labels)
            case Histogram():
                counted.observe(metric, 2, **labels)
    exporter.update("controller", counted.snapshot())
    expected = {name.removesuffix("_total"): metric.kind for name, metric in METRICS.items()}
    _, _, plain = get(exporter, "/metrics")
    assert {family.name: family.type for family in parse(plain)} == expected
    _, content_type, openmetrics = get(exporter, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert {family.name: family.type for family in parse_openmetrics(openmetrics)} == expected  # type: ignore[no-untyped-call]


def test_unknown_paths_are_404(exporter: Exporter) -> None:
    assert get(exporter, "/")[0] == 404
    assert get(exporter, "/metrics?name=x")[0] == 200


def test_a_port_in_use_is_one_sentence_that_names_field_and_fix(exporter: Exporter) -> None:
    with pytest.raises(ValueError, match=r"^cluster\.metrics_port: 127\.0\.0\.1:\d+ .* in use.* 0 for any free one$"):
        Exporter("127.0.0.1", exporter.port, run_id="tiny-0", silent_seconds=1.0)


def test_close_frees_the_port() -> None:
    exporter = Exporter("127.0.0.1", 0, run_id="tiny-0", silent_seconds=1.0)
    get(exporter, "/health")
    exporter.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", exporter.port), timeout=1)
    Exporter("127.0.0.1", exporter.port, run_id="tiny-1", silent_seconds=1.0).close()


def test_an_idle_connection_does_not_hold_others_up(exporter: Exporter) -> None:
    with socket.create_connection(("127.0.0.1", exporter.port)):
        assert health(exporter)[0] == 200
