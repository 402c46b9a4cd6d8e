"""The `dollhouse` command. Parses, and refuses what can be refused, before anything heavy is imported."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from services.config import RunConfig, load_config, storage_at

if TYPE_CHECKING:
    from services.exporter import Exporter
    from services.pipeline import Stage
    from storage.filesystem import Storage

app = typer.Typer(
    help="From a language model to trained, evaluated Matryoshka sparse autoencoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Recipe = Annotated[str, typer.Argument(help="A shipped recipe (tiny, minilm, gpt2-small, gemma-2-2b) or a .toml file.")]
Root = Annotated[str | None, typer.Option(help="Where everything is kept: a folder or any fsspec URL.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override one field: train.rows=100000, saes.matryoshka.k=16.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; none starts Ray here.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")]
New = Annotated[bool, typer.Option("--new", help="Start another run of the same configuration.")]
Which = Annotated[str | None, typer.Argument(help="A recipe, or a run's id; none: every run (report: the newest).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]

_DEFAULT_ROOT = "./dollhouse-data"
_SILENT_SECONDS = 300.0  # a worker that should report and has not for so long is unhealthy
_STOPPED = 130  # what shells report after Ctrl-C


class _Only(StrEnum):
    RUN = "run"
    HARVEST = "harvest"
    TRAIN = "train"
    EVALUATE = "evaluate"


@app.command()
def run(
    recipe: Recipe = "tiny",
    root: Root = None,
    sets: Sets = None,
    address: Address = None,
    dry_run: DryRun = False,
    new: New = False,
) -> None:
    """Harvest, train, evaluate and report; goes on from whatever is committed."""
    _start(_Only.RUN, recipe, root, sets, address, dry_run=dry_run, new=new)


@app.command()
def harvest(
    recipe: Recipe = "tiny", root: Root = None, sets: Sets = None, address: Address = None, dry_run: DryRun = False
) -> None:
    """Only make the dataset of activations complete."""
    _start(_Only.HARVEST, recipe, root, sets, address, dry_run=dry_run)


@app.command()
def train(
    recipe: Recipe = "tiny", root: Root = None, sets: Sets = None, address: Address = None, dry_run: DryRun = False
) -> None:
    """Only train the SAEs of a recipe on its dataset, which must be there."""
    _start(_Only.TRAIN, recipe, root, sets, address, dry_run=dry_run)


@app.command()
def evaluate(
    recipe: Recipe = "tiny", root: Root = None, sets: Sets = None, address: Address = None, dry_run: DryRun = False
) -> None:
    """Only score the published checkpoints that have no report yet."""
    _start(_Only.EVALUATE, recipe, root, sets, address, dry_run=dry_run)


@app.command()
def report(which: Which = None, root: Root = None, sets: Sets = None, as_json: AsJson = False) -> None:
    """Print a run's scores, of the newest unless one is named, and write its page again."""
    from services.pages import write_report
    from services.tables import print_report
    from storage.checkpoints import newest_run

    with _errors_in_a_sentence():
        storage = _open(root)
        found = _named(storage, which, sets) or newest_run(storage)
        if found is None:
            hint = "start one with `dollhouse run`, or see `dollhouse status`"
            _fail(f"no run under {storage.url()} has published an SAE: {hint}")
        content = write_report(storage, found)
    if as_json:
        _print_json(content)
    else:
        print_report(content, Console())


@app.command()
def status(which: Which = None, root: Root = None, sets: Sets = None, as_json: AsJson = False) -> None:
    """Tell from storage alone what the runs under the root have done."""
    from services.status import all_runs, print_status

    with _errors_in_a_sentence():
        storage = _open(root)
        content = all_runs(storage, _named(storage, which, sets))
    if as_json:
        _print_json(content)
    else:
        print_status(content, Console())


@app.command()
def inspect(which: Which = None, root: Root = None, sets: Sets = None, as_json: AsJson = False) -> None:
    """Tell what datasets are under the root: model, text, hooks, rows, statistics."""
    from services.status import all_datasets, print_datasets

    with _errors_in_a_sentence():
        storage = _open(root)
        content = all_datasets(storage, _named(storage, which, sets))
    if as_json:
        _print_json(content)
    else:
        print_datasets(content, Console())


