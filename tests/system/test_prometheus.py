"""Prometheus's own tools on what we export and deploy, and a real Prometheus that scrapes a real exporter."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.exporter import Exporter
from tests.system.conftest import require
from workers.telemetry import METRICS, Counter, Gauge, Histogram, Telemetry

pytestmark = pytest.mark.system

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    """One worker that has used every metric of the product."""
    counted = Telemetry()
    for metric in METRICS.values():
        labels = dict.fromkeys(metric.labels, "some")
        match metric:
            case Counter():
                counted.count(metric, 3, **labels)
            case Gauge():
                counted.set(metric, 3, **labels)
            case Histogram():
                counted.observe(metric, 3, **labels)
    exporter = Exporter("127.0.0.1", 0, run_id="system-0", silent_seconds=60.0)
    exporter.update("trainer-0", counted.snapshot())
    yield exporter
    exporter.close()


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [require("promtool"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=DEPLOY,
        timeout=60,
        check=False,
    )


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def test_promtool_finds_nothing_to_say_about_the_metrics(exporter: Exporter) -> None:
    text = get(f"http://127.0.0.1:{exporter.port}/metrics")
    assert all(name in text for name in METRICS)
    checked = promtool("check", "metrics", stdin=text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_promtool_accepts_the_configuration_and_its_alerts() -> None:
    checked = promtool("check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    assert "5 rules found" in checked.stdout


def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    tested = promtool("test", "rules", "alerts.test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    cases = yaml.safe_load((DEPLOY / "alerts.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules}


def test_every_dashboard_query_is_promql(tmp_path: Path) -> None:
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    rules = [
        {"record": f"query:{i}", "expr": query.replace("$__rate_interval", "1m").replace("$worker", ".*")}
        for i, query in enumerate(queries)
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", str(file))
    assert checked.returncode == 0, checked.stderr
    assert f"{len(queries)} rules found" in checked.stdout
    assert len(queries) > len(METRICS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def prometheus(exporter: Exporter, tmp_path: Path) -> Iterator[str]:
    """URL of a Prometheus with our configuration, pointed at the exporter, every second."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "dollhouse"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{exporter.port}"]}]
    config["scrape_configs"] = [job]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [require("prometheus"), f"--config.file={file}", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={tmp_path / 'data'}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(prometheus: str, query: str, timeout_seconds: float = 30.0) -> list[dict[str, Any]]:
    """The first answer that is not empty."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    give_up = time.monotonic() + timeout_seconds
    while time.monotonic() < give_up:
        try:
            if result := json.loads(get(url))["data"]["result"]:
                return list(result)
        except urllib.error.URLError:
            pass  # it has not opened its port yet, or is not ready
        time.sleep(0.2)
    raise AssertionError(f"no answer to {query} within {timeout_seconds} s")


def test_prometheus_scrapes_the_exporter_and_answers(exporter: Exporter, prometheus: str) -> None:
    (rows,) = ask(prometheus, "sum by (worker, sae) (dollhouse_trained_rows_total)")
    assert (rows["metric"], float(rows["value"][1])) == ({"worker": "trainer-0", "sae": "some"}, 3.0)
    assert float(ask(prometheus, 'up{job="dollhouse"}')[0]["value"][1]) == 1.0
    exporter.drop("trainer-0")
    (up,) = ask(prometheus, "dollhouse_up == 0")
    assert up["metric"]["worker"] == "trainer-0"
    assert ask(prometheus, "absent(dollhouse_train_loss)")  # gone with the next scrape, not five minutes later
