"""The command: it refuses and plans before anything heavy is imported, and tells of an empty root in plain words."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from services import progress
from services.cli import app
from services.config import load_config
from storage import reports
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.records import RunRecord


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _words(text: str) -> str:
    return " ".join(text.split())


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    result = _invoke(
        "run",
        "tiny",
        "--root",
        str(root),
        "--dry-run",
        "--set",
        "harvest.max_rows=1000",
        "--set",
        "cluster.metrics_port=0",
    )
    assert result.exit_code == 0, result.output
    assert "the configuration is valid; nothing was started" in _words(result.output)
    assert "rows to harvest: 896" in result.output
    assert "width of the residual stream: 256" in result.output
    assert not root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nobody"], "there is no recipe nobody: name a .toml file or one of gemma-2-2b, gpt2-small"),
        (["train", "tiny", "--set", "train.nothing=1"], "unknown key train.nothing"),
        (["run", "tiny", "--set", "evaluate.probing_k=[]"], "evaluate.probing_k must start between 1 and"),
        (["run", "tiny", "--set", "evaluate.erasure_n=[0]"], "evaluate.erasure_n must hold numbers"),
        (["status", "--root", "s3://user:topsecret@bucket/x"], "holds a password"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments: list[str], message: str) -> None:
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "topsecret" not in result.stderr


@pytest.mark.parametrize("command", ["status", "inspect"])
def test_an_empty_root_has_no_runs_and_no_datasets(tmp_path: Path, command: str) -> None:
    result = _invoke(command, "--root", str(tmp_path), "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])
    told = _invoke(command, "--root", str(tmp_path))
    assert told.exit_code == 0
    assert "under this root" in told.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_an_empty_root_is_refused_with_what_to_do(tmp_path: Path) -> None:
    result = _invoke("report", "--root", str(tmp_path))
    assert result.exit_code == 2
    assert "start one with `dollhouse run`" in result.stderr


def test_a_report_of_a_run_that_has_just_begun_is_one_sentence(tmp_path: Path) -> None:
    record = RunRecord(run_id="unended", recipe="tiny", config={"saes": [], "train": {"rows": 8, "batch_rows": 2}})
    reports.write_run(Storage(StorageConfig(root=str(tmp_path))), record, "")
    result = _invoke("report", "--root", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no run under")
    assert result.stderr.count("\n") == 1
    (entry,) = json.loads(_invoke("status", "--root", str(tmp_path), "--json").stdout)
    assert (entry["run"], entry["num_steps"], entry["finished"], entry["controller"]) == ("unended", 4, False, None)
    assert "stopped" in _invoke("status", "--root", str(tmp_path)).stdout


def test_status_takes_a_recipe_or_a_run(tmp_path: Path) -> None:
    root = ["--root", str(tmp_path), "--json"]
    run_id = load_config("tiny", ["train.seed=3"]).run_id
    for name in ("other", run_id):
        record = RunRecord(run_id=name, recipe="tiny", config={"saes": [], "train": {"rows": 8, "batch_rows": 2}})
        reports.write_run(Storage(StorageConfig(root=str(tmp_path))), record, "")
    assert [run["run"] for run in json.loads(_invoke("status", "other", *root).stdout)] == ["other"]
    of_recipe = _invoke("status", "tiny", "--set", "train.seed=3", *root)
    assert [run["run"] for run in json.loads(of_recipe.stdout)] == [run_id]
    assert json.loads(_invoke("inspect", "other", *root).stdout) == []
    missing = _invoke("report", "tiny", *root)
    assert missing.exit_code == 2
    assert "holds no run of tiny" in missing.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "nobody"], ["status", "--help"]])
def test_help_and_mistakes_import_neither_torch_nor_ray(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom services.__main__ import main\n"
        f"sys.argv = ['dollhouse', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'zarr', 'transformers', 'sklearn', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout or "there is no recipe" in done.stderr


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_progress_is_plain_lines_where_there_is_no_terminal(clock: _Clock) -> None:
    out = io.StringIO()
    with progress.StageProgress(Console(file=out, width=40), "harvest", "rows") as stage:
        stage.update(4000, 10000)  # what an earlier invocation has done is no speed of this one
        clock.now += 5
        stage.update(5000, 10000)
        clock.now += 15
        stage.update(6000, 10000, "2 shards out")
        clock.now += 20
        stage.update(10000, 10000)
    assert out.getvalue().splitlines() == [
        "harvest: 6,000 of 10,000 rows in 20 s, 100 rows/s, 2 shards out",
        "harvest: 10,000 of 10,000 rows in 40 s, 150 rows/s",
        "harvest: 10,000 rows in 40 s, 150 rows/s",
    ]


def test_progress_of_a_stage_that_failed_ends_without_a_final_line(clock: _Clock) -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress.StageProgress(Console(file=out), "train", "rows"):
        raise KeyboardInterrupt
    assert out.getvalue() == ""


def test_progress_is_bars_on_a_terminal_also_for_two_stages_at_once() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with (
        progress.StageProgress(console, "train", "rows") as first,
        progress.StageProgress(console, "evaluate", "checkpoints") as second,
    ):
        first.update(5, 10, "FVU 0.2")
        second.update(1, 2)
    assert "train" in out.getvalue()
    assert "evaluate" in out.getvalue()
    assert "rows/s" not in out.getvalue()
