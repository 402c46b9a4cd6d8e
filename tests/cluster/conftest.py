"""A small recipe on the shipped model, and the `dollhouse` command run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = """
recipe = "small"

[harvest]
hooks = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
max_rows = 98304

[storage]
rows_per_chunk = 2048
chunks_per_shard = 2

[train]
rows = 500_000
batch_rows = 1024
save_every_seconds = 0.5
publish_every_rows = 250_000
window_chunks = 8

[evaluate]
max_sequences = 16
probing_sequences = 128
examples_per_class = 200
min_examples = 30
num_controls = 2
num_latents = 4

[cluster]
num_cpus = 2
metrics_port = 0
object_store_bytes = 100_000_000

[[saes]]
name = "matryoshka"
hook = "blocks.2.hook_resid_post"
d_latent = 512
k = 16
nesting = "fixed"
widths = [64, 192, 512]

[[saes]]
name = "random"
hook = "blocks.1.hook_resid_post"
d_latent = 512
k = 16
nesting = "random"
num_prefixes = 4
"""


class Command:
    """One `dollhouse` process in a process group of its own, as a shell would start it."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"COLUMNS": "200"},
            )

    def wait(self, timeout: float = 240) -> str:
        """Wait for success; returns what was printed."""
        code = self.process.wait(timeout)
        text = self.log.read_text()
        assert code == 0, text
        return text

    def interrupt(self) -> int:
        """Press Ctrl-C: SIGINT to the whole group. Returns the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(90)

    def kill_actor(self, name: str, when: Callable[[], bool], timeout: float = 120) -> int:
        """SIGKILL one actor of this process as soon as `when` holds; returns its process id."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if when():
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    try:
                        if " ".join(child.cmdline()).startswith(f"ray::{name}"):
                            child.kill()
                            return child.pid
                    except psutil.NoSuchProcess:
                        continue
            time.sleep(0.02)
        raise AssertionError(f"no {name} could be killed in time:\n{self.log.read_text()}")


def results(root: Path) -> dict[str, Any]:
    """All that must be equal between two runs: the committed checksums and the published weights."""
    commits = sorted(root.glob("activations/*/commits/*.json"))
    checkpoints = sorted(root.glob("runs/*/saes/*/*/checkpoint.json"))
    assert commits
    assert checkpoints
    return {
        "chunks": {path.name: json.loads(path.read_text())["chunks"] for path in commits},
        "weights": {
            "/".join(path.parts[-4:-1]): json.loads(path.read_text())["tensors_sha256"] for path in checkpoints
        },
        "rows": {"/".join(path.parts[-4:-1]): json.loads(path.read_text())["rows_trained"] for path in checkpoints},
    }


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe's file."""
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Command("run", str(recipe), "--root", str(folder / "root"), log=folder / "log").wait()
    return folder / "root"
