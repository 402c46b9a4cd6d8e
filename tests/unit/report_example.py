"""A complete run of plausible numbers for the tests of the report: three SAEs, two checkpoints each, hostile tokens.

The numbers come from a seeded generator; nothing here is a measurement.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.records import (
    CheckpointRecord,
    DatasetRecord,
    Json,
    MetricsReport,
    ModelIdentity,
    RunRecord,
    RunSummary,
    TextIdentity,
)

SAES = {
    "matryoshka": "matryoshka_batch_topk",
    "matryoshka-random": "matryoshka_batch_topk_random_prefixes",
    "batch-topk": "batch_topk",
}
WIDTHS = (128, 384, 896, 1920, 4096)
HOSTILE = "</script><script>alert(1)</script>"
CONCEPTS = {
    "string": None,
    "docstring": "string",
    "f-string": "string",
    "comment": None,
    "licence comment": "comment",
    "name": None,
    "function name": "name",
    "class name": "name",
    "parameter": "name",
    "keyword": None,
    "control flow": "keyword",
    "import": "keyword",
    "number": None,
}
_HOOK = "blocks.2.hook_resid_post"
_STEPS = (610, 1220)
_WORDS = [
    "def",
    " self",
    "(",
    "value",
    ",",
    " key",
    "=",
    "None",
    ")",
    ":",
    "\n",
    "    ",
    "return",
    " open",
    "('<b>",
    "')",
    HOSTILE,
]


@dataclass(frozen=True)
class Example:
    """The arguments of `build_report`."""

    run: RunRecord
    summary: RunSummary
    dataset: DatasetRecord
    checkpoints: list[CheckpointRecord]
    reports: list[MetricsReport]
    histories: dict[str, list[Json]]
    root_url: str = "file:///data/dollhouse"

    def arguments(self) -> dict[str, Any]:
        """By name, as `build_report` takes them."""
        return vars(self)


def example(**changed_metrics: Any) -> Example:
    """The run; `changed_metrics` replace sections of every checkpoint's metrics."""
    model = ModelIdentity(name="tiny", fingerprint="5f" * 32, num_layers=4, d_model=128, dtype="float32", causal=True)
    text = TextIdentity(
        source="stdlib", fingerprint="a1" * 32, description="Python 3.11.2 standard library, train split, 812 documents"
    )
    dataset = DatasetRecord(
        dataset_id="tiny-1f0c9d2b",
        model=model,
        text=text,
        hooks={"blocks.1.hook_resid_post": 128, _HOOK: 128},
        context_tokens=128,
        packing="document",
        dtype="bfloat16",
        num_rows=3_145_728,
        num_documents=812,
        rows_per_chunk=8192,
        chunks_per_shard=8,
    )
    generator = np.random.default_rng(0)
    checkpoints = [_checkpoint(name, step, dataset) for name in SAES for step in _STEPS]
    return Example(
        run=RunRecord(run_id="tiny-3f9a0c1d2e4b", recipe="tiny", config=_config()),
        summary=RunSummary(
            run_id="tiny-3f9a0c1d2e4b",
            dataset_id=dataset.dataset_id,
            steal_share=0.0123,
            restarts=0,
            finished=True,
            seconds={"harvest": 64.2, "train": 187.9, "evaluate": 71.5},
        ),
        dataset=dataset,
        checkpoints=checkpoints,
        reports=[_report(checkpoint, generator, changed_metrics) for checkpoint in checkpoints],
        histories={name: _history(generator) for name in SAES},
    )


def _config() -> Json:
    return {
        "recipe": "tiny",
        "train": {"rows": 2_500_000, "batch_rows": 2048, "dead_after_rows": 250_000},
        "saes": [{"name": name, "hook": _HOOK, "d_latent": 4096, "k": 32} for name in SAES],
    }


def _checkpoint(name: str, step: int, dataset: DatasetRecord) -> CheckpointRecord:
    return CheckpointRecord(
        run_id="tiny-3f9a0c1d2e4b",
        name=name,
        step=step,
        rows_trained=step * 2048,
        dataset_id=dataset.dataset_id,
        dataset_digest=dataset.digest(),
        manifest_digest="0" * 64,
        hook=_HOOK,
        model=dataset.model,
        sae={"name": name, "d_latent": WIDTHS[-1], "k": 32, "seed": 0},
        train={"rows": 2_500_000, "seed": 0},
        variant=SAES[name],
        d_in=128,
        d_latent=WIDTHS[-1],
        threshold=0.31,
        scale=0.7,
        train_metrics={"loss": 0.2, "fvu": 0.2, "l0": 32.0, "dead_share": 0.02},
        tensors_sha256="0" * 64,
    )


