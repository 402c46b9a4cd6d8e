"""What lets this project be imported as `services`, `workers` and `storage`, and answer before anything heavy loads."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "numpy", "zarr", "fsspec", "obstore", "transformers", "transformer_lens", "prometheus_client"}


@pytest.mark.parametrize("name", ["services", "workers", "storage", "deploy", "tests"])
def test_no_other_distribution_ships_our_top_level_names(name: str) -> None:
    assert set(packages_distributions().get(name, [])) <= {"dollhouse"}


@pytest.mark.parametrize("name", ["services", "workers", "storage", "tests"])
def test_every_init_file_is_there_and_empty(name: str) -> None:
    folders = {path.parent for path in (ROOT / name).rglob("*.py")}
    assert folders
    for folder in folders:
        assert (folder / "__init__.py").read_bytes() == b"", folder


@pytest.mark.parametrize("module", ["services.config", "workers.config", "storage.config"])
def test_a_config_imports_without_anything_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(ended.stdout)}
    assert module.partition(".")[0] in loaded
    assert loaded & HEAVY == set()
