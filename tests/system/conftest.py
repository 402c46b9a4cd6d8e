"""What the tests against Debian's programs share."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def require(binary: str) -> str:
    """Path of a program, also of one beside this Python.

    A missing one skips the test, or fails it where DOLLHOUSE_REQUIRE_SYSTEM=1.
    """
    path = shutil.which(binary) or shutil.which(binary, path=Path(sys.executable).parent)
    if path:
        return path
    if os.environ.get("DOLLHOUSE_REQUIRE_SYSTEM") == "1":
        pytest.fail(f"{binary} is not installed, and DOLLHOUSE_REQUIRE_SYSTEM=1 asks for it")
    pytest.skip(f"{binary} is not installed")