def _report(checkpoint: CheckpointRecord, generator: np.random.Generator, changed: Json) -> MetricsReport:
    nested = checkpoint.variant != "batch_topk"
    noise = float(generator.normal(0, 0.004)) + (0.0 if checkpoint.step == _STEPS[-1] else 0.03)
    fvu = {str(w): round(f + noise, 4) for w, f in zip(WIDTHS, (0.52, 0.37, 0.28, 0.22, 0.18), strict=True)}
    if not nested:
        fvu = {str(w): round(f + noise, 4) for w, f in zip(WIDTHS, (0.93, 0.84, 0.68, 0.46, 0.165), strict=True)}
    edges = np.linspace(-5, 0, 21)
    rates = generator.normal(-2.6 if nested else -2.3, 0.7 if nested else 0.45, 4050)
    metrics = {
        "fidelity": {
            "ce_clean": 1.913,
            "ce_sae": 2.204,
            "ce_zero": 7.842,
            "ce_mean": 6.02,
            "ce_recovered": 0.951 - noise,
            "ce_recovered_mean_ablation": 0.929 - noise,
            "kl_sae": 0.27,
            "kl_zero": 5.8,
            "kl_recovered": 0.953 - noise,
            "num_tokens": 31_912,
            "num_documents": 143,
        },
        "fvu": fvu,
        "l0": 31.2 + noise * 10,
        "dead_share": 0.011 if nested else 0.034,
        "firing": {"bin_edges": edges.tolist(), "counts": np.histogram(rates, edges)[0].tolist(), "num_rows": 31_912},
        "geometry": {"mean_max_decoder_cosine": 0.41 if nested else 0.47, "mean_encoder_decoder_cosine": 0.63},
        "probing": _probing(generator, 0.02 if nested else -0.01),
        "erasure": _erasure(generator, 0.03 if nested else 0.0),
        "latents": _latents(generator, WIDTHS if nested else WIDTHS[-1:]),
        "definitions": _definitions(),
    }
    return MetricsReport(
        run_id=checkpoint.run_id,
        name=checkpoint.name,
        step=checkpoint.step,
        checkpoint_digest=checkpoint.digest(),
        text=TextIdentity(
            source="stdlib",
            fingerprint="b2" * 32,
            description="Python 3.11.2 standard library, held-out, 143 documents",
        ),
        evaluate={"seed": 0},
        metrics={**metrics, **changed},
        num_tokens=31_912,
        seconds=23.4,
    )


def _probing(generator: np.random.Generator, gain: float) -> Json:
    concepts = {}
    for index, (name, parent) in enumerate(CONCEPTS.items()):
        base = 0.72 + 0.02 * (index % 5) + gain + float(generator.normal(0, 0.02))
        sparse = {"1": base, "2": base + 0.05, "5": base + 0.11}
        concepts[name] = {
            "parent": parent,
            "dense": 0.985 - 0.005 * (index % 4),
            "num_fit": 2000,
            "num_test": 1000 - 60 * (index % 3),
            "sparse": sparse,
            "residual": {"1": 0.66, "2": 0.71, "5": 0.79},
            "control": {"1": 0.61, "2": 0.66, "5": 0.74},
            "latents": [11, 402, 77, 1290, 3001],
        }
    mean = {k: float(np.mean([content["sparse"][k] for content in concepts.values()])) for k in ("1", "2", "5")}
    return {
        "concepts": concepts,
        "mean": {
            "dense": 0.978,
            "sparse": mean,
            "residual": {"1": 0.66, "2": 0.71, "5": 0.79},
            "control": {"1": 0.61, "2": 0.66, "5": 0.74},
        },
        "left_out": {"async keyword": "31 positive tokens in the test split, fewer than min_examples = 100"},
        "num_controls": 10,
    }


def _erasure(generator: np.random.Generator, gain: float) -> Json:
    tpp = {
        n: round(t + gain + float(generator.normal(0, 0.004)), 4)
        for n, t in zip(("2", "5", "10", "20"), (0.05, 0.11, 0.17, 0.22), strict=True)
    }
    return {
        "tpp": tpp,
        "intended": {n: t + 0.02 for n, t in tpp.items()},
        "unintended": dict.fromkeys(tpp, 0.02),
        "residual_tpp": {"2": 0.01, "5": 0.03, "10": 0.05, "20": 0.09},
        "concepts": {name: {n: t - 0.002 * i for n, t in tpp.items()} for i, name in enumerate(CONCEPTS)},
        "num_concepts": len(CONCEPTS),
        "num_examples": 12_400,
        "warning": "Concepts overlap: erasing a parent's latents also lowers its children's probes.",
    }


def _latents(generator: np.random.Generator, widths: tuple[int, ...]) -> list[Json]:
    described = []
    for width in widths:
        for place in range(4):
            peak = round(float(generator.uniform(3, 30)), 3)
            contexts = [_context(generator, peak * 0.93**rank) for rank in range(4)]
            described.append(
                {
                    "latent": width - 1 - 7 * place,
                    "prefix_group": width,
                    "firing_rate": 0.0004 * 3**place,
                    "max_activation": peak,
                    "contexts": contexts,
                }
            )
    return described


def _context(generator: np.random.Generator, peak: float) -> Json:
    tokens = [_WORDS[index] for index in generator.integers(0, len(_WORDS), 14)]
    values = (generator.uniform(0, peak, 14) * (generator.uniform(size=14) < 0.25)).round(3).tolist()
    values[8] = round(peak, 3)
    return {"document": "email/<policy>.py", "tokens": tokens, "values": values, "peak": 8}


def _history(generator: np.random.Generator) -> list[Json]:
    steps = np.unique(np.linspace(1, _STEPS[-1], 200).astype(int))
    decay = 0.17 + 0.9 * np.exp(-steps / 90) + generator.normal(0, 0.004, len(steps))
    return [
        {
            "step": int(step),
            "rows": int(step) * 2048,
            "loss": float(value) * 1.3,
            "fvu": float(value),
            "l0": 32.0,
            "dead_share": float(max(0.0, 0.03 - 0.4 / step)),
        }
        for step, value in zip(steps, decay, strict=True)
    ]


def _definitions() -> Json:
    return {
        "l0": "Mean number of non-zero latents per held-out token.",
        "fvu": "Squared error over the variance about the mean, pooled over tokens, with the first p latents.",
        "ce_recovered": "(CE_zero - CE_sae) / (CE_zero - CE_clean), pooled over tokens.",
        "tpp": "Drop of the target concept's probe accuracy less the mean drop of the others'.",
    }
