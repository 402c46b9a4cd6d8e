"""The README is true: its tree, its metrics table, its markers, its sizes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from services.config import RECIPES, parse
from workers.telemetry import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metrics_table_is_the_declarations() -> None:
    rows = re.findall(r"^\| `(dollhouse_\w+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    declared = [(name, ", ".join(f"`{label}`" for label in m.labels), m.help) for name, m in METRICS.items()]
    assert rows == declared


def test_the_tree_names_every_module_once_with_a_line_of_purpose() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    named = re.findall(r"^ *([\w-]+\.(?:py|toml))  +\S", tree, re.MULTILINE)
    modules = [
        path.name
        for folder in ("services", "workers", "storage")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".toml"} and path.name != "__init__.py"
    ]
    assert sorted(named) == sorted(modules)


def test_the_recipe_shown_parses() -> None:
    shown = README.split("```toml\n")[1].split("```")[0]
    config = parse({"recipe": "mine"} | tomllib.loads(shown), "mine.toml")
    assert config.saes[0].widths == (512, 2048, 8192)


def test_every_recipe_and_command_that_it_names_exists() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "services", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in set(re.findall(r"`dollhouse (\w+)", README)):
        assert command in help_text
    for recipe in re.findall(r"dollhouse run ([a-z0-9-]+)(?: |`)", README):
        if not recipe.startswith("-"):
            assert (RECIPES / f"{recipe}.toml").is_file()
