"""The report's JSON: complete, traceable, free of NaN, and honest about what was omitted."""

import json
from dataclasses import replace
from typing import Any

import pytest

from services.pages import write_report
from services.report import build_report
from storage import layout, reports
from storage.checkpoints import publish
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import Json, RunDataset
from tests.unit.report_example import SAES, Example, example


def _report(run: Example) -> Json:
    return build_report(**run.arguments())


def test_every_sae_has_its_scores_and_every_number_a_definition() -> None:
    report = _report(example())
    assert [row["name"] for row in report["saes"]] == list(SAES)
    row = report["saes"][0]
    assert set(row["sparse_probing"]) == {"1", "2", "5"}
    assert set(row["tpp"]) == {"2", "5", "10", "20"}
    assert set(row["fvu"]) == {"128", "384", "896", "1920", "4096"}
    assert row["omitted"] == {}
    documented = {
        "l0",
        "fvu",
        "ce_recovered",
        "ce_clean",
        "kl_zero",
        "tpp",
        "rows_trained",
        "steal_share",
        "dense_probe",
    }
    assert documented <= set(report["definitions"])


def test_the_newest_evaluated_checkpoint_stands_for_the_sae() -> None:
    run = example()
    unscored = replace(run, reports=[report for report in run.reports if report.step == 610])
    assert [(row["step"], row["trajectory"]) for row in _report(unscored)["saes"]] == [(610, [])] * 3
    row = _report(run)["saes"][0]
    assert row["step"] == 1220
    assert row["rows_trained"] == 1220 * 2048
    assert row["checkpoint"] == f"{run.root_url}/{layout.checkpoint(run.run.run_id, 'matryoshka', 1220)}"
    assert row["checkpoint_digest"] == run.checkpoints[1].digest()
    assert [milestone["step"] for milestone in row["trajectory"]] == [610]
    assert row["trajectory"][0]["fvu"] == run.reports[0].metrics["fvu"]


def test_scores_of_an_encoder_are_null_with_the_reason() -> None:
    sentence = "The model is an encoder: it predicts no next token."
    row = _report(example(fidelity={"omitted": sentence}))["saes"][0]
    assert row["ce_recovered"] is None
    assert row["kl_recovered"] is None
    assert row["omitted"]["ce_recovered"] == sentence
    assert row["sparse_probing"] is not None


def test_omitted_probing_and_erasure_leave_no_baselines() -> None:
    report = _report(example(probing={"omitted": "No labels."}, erasure={"omitted": "No probes."}))
    assert report["saes"][0]["omitted"]["sparse_probing"] == "No labels."
    assert report["saes"][0]["omitted"]["tpp"] == "No probes."
    assert report["baselines"]["residual_stream"] == {"sparse_probing": None, "tpp": None}
    assert report["baselines"]["dense_probe"] is None
    assert report["samples"]["matryoshka"]["probing"] is None


def test_an_sae_without_scores_is_listed_and_says_so() -> None:
    report = _report(replace(example(), reports=[]))
    assert [row["l0"] for row in report["saes"]] == [None] * 3
    assert "evaluated" in report["saes"][0]["omitted"]["l0"]


def test_samples_and_seeds_stand_beside_the_scores() -> None:
    samples = _report(example())["samples"]["batch-topk"]
    assert samples["fidelity"] == {"num_tokens": 31_912, "num_documents": 143}
    assert samples["probing"]["num_controls"] == 10
    assert samples["probing"]["concepts"]["string"] == {"num_fit": 2000, "num_test": 1000}
    assert samples["erasure"] == {"num_concepts": 13, "num_examples": 12_400}
    assert samples["seeds"] == {"sae": 0, "train": 0, "evaluate": 0}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_cannot_say_become_null(number: float) -> None:
    report = _report(example(l0=number, fvu={"128": number, "4096": 0.2}))
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["saes"][0]["l0"] is None
    assert report["saes"][0]["fvu"] == {"128": None, "4096": 0.2}


def test_a_stored_run_becomes_a_report_and_a_page(tmp_path: Any) -> None:
    storage, run = Storage(StorageConfig(root=str(tmp_path))), example()
    Dataset.create(storage, run.dataset)
    reports.write_run(storage, run.run, "")
    with pytest.raises(ValueError, match="no published checkpoint yet"):
        write_report(storage, run.run.run_id)
    reports.write_run_dataset(storage, RunDataset(run_id=run.run.run_id, dataset_id=run.dataset.dataset_id))
    for checkpoint, metrics in zip(run.checkpoints, run.reports, strict=True):
        publish(storage, checkpoint.model_copy(update={"tensors_sha256": ""}), {})
        reports.write_report(storage, metrics)
        reports.write_history(storage, run.run.run_id, checkpoint.name, run.histories[checkpoint.name])
    reports.write_summary(storage, run.summary)

    report = write_report(storage, run.run.run_id)
    assert report == reports.read_page_numbers(storage, run.run.run_id)
    assert [row["name"] for row in report["saes"]] == list(SAES)
    assert report["saes"][0]["checkpoint"].startswith(str(tmp_path))
    assert (tmp_path / layout.run_report_page(run.run.run_id)).read_text("utf-8").startswith("<!doctype html>")
