"""Every metric of the product, declared once, and the process-local counting of them.

Each actor, and the controller, owns one `Telemetry` and sends its `snapshot()` along with each progress message.
Nothing here listens, merges or draws: `services.exporter` serves the snapshots, `services.dashboard` draws the
declarations.
Labels are few and bounded (an SAE, a prefix length, a stage), never a shard id.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import prometheus_client

PREFIX = "dollhouse_"


@dataclass(frozen=True)
class Metric:
    """One family of series: `dollhouse_` and `name`, told apart by `labels`; `unit` is the word its name ends in."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    kind: ClassVar[Literal["counter", "gauge", "histogram"]]

    @property
    def full_name(self) -> str:
        """The family's name on the wire."""
        return PREFIX + self.name


@dataclass(frozen=True)
class Counter(Metric):
    """A total that only grows; its name ends in `_total`."""

    kind = "counter"


@dataclass(frozen=True)
class Gauge(Metric):
    """A value of this moment; it vanishes with the worker that set it."""

    kind = "gauge"


@dataclass(frozen=True)
class Histogram(Metric):
    """Observations counted in buckets, given by their upper bounds in `unit`."""

    buckets: tuple[float, ...] = ()
    kind = "histogram"


RUN_INFO = Gauge(
    "run_info",
    "Always 1; its labels say which run and which dataset these series belong to.",
    ("run_id", "dataset_id"),
)
UP = Gauge("up", "1 while the slot holds a living worker, 0 after its worker died or left.")
ACTOR_RESTARTS_TOTAL = Counter("actor_restarts_total", "Workers replaced after they died.", ("stage",), unit="restarts")
QUEUE_DEPTH = Gauge("queue_depth", "Shards or checkpoints waiting for a worker of the stage.", ("stage",))

PLANNED_ROWS = Gauge("planned_rows", "Rows the dataset will have.", unit="rows")
COMMITTED_ROWS = Gauge("committed_rows", "Rows of the dataset that are committed and readable.", unit="rows")
HARVEST_TOKENS_TOTAL = Counter("harvest_tokens_total", "Tokens whose activations were harvested.", unit="tokens")
FORWARD_SECONDS_TOTAL = Counter(
    "forward_seconds_total", "Time spent in the language model's forward passes.", unit="seconds"
)

STORAGE_READ_BYTES_TOTAL = Counter("storage_read_bytes_total", "Bytes read from the root.", unit="bytes")
STORAGE_WRITTEN_BYTES_TOTAL = Counter("storage_written_bytes_total", "Bytes written to the root.", unit="bytes")
STORAGE_RETRIES_TOTAL = Counter(
    "storage_retries_total", "Storage requests that failed and were tried again.", unit="retries"
)

TRAINED_ROWS_TOTAL = Counter(
    "trained_rows_total", "Rows trained on, rows repeated after a restart included.", ("sae",), unit="rows"
)
TRAIN_STEP_SECONDS = Histogram(
    "train_step_seconds",
    "Time of one training step of all SAEs of a trainer, the wait for data excluded.",
    unit="seconds",
    buckets=tuple(0.001 * 2**power for power in range(17)),  # 1 ms to 65 s
)
TRAIN_WAIT_SECONDS_TOTAL = Counter("train_wait_seconds_total", "Time a trainer waited for data.", unit="seconds")
TRAIN_BUSY_SECONDS_TOTAL = Counter(
    "train_busy_seconds_total", "Time a trainer spent in training steps.", unit="seconds"
)
TRAIN_WAIT_SHARE = Gauge("train_wait_share", "Share of its recent time that a trainer waited for data, 0 to 1.")
TRAIN_LOSS = Gauge("train_loss", "Training loss of the latest step.", ("sae",))
TRAIN_FVU = Gauge("train_fvu", "Fraction of variance unexplained on the latest training batch.", ("sae",))
TRAIN_L0 = Gauge("train_l0", "Mean active latents per token on the latest training batch.", ("sae",))
TRAIN_DEAD_SHARE = Gauge("train_dead_share", "Share of latents that have not fired for long, 0 to 1.", ("sae",))
CHECKPOINT_AGE_SECONDS = Gauge(
    "checkpoint_age_seconds", "Time since the SAE's latest saved checkpoint.", ("sae",), unit="seconds"
)

EVAL_CE_RECOVERED = Gauge(
    "eval_ce_recovered", "Share of the cross-entropy recovered by the latest evaluated checkpoint.", ("sae",)
)
EVAL_FVU = Gauge("eval_fvu", "Held-out fraction of variance unexplained at a prefix length.", ("sae", "prefix"))

METRICS: dict[str, Metric] = {value.full_name: value for value in list(globals().values()) if isinstance(value, Metric)}
"""The table: every declaration above by its full name."""


@dataclass(frozen=True)
class Sample:
    """One number on its way to the exporter: family name, line name (`…_bucket`, …), label pairs, value."""

    metric: str
    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


@dataclass(frozen=True)
class Snapshot:
    """All samples of one process at one moment: plain data that pickles and turns into JSON."""

    samples: tuple[Sample, ...] = ()


_Family = TypeVar("_Family", prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)


class Telemetry:
    """Counts for one process; any thread may call it.

    A family appears in snapshots from its first use on. Labels other than the declared ones raise ValueError at once,
    and the wrong kind of metric is a type error.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[Metric, Any] = {}

    def count(self, metric: Counter, amount: float = 1, **labels: str | int) -> None:
        """Adds `amount` (in the metric's unit, not negative) to a total."""
        self._series(metric, prometheus_client.Counter, labels).inc(amount)

    def set(self, metric: Gauge, value: float, **labels: str | int) -> None:
        """Sets a gauge to `value`, in the metric's unit."""
        self._series(metric, prometheus_client.Gauge, labels).set(value)

    def observe(self, metric: Histogram, value: float, **labels: str | int) -> None:
        """Adds one observation, in the metric's unit, to a histogram."""
        self._series(metric, partial(prometheus_client.Histogram, buckets=metric.buckets), labels).observe(value)

    def forget(self, metric: Metric) -> None:
        """Drops all series of a family, for labels that have changed; it starts anew at its next use."""
        with self._lock:
            self._families.pop(metric, None)

    def snapshot(self) -> Snapshot:
        """What this process has counted so far."""
        with self._lock:
            families = list(self._families.items())
        return Snapshot(
            tuple(
                Sample(metric.full_name, sample.name, tuple(sample.labels.items()), sample.value)
                for metric, family in families
                for collected in family.collect()
                for sample in collected.samples
                if not sample.name.endswith("_created")  # the library's birth dates are no metrics of ours
            )
        )

    def _series(self, metric: Metric, make: Callable[..., _Family], labels: dict[str, str | int]) -> _Family:
        with self._lock:
            if metric not in self._families:
                self._families[metric] = make(metric.full_name, metric.help, metric.labels, registry=None)
            family: _Family = self._families[metric]
        return family.labels(**labels) if labels else family
