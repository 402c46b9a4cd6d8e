"""A recipe that cannot work is refused in one sentence that names the field and the fix, before anything starts."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.config import RECIPES, RunConfig, load_config


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_shipped_recipe_parses_and_says_its_hardware_and_expectation(recipe: str) -> None:
    head = (RECIPES / f"{recipe}.toml").read_text().splitlines()[0]
    assert load_config(recipe).recipe == recipe
    assert "Hardware" in head
    assert "Time" in head


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.rowz=1", "unknown key train.rowz"),
        ("saes.matryoshka.widths=[128, 100, 4096]", "nested widths must increase"),
        ("saes.matryoshka.widths=[128, 2048]", "the last width must be d_latent = 4096"),
        ("saes.matryoshka.k=5000", "above d_latent = 4096: lower k"),
        ("saes.matryoshka.k=some", "valid integer"),
        ("saes.matryoshka.hook=blocks.3.hook_mlp_out", "harvest.hooks does not list"),
        ("saes.batch-topk.name=matryoshka", "occurs twice"),
        ("saes.batch-topk.name=../x", "String should match pattern"),
        ("harvest.context_tokens=100", "no multiple of harvest.context_tokens"),
        ("train.batch_rows=9999999", "above train.rows"),
        ("evaluate.prefixes=[9000]", "evaluate.prefixes must lie between"),
        ("storage.root=s3://user:secret@bucket/x", "holds a password"),
        ("text.source=files", "text.paths is empty"),
        ("text.source=hub", "text.dataset is missing"),
        ("nonsense", "write it as field=value"),
        ("saes.nobody.k=3", "nothing in the list is named nobody"),
    ],
)
def test_an_impossible_value_is_refused_with_its_field_and_the_fix(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("harvest.hooks=['blocks.9.hook_resid_post','blocks.2.hook_resid_post']", "has layers 0 to 3"),
        ("harvest.hooks=['embed','blocks.2.hook_resid_post']", "not of the form"),
        ("model.name=./nowhere", "there is no folder"),
        ("harvest.context_tokens=1024", "reads 512 at most"),
        ("storage.root=memory://x", "one process only"),
    ],
)
def test_what_only_the_machine_knows_is_checked_before_a_run(override: str, message: str) -> None:
    config = load_config("tiny", [override])
    with pytest.raises(ValueError, match=message):
        config.check()


def test_a_local_root_with_a_joined_cluster_needs_a_shared_filesystem() -> None:
    with pytest.raises(ValueError, match="use a bucket"):
        load_config("tiny", ["cluster.address=10.0.0.1:6379"]).check()


def test_a_port_in_use_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cluster.metrics_port = {port}"):
            load_config("tiny", [f"cluster.metrics_port={port}"]).check()


def test_the_run_id_ignores_where_a_run_happens_and_nothing_else() -> None:
    here = load_config("tiny")
    elsewhere = load_config("tiny", ["storage.root=/somewhere", "cluster.metrics_port=0", "cluster.num_cpus=7"])
    other = load_config("tiny", ["train.seed=1"])
    assert here.run_id == elsewhere.run_id != other.run_id


def test_every_field_of_every_config_says_what_it_means() -> None:
    def undocumented(model: type, path: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                found += undocumented(inner, f"{path}{name}.")
            elif field.description is None:
                found.append(path + name)
        return found

    assert undocumented(RunConfig, "") == ["saes"]


def test_a_bad_recipe_answers_in_well_under_two_seconds_without_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text("[train]\nrows = 'many'\n")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "services", "run", str(recipe)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: bad.toml: ")
    assert time.monotonic() - started < 2