def _named(storage: "Storage", which: str | None, sets: list[str] | None) -> str | None:
    """The run that a recipe or a run's id means; none where neither is given. ValueError where there is no such run."""
    from storage.reports import run_exists

    if which is None or (not which.endswith(".toml") and run_exists(storage, which)):
        return which
    run_id = load_config(which, sets).run_id
    if not run_exists(storage, run_id):
        raise ValueError(
            f"{storage.url()} holds no run of {which} (it would be {run_id}): `dollhouse status` lists them"
        )
    return run_id


def _start(
    only: _Only,
    recipe: str,
    root: str | None,
    sets: list[str] | None,
    address: str | None,
    *,
    dry_run: bool,
    new: bool = False,
) -> None:
    console = Console()
    try:
        with _errors_in_a_sentence():
            config = load_config(recipe, sets, root, address)
            config.check(starts=not dry_run)
            if dry_run:
                _print_plan(config, console)
                return
            _run(config, only, console, new=new)
    except KeyboardInterrupt:
        console.print("stopped; what was committed stays, and the same command goes on from there", highlight=False)
        raise typer.Exit(_STOPPED) from None


def _run(config: RunConfig, only: _Only, console: Console, *, new: bool) -> None:
    from services.runs import finished_summary, new_run_id
    from storage.filesystem import Storage

    # An endpoint that does not answer now is the user's to mend; patience is for later.
    Storage(config.storage.model_copy(update={"num_retries": 1})).check_writable()
    storage = Storage(config.storage)
    run_id = new_run_id(storage, config.run_id) if new else config.run_id
    summary = finished_summary(storage, run_id) if only is _Only.RUN else None
    if summary is not None:
        console.print(
            f"run {run_id} is finished; its text and model were not looked at again; --new starts another",
            highlight=False,
        )
    else:
        with _exporter(config, run_id, console) as exporter:
            from services.cluster import StageError
            from services.pipeline import ALL_STAGES, run_stages

            stages: tuple[Stage, ...] = ALL_STAGES if only is _Only.RUN else (only.value,)  # type: ignore[assignment]
            try:
                summary = run_stages(config, run_id, stages, exporter, console)
            except StageError as error:
                _fail(str(error))
    if summary.finished:
        _print_result(storage, run_id, console)
    elif only is _Only.RUN:
        _fail(f"run {run_id} ended without being finished: run the same command again")


@contextmanager
def _exporter(config: RunConfig, run_id: str, console: Console) -> Iterator["Exporter"]:
    """The run's metrics, served from before Ray and torch are imported until the run's end."""
    from services.exporter import Exporter
    from workers.telemetry import RUN_INFO, Telemetry

    host = config.cluster.metrics_host
    with closing(
        Exporter(host, config.cluster.metrics_port, run_id=run_id, silent_seconds=_SILENT_SECONDS)
    ) as exporter:
        telemetry = Telemetry()
        telemetry.set(RUN_INFO, 1, run_id=run_id, dataset_id="")
        exporter.update("controller", telemetry.snapshot())
        console.print(
            f"run {run_id}, root {config.storage.root}, metrics http://{host}:{exporter.port}/metrics",
            highlight=False,
            soft_wrap=True,
        )
        yield exporter


def _print_result(storage: "Storage", run_id: str, console: Console) -> None:
    from services.pages import write_report
    from services.tables import print_report
    from storage import layout

    print_report(write_report(storage, run_id), console)
    console.print(f"report: {storage.url(layout.run_report_page(run_id))}", highlight=False, soft_wrap=True)


def _print_plan(config: RunConfig, console: Console) -> None:
    from services.planner import plan_run
    from workers.models.catalog import is_local

    console.print(f"run {config.run_id}: the configuration is valid; nothing was started", highlight=False)
    if not is_local(config.model.name):
        console.print(f"model {config.model.name} is taken for a hub name, and was not looked up", highlight=False)
    for line in plan_run(config).lines():
        console.print(line, highlight=False)


def _open(root: str | None) -> "Storage":
    from storage.filesystem import Storage

    return Storage(storage_at(root or _DEFAULT_ROOT))


@contextmanager
def _errors_in_a_sentence() -> Iterator[None]:
    """What the user or the storage did wrong is told without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error))


def _print_json(content: Any) -> None:
    json.dump(content, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
