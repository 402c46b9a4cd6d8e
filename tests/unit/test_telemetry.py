"""What is counted is what is snapshot, and wrong use fails at once."""

import json
import pickle
import re
import threading
from dataclasses import asdict

import pytest

from workers import telemetry
from workers.telemetry import METRICS, PREFIX, Counter, Gauge, Histogram, Metric, Sample, Telemetry


def by_name(counted: Telemetry) -> dict[str, float]:
    return {sample.name: sample.value for sample in counted.snapshot().samples}


def test_snapshot_starts_empty_and_holds_only_what_was_used() -> None:
    counted = Telemetry()
    assert counted.snapshot().samples == ()
    counted.count(telemetry.HARVEST_TOKENS_TOTAL, 128)
    counted.count(telemetry.HARVEST_TOKENS_TOTAL, 64)
    expected = Sample("dollhouse_harvest_tokens_total", "dollhouse_harvest_tokens_total", (), 192.0)
    assert counted.snapshot().samples == (expected,)


def test_gauge_keeps_the_latest_value_per_labels() -> None:
    counted = Telemetry()
    counted.set(telemetry.EVAL_FVU, 0.5, sae="small", prefix=64)
    counted.set(telemetry.EVAL_FVU, 0.4, sae="small", prefix=64)
    counted.set(telemetry.EVAL_FVU, 0.2, sae="small", prefix=128)
    assert {sample.labels: sample.value for sample in counted.snapshot().samples} == {
        (("sae", "small"), ("prefix", "64")): 0.4,
        (("sae", "small"), ("prefix", "128")): 0.2,
    }


def test_histogram_counts_cumulative_buckets_in_seconds() -> None:
    counted = Telemetry()
    for seconds in (0.0005, 0.003, 0.003, 1000.0):
        counted.observe(telemetry.TRAIN_STEP_SECONDS, seconds)
    samples = counted.snapshot().samples
    buckets = {dict(sample.labels)["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.002"], buckets["0.004"], buckets["65.536"], buckets["+Inf"]) == (1, 1, 3, 3, 4)
    assert by_name(counted)["dollhouse_train_step_seconds_count"] == 4
    assert by_name(counted)["dollhouse_train_step_seconds_sum"] == pytest.approx(1000.0065)


def test_two_telemetries_in_one_process_share_nothing() -> None:
    first, second = Telemetry(), Telemetry()
    first.count(telemetry.STORAGE_RETRIES_TOTAL)
    assert second.snapshot().samples == ()


@pytest.mark.parametrize("labels", [{}, {"hook": "a"}, {"sae": "a", "hook": "b"}])
def test_wrong_labels_raise_at_once(labels: dict[str, str]) -> None:
    counted = Telemetry()
    with pytest.raises(ValueError, match=r"label"):
        counted.count(telemetry.TRAINED_ROWS_TOTAL, 1, **labels)
    assert counted.snapshot().samples == ()


def test_a_counter_cannot_go_down() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        Telemetry().count(telemetry.HARVEST_TOKENS_TOTAL, -1)


def test_snapshot_pickles_and_turns_into_json() -> None:
    counted = Telemetry()
    counted.set(telemetry.TRAIN_LOSS, float("nan"), sae="small")
    counted.observe(telemetry.TRAIN_STEP_SECONDS, 0.1)
    snapshot = counted.snapshot()
    names = [sample.name for sample in snapshot.samples]
    assert [sample.name for sample in pickle.loads(pickle.dumps(snapshot)).samples] == names
    assert [sample["name"] for sample in json.loads(json.dumps(asdict(snapshot)))["samples"]] == names


def test_threads_lose_no_count() -> None:
    counted = Telemetry()

    def work() -> None:
        for _ in range(1000):
            counted.count(telemetry.TRAINED_ROWS_TOTAL, 2, sae="small")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert by_name(counted)["dollhouse_trained_rows_total"] == 8000


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_each_declaration_follows_the_naming_rules(metric: Metric) -> None:
    assert re.fullmatch(rf"{PREFIX}[a-z][a-z0-9_]*", metric.full_name)
    assert metric.help.endswith(".")
    assert metric.name.endswith("_total") == isinstance(metric, Counter)
    assert metric.name.removesuffix("_total").endswith(metric.unit)
    assert set(metric.labels) <= {"hook", "sae", "stage", "prefix", "run_id", "dataset_id"}
    assert isinstance(metric, Counter | Gauge | Histogram)
    if isinstance(metric, Histogram):
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.buckets


def test_the_table_holds_every_declaration_under_its_own_name() -> None:
    declared = [value for value in vars(telemetry).values() if isinstance(value, Metric)]
    assert len(declared) == len(METRICS) == len({metric.name for metric in declared})
    assert all(METRICS[PREFIX + metric.name] is metric for metric in declared)
    constants = {name for name, value in vars(telemetry).items() if isinstance(value, Metric)}
    assert constants == {metric.name.upper() for metric in declared}
