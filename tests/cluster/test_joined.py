"""A run on a Ray cluster that was there before: the project's folder is uploaded, and the result is the same."""

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import Command, results

pytestmark = pytest.mark.cluster


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a Ray head of our own, with a token and without a dashboard; ends with the test."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    port = _free_port()
    command = [
        *(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            "--num-cpus=2",
        ),
        *("--object-store-memory=100000000", "--include-dashboard=false", "--disable-usage-stats"),
    ]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while not _answers(port):
                assert process.poll() is None, (tmp_path / "head.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            psutil.wait_procs([*started, process], timeout=20)
            for left in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.kill()
            process.wait(10)


def test_a_run_on_a_joined_cluster_equals_one_on_this_machine(
    head: str, undisturbed: Path, recipe: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    refused = Command("run", str(recipe), "--root", str(root), "--address", head, log=tmp_path / "refused")
    assert refused.process.wait(60) == 2
    assert "cluster.shared_filesystem=true" in refused.log.read_text()
    arguments = ("--address", head, "--set", "cluster.shared_filesystem=true")
    Command("run", str(recipe), "--root", str(root), *arguments, log=tmp_path / "log").wait()
    assert results(root) == results(undisturbed)
