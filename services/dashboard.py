"""Writes the Grafana dashboard from the metric declarations: `python -m services.dashboard > deploy/dashboard.json`.

Every declared metric gets one panel, drawn after its kind. A test keeps the written file and the declarations equal.
"""

import json
import sys
from typing import Any

from workers import telemetry
from workers.telemetry import Counter, Gauge, Histogram, Metric

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Run": (telemetry.RUN_INFO, telemetry.UP, telemetry.ACTOR_RESTARTS_TOTAL, telemetry.QUEUE_DEPTH),
    "Harvest": (
        telemetry.PLANNED_ROWS,
        telemetry.COMMITTED_ROWS,
        telemetry.HARVEST_TOKENS_TOTAL,
        telemetry.FORWARD_SECONDS_TOTAL,
    ),
    "Storage": (
        telemetry.STORAGE_READ_BYTES_TOTAL,
        telemetry.STORAGE_WRITTEN_BYTES_TOTAL,
        telemetry.STORAGE_RETRIES_TOTAL,
    ),
    "Training": (
        telemetry.TRAINED_ROWS_TOTAL,
        telemetry.TRAIN_STEP_SECONDS,
        telemetry.TRAIN_WAIT_SHARE,
        telemetry.TRAIN_BUSY_SECONDS_TOTAL,
        telemetry.TRAIN_WAIT_SECONDS_TOTAL,
        telemetry.TRAIN_LOSS,
        telemetry.TRAIN_FVU,
        telemetry.TRAIN_L0,
        telemetry.TRAIN_DEAD_SHARE,
        telemetry.CHECKPOINT_AGE_SECONDS,
    ),
    "Evaluation": (telemetry.EVAL_CE_RECOVERED, telemetry.EVAL_FVU),
}

_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT = 24, 8, 7  # Grafana's grid


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model, schema version 39 (Grafana 11)."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, metrics in SECTIONS.items():
        panels.append({"type": "row", "title": title, "gridPos": _place(0, top, _COLUMNS, 1), "panels": []})
        top += 1
        per_row = _COLUMNS // _PANEL_WIDTH
        for i, metric in enumerate(metrics):
            x, y = i % per_row * _PANEL_WIDTH, top + i // per_row * _PANEL_HEIGHT
            panels.append(_panel(metric, _place(x, y, _PANEL_WIDTH, _PANEL_HEIGHT)))
        top += -(-len(metrics) // per_row) * _PANEL_HEIGHT
    return {
        "title": "dollhouse",
        "uid": "dollhouse",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, start=1)],
    }


def _panel(metric: Metric, place: dict[str, int]) -> dict[str, Any]:
    unit = {"seconds": "s", "bytes": "bytes"}.get(
        metric.unit, "percentunit" if metric.name.endswith("_share") else "short"
    )
    if isinstance(metric, Counter):
        unit = {"s": "percentunit", "bytes": "Bps"}.get(unit, "cps")  # seconds per second are a share
    return {
        "type": "timeseries",
        "title": metric.name.removesuffix("_total").replace("_", " "),
        "description": metric.help,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "gridPos": place,
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(_queries(metric))
        ],
    }


def _queries(metric: Metric) -> list[tuple[str, str]]:
    """PromQL and legend of each line family: the rate of a counter, a gauge as it is, quantiles of a histogram."""
    labels = (*metric.labels, "worker")
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    name, matcher = metric.full_name, '{worker=~"$worker"}'
    match metric:
        case Counter():
            return [(f"sum by ({', '.join(labels)}) (rate({name}{matcher}[$__rate_interval]))", legend)]
        case Histogram():
            rate = f"sum by (le, {', '.join(labels)}) (rate({name}_bucket{matcher}[$__rate_interval]))"
            return [(f"histogram_quantile({q}, {rate})", f"{legend} p{q * 100:.0f}") for q in (0.5, 0.95)]
        case Gauge():
            return [(f"{name}{matcher}", legend)]
    raise AssertionError(metric.kind)


def _variables() -> list[dict[str, Any]]:
    worker = f"label_values({telemetry.UP.full_name}, worker)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "worker",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "$datasource"},
            "query": worker,
            "definition": worker,
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=2)
    sys.stdout.write("\n")
