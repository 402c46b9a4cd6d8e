"""What the tests against Debian's programs share."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.rgw import BINARIES, Gateway


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


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """An S3 server with one empty bucket, `bucket`."""
    for binary in BINARIES:
        require(binary)
    server = Gateway(tmp_path_factory.mktemp("rgw"))
    try:
        server.start()
        server.create_bucket("bucket")
        yield server
    finally:
        server.stop()
