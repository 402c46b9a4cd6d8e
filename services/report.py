"""A run as one JSON document for other programs, and as one self-contained HTML page for people.

Puts together what the records say; computes no score, reads no storage and writes no file. Called by services/pages.py.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from services import report_views as views
from services.report_figures import sae_lines, score_figures, training_figures
from services.report_keys import DEFINITIONS, NOT_EVALUATED, SCORES, TRAJECTORY
from storage import layout
from storage.records import CheckpointRecord, DatasetRecord, Json, MetricsReport, RunRecord, RunSummary

_TEMPLATES = Path(__file__).parent / "templates"


def build_report(
    run: RunRecord,
    summary: RunSummary,
    dataset: DatasetRecord,
    checkpoints: Sequence[CheckpointRecord],
    reports: Sequence[MetricsReport],
    histories: Mapping[str, Sequence[Json]],
    root_url: str,
) -> Json:
    """The run as JSON: per SAE the scores of its newest evaluated checkpoint, with definitions and sample sizes.

    A score that was omitted is null, with the reason under the SAE's `omitted`; no number is NaN. SAEs keep the
    order of the configuration. `baselines` are those of the first evaluated SAE; each has its own beside its scores.
    """
    evaluated = {(report.name, report.step): report for report in reports}
    published = {checkpoint.name for checkpoint in checkpoints}
    saes, samples, definitions = [], {}, dict(DEFINITIONS)
    for name in (sae["name"] for sae in run.config["saes"] if sae["name"] in published):
        own = sorted((c for c in checkpoints if c.name == name), key=lambda c: c.step)
        scored = [c for c in own if (name, c.step) in evaluated]
        newest = (scored or own)[-1]
        metrics = evaluated.get((name, newest.step))
        history = list(histories.get(name, ()))
        saes.append(
            _sae(newest, metrics, history, root_url)
            | {"trajectory": [_milestone(c, evaluated[name, c.step]) for c in scored[:-1]]}
        )
        samples[name] = _samples(newest, metrics)
        definitions |= metrics.metrics["definitions"] if metrics else {}
    first = next((sae for sae in saes if sae["baselines"]["dense_probe"] is not None), saes[0] if saes else None)
    report = {
        "run": run.run_id,
        "recipe": run.recipe,
        "finished": summary.finished,
        "dataset": _dataset(dataset),
        "saes": saes,
        "baselines": first["baselines"] if first else None,
        "stages": summary.seconds,
        "steal_share": summary.steal_share,
        "restarts": summary.restarts,
        "definitions": definitions,
        "samples": samples,
        "config": run.config,
    }
    clean: Json = _tidy(report)
    return clean


def render_page(report: Json, reports: Sequence[MetricsReport], histories: Mapping[str, Sequence[Json]]) -> str:
    """The report as one HTML page that asks nothing of the network.

    Its policy lets no script run but its own, named by hash: text from documents is escaped, and would be inert if it
    were not.
    """
    newest = views.newest_reports(report, reports)
    figures = {
        "training": training_figures(report, histories),
        "scores": score_figures(report, {name: metrics.metrics["firing"] for name, metrics in newest.items()}),
    }
    scripts = [get_plotlyjs(), (_TEMPLATES / "report.js").read_text("utf-8")]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= views.FILTERS
    return environment.get_template("report.html").render(
        report=report,
        lines=sae_lines(report),
        headline=views.headline(report),
        trajectory=views.trajectory_table(report),
        concepts=views.concept_table(report, newest),
        left_out=views.left_out(newest),
        samples=views.sample_groups(report),
        latents={name: metrics.metrics["latents"] for name, metrics in newest.items() if metrics.metrics["latents"]},
        omitted=views.omitted_sentences(report),
        warnings=views.erasure_warnings(newest),
        evaluation=next(iter(newest.values()), None),
        figures=figures,
        plots={figure.name: figure.plot for group in figures.values() for figure in group},
        scripts=scripts,
        policy=_policy(scripts),
    )


def _sae(checkpoint: CheckpointRecord, metrics: MetricsReport | None, history: list[Json], root_url: str) -> Json:
    found = metrics.metrics if metrics else NOT_EVALUATED
    folder = layout.checkpoint(checkpoint.run_id, checkpoint.name, checkpoint.step)
    picked = {key: _pick(found, path) for key, path in SCORES.items()}
    return {
        "name": checkpoint.name,
        "variant": checkpoint.variant,
        "hook": checkpoint.hook,
        "d_in": checkpoint.d_in,
        "d_latent": checkpoint.d_latent,
        "k": checkpoint.sae["k"],
        "checkpoint": f"{root_url.rstrip('/')}/{folder}",
        "checkpoint_digest": checkpoint.digest(),
        "step": checkpoint.step,
        "rows_trained": checkpoint.rows_trained,
        **{key: value for key, (value, _) in picked.items()},
        "omitted": {key: sentence for key, (_, sentence) in picked.items() if sentence},
        "training": history[-1] if history else checkpoint.train_metrics,
        "baselines": {
            "residual_stream": {
                "sparse_probing": _pick(found, ("probing", "mean", "residual"))[0],
                "tpp": _pick(found, ("erasure", "residual_tpp"))[0],
            },
            "dense_probe": _pick(found, ("probing", "mean", "dense"))[0],
            "random_directions": {"sparse_probing": _pick(found, ("probing", "mean", "control"))[0]},
        },
    }


def _milestone(checkpoint: CheckpointRecord, metrics: MetricsReport) -> Json:
    scores = {key: _pick(metrics.metrics, SCORES[key])[0] for key in TRAJECTORY}
    return {"step": checkpoint.step, "rows_trained": checkpoint.rows_trained, **scores}


def _pick(metrics: Json, path: tuple[str, ...]) -> tuple[Any, str | None]:
    """The value at `path`, or None and the sentence of the section that says it was omitted."""
    value: Any = metrics
    for part in path:
        value = value[part]
        if isinstance(value, dict) and "omitted" in value:
            return None, value["omitted"]
    return value, None


def _samples(checkpoint: CheckpointRecord, metrics: MetricsReport | None) -> Json:
    """How many tokens, documents, examples and draws stand behind one SAE's scores; null for what was omitted."""
    seeds = {"sae": checkpoint.sae["seed"], "train": checkpoint.train["seed"]}
    if metrics is None:
        return {"fidelity": None, "firing": None, "probing": None, "erasure": None, "seeds": seeds}
    found = metrics.metrics
    probing, erasure = found["probing"], found["erasure"]
    examples = {
        name: {"num_fit": c["num_fit"], "num_test": c["num_test"]} for name, c in probing.get("concepts", {}).items()
    }
    return {
        "fidelity": {"num_tokens": metrics.num_tokens, "num_documents": found["fidelity"].get("num_documents")},
        "firing": {"num_rows": found["firing"]["num_rows"]},
        "probing": None
        if "omitted" in probing
        else {"num_concepts": len(examples), "num_controls": probing["num_controls"], "concepts": examples},
        "erasure": None
        if "omitted" in erasure
        else {"num_concepts": erasure["num_concepts"], "num_examples": erasure["num_examples"]},
        "seeds": {**seeds, "evaluate": metrics.evaluate["seed"]},
    }


def _dataset(dataset: DatasetRecord) -> Json:
    return {
        "id": dataset.dataset_id,
        "digest": dataset.digest(),
        "rows": dataset.num_rows,
        "documents": dataset.num_documents,
        "hooks": dataset.hooks,
        "context_tokens": dataset.context_tokens,
        "packing": dataset.packing,
        "dtype": dataset.dtype,
        "model": dataset.model.model_dump(mode="json", exclude={"schema_version"}),
        "text": dataset.text.model_dump(mode="json", exclude={"schema_version"}),
    }


def _tidy(value: Any) -> Any:
    """The same JSON with null where a number is NaN or infinite, which JSON cannot say, and numbers as keys in order.

    Records are stored with their keys sorted as text: "1920" before "384".
    """
    if isinstance(value, Mapping):
        numbered = bool(value) and all(str(key).isdecimal() for key in value)
        keys = sorted(value, key=int) if numbered else list(value)
        return {key: _tidy(value[key]) for key in keys}
    if isinstance(value, list | tuple):
        return [_tidy(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that allows these scripts, inline styles, and no request of any kind."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {hashes}"
