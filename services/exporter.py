"""One port for the whole run: `/metrics` for Prometheus and `/health` for people and probes.

The controller owns one `Exporter` and feeds it the snapshots that come with each worker's progress (its own as worker
"controller"). A worker here is a slot, such as "harvester-0": what dies in it is replaced, and its totals go on.
No metric is declared here (see `workers.telemetry`), and nothing is decided: silence is reported, not acted on.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder

from workers.telemetry import METRICS, UP, Gauge, Sample, Snapshot

_Series = tuple[str, str, tuple[tuple[str, str], ...]]  # family, line name, labels: what makes two samples one series


@dataclass
class _Slot:
    """What is known of one worker slot."""

    heard_seconds: float  # when, on the exporter's clock
    state: str = "working"  # working, resting or gone
    latest: Snapshot = field(default_factory=Snapshot)
    base: dict[_Series, float] = field(default_factory=dict)  # totals of its dead incarnations

    def bury(self) -> None:
        """Moves the totals of the present incarnation to the base, and forgets its gauges."""
        self.base = self.totals()
        self.latest = Snapshot()

    def totals(self) -> dict[_Series, float]:
        totals = self.base.copy()
        for sample in self.latest.samples:
            if not isinstance(METRICS[sample.metric], Gauge):
                series = sample.metric, sample.name, sample.labels
                totals[series] = totals.get(series, 0) + sample.value
        return totals

    def samples(self) -> Iterator[Sample]:
        yield from (sample for sample in self.latest.samples if isinstance(METRICS[sample.metric], Gauge))
        yield from (Sample(*series, value) for series, value in self.totals().items())
        yield Sample(UP.full_name, UP.full_name, (), self.state != "gone")


class Exporter:
    """Serves the merged metrics and the health of a run from a thread; any thread may call it.

    A slot is working (also when first heard of), resting or gone. Only a working one is expected to report: when it has
    been silent for more than `silent_seconds`, `/health` answers 503. `stage` is shown there as it is.
    Port 0 takes any free one, see `port`.

    Raises:
        ValueError: the address cannot be bound.
    """

    def __init__(
        self, host: str, port: int, *, run_id: str, silent_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run_id = run_id
        self.stage = "starting"
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"cluster.metrics_port: {host}:{port} cannot be listened on ({error.strerror}): "
                "set it to another port, or to 0 for any free one"
            ) from error
        self._server.exporter = self
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="exporter", daemon=True)
        self._thread.start()

    def begin(self, worker: str) -> None:
        """The slot was handed work: reports are expected from now on."""
        with self._lock:
            slot = self._slot(worker)
            slot.state, slot.heard_seconds = "working", self._clock()

    def update(self, worker: str, snapshot: Snapshot) -> None:
        """The slot reported progress: `snapshot` takes the place of its last one. A report after `drop` is ignored."""
        with self._lock:
            slot = self._slot(worker)
            if slot.state != "gone":
                slot.latest, slot.heard_seconds = snapshot, self._clock()

    def rest(self, worker: str) -> None:
        """The slot has nothing to do until `begin`: its series stay, its silence is fine."""
        with self._lock:
            self._slot(worker).state = "resting"

    def drop(self, worker: str) -> None:
        """The slot's worker died or left: its gauges vanish at once, its totals stay, nothing is expected of it."""
        with self._lock:
            slot = self._slot(worker)
            slot.bury()
            slot.state = "gone"

    def replaced(self, worker: str) -> None:
        """A new worker starts in the slot: totals go on from where the dead one's last report left them."""
        self.drop(worker)
        self.begin(worker)

    def collect(self) -> Iterator[Family]:
        """The merged families, each sample with the slot's name as label `worker`; called at each scrape."""
        families = {
            name: Family(name.removesuffix("_total"), metric.help, metric.kind) for name, metric in METRICS.items()
        }
        with self._lock:
            samples = [(worker, sample) for worker, slot in self._slots.items() for sample in slot.samples()]
        for worker, sample in samples:
            families[sample.metric].add_sample(sample.name, {**dict(sample.labels), "worker": worker}, sample.value)
        return (family for family in families.values() if family.samples)

    def health(self) -> tuple[HTTPStatus, dict[str, Any]]:
        """The answer of `/health`: 200 or 503, and its JSON body."""
        now = self._clock()
        with self._lock:
            workers = {
                worker: {"state": slot.state, "silent_seconds": round(now - slot.heard_seconds, 3)}
                for worker, slot in self._slots.items()
            }
            silent = any(
                slot.state == "working" and now - slot.heard_seconds > self._silent_seconds
                for slot in self._slots.values()
            )
        body = {"status": "silent" if silent else "ok", "run_id": self.run_id, "stage": self.stage, "workers": workers}
        return HTTPStatus.SERVICE_UNAVAILABLE if silent else HTTPStatus.OK, body

    def close(self) -> None:
        """Stops answering and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _slot(self, worker: str) -> _Slot:
        return self._slots.setdefault(worker, _Slot(self._clock()))


class _Server(ThreadingTCPServer):
    """Not http.server's own: that one looks its host name up in DNS before it listens."""

    allow_reuse_address = True
    daemon_threads = True
    exporter: Exporter


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds that an idle or half-sent request may hold its thread

    def do_GET(self) -> None:
        exporter = self.server.exporter
        match urlsplit(self.path).path:
            case "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, content_type, encode(exporter))
            case "/health":
                status, body = exporter.health()
                self._answer(status, "application/json", json.dumps(body).encode())
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"try /metrics or /health\n")

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Scrapes are no news."""
