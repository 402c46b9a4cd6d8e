"""`dollhouse run` end to end on a local Ray: killed actors, Ctrl-C and stages apart all end in the same bits."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Command, results

pytestmark = pytest.mark.cluster


def test_a_run_reports_every_score_and_is_found_again(undisturbed: Path, recipe: Path, tmp_path: Path) -> None:
    text = Command("report", "--root", str(undisturbed), "--json", log=tmp_path / "report").wait()
    report = json.loads(text)
    for sae in report["saes"]:
        assert list(sae["fvu"]) == ["64", "192", "512"]
        assert 0 < sae["ce_recovered"] < 1.1
        assert {"1", "2", "5"} == set(sae["sparse_probing"])
        assert {"2", "5", "10", "20"} == set(sae["tpp"])
        assert sae["l0"] > 1
    again = Command("run", str(recipe), "--root", str(undisturbed), log=tmp_path / "again").wait()
    assert "is finished" in again
    assert "harvest" not in again
    inspected = json.loads(Command("inspect", "--root", str(undisturbed), "--json", log=tmp_path / "inspect").wait())
    assert inspected[0]["rows_committed"] == inspected[0]["rows_planned"] == 98304
    status = json.loads(Command("status", "--root", str(undisturbed), "--json", log=tmp_path / "status").wait())
    assert status[0]["finished"]
    assert status[0]["controller"] is None


def test_another_run_of_the_same_harvest_harvests_nothing(undisturbed: Path, recipe: Path, tmp_path: Path) -> None:
    before = results(undisturbed)["chunks"]
    text = Command(
        "harvest", str(recipe), "--root", str(undisturbed), "--set", "train.seed=5", log=tmp_path / "log"
    ).wait()
    assert "is complete, 98,304 rows" in text
    assert results(undisturbed)["chunks"] == before


def test_three_stages_apart_give_the_same_dataset_and_bit_identical_weights(
    undisturbed: Path, recipe: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for stage in ("harvest", "train", "evaluate"):
        Command(stage, str(recipe), "--root", str(root), log=tmp_path / stage).wait()
    assert results(root) == results(undisturbed)


def test_killed_actors_and_ctrl_c_change_nothing_in_the_end(undisturbed: Path, recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    first = Command("run", str(recipe), "--root", str(root), log=tmp_path / "first")
    first.kill_actor("_Harvester", lambda: len(list(root.glob("activations/*/commits/*.json"))) >= 3)
    first.kill_actor("_Trainer", lambda: bool(list(root.glob("runs/*/state/*/*/state.json"))))
    first.kill_actor("_Trainer", lambda: len(list(root.glob("runs/*/saes/*/*/checkpoint.json"))) >= 2)
    assert first.interrupt() == 130
    assert "stopped" in first.log.read_text()
    second = Command("run", str(recipe), "--root", str(root), log=tmp_path / "second")
    second.kill_actor("_Evaluator", lambda: "train: 499" in second.log.read_text())
    second.wait()
    assert results(root) == results(undisturbed)
    assert set(results(root)["rows"].values()) == {250_880, 499_712}  # whole batches past the half, and all of them


def test_metrics_and_health_answer_from_the_first_second_on(recipe: Path, tmp_path: Path) -> None:
    command = Command("harvest", str(recipe), "--root", str(tmp_path / "root"), log=tmp_path / "log")
    address = _metrics_address(command)
    with urllib.request.urlopen(address) as answer:
        first = answer.read().decode()
    assert 'dollhouse_run_info{dataset_id="",run_id="small-' in first
    with urllib.request.urlopen(address.replace("/metrics", "/health")) as answer:
        assert json.load(answer)["status"] == "ok"
    seen = set()
    while command.process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=1) as answer:
                seen |= {line.split("{")[0] for line in answer.read().decode().splitlines() if line[0] != "#"}
        except OSError:
            break
    command.wait()
    assert {"dollhouse_harvest_tokens_total", "dollhouse_storage_written_bytes_total", "dollhouse_queue_depth"} <= seen


def test_the_readmes_python_works_on_a_finished_run(undisturbed: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("<!-- ci: python -->\n```python\n")[1].split("```")[0]
    assert '"dollhouse-data"' in code
    names: dict[str, Any] = {}
    exec(code.replace('"dollhouse-data"', repr(str(undisturbed))), names)
    assert names["latents"].shape == (len(names["tokens"]), 512)
    assert names["batch"].shape == (1024, 256)
    assert "".join(names["tokens"]).startswith("for line in")


def _metrics_address(command: Command) -> str:
    while command.process.poll() is None:
        for word in command.log.read_text().split():
            if word.startswith("http://") and word.endswith("/metrics"):
                return word
    raise AssertionError(command.log.read_text())
