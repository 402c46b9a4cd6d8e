"""hadolint on the Dockerfile, which nothing here can build."""

import subprocess
from pathlib import Path

import pytest

from tests.system.conftest import require

pytestmark = pytest.mark.system

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_hadolint_finds_nothing() -> None:
    linted = subprocess.run(
        [require("hadolint"), "Dockerfile"], cwd=DEPLOY, capture_output=True, text=True, timeout=60, check=False
    )
    assert (linted.returncode, linted.stdout) == (0, "")
