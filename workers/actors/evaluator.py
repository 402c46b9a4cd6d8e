"""The evaluator as a Ray actor: scores published checkpoints. A shell around `workers.evaluating`."""

from collections.abc import Iterator

import ray

from storage import reports
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.records import MetricsReport
from workers.actors.shell import Reply, Shell
from workers.config import EvalConfig, HarvestConfig, ModelConfig, TextConfig
from workers.evaluating.evaluate import CheckpointEvaluator, CheckpointKey
from workers.telemetry import EVAL_CE_RECOVERED, EVAL_FVU


class _Evaluator(Shell):
    def __init__(
        self,
        slot: str,
        storage: StorageConfig,
        model: ModelConfig,
        text: TextConfig,
        harvest: HarvestConfig,
        evaluate: EvalConfig,
        prefixes: tuple[int, ...],
        num_threads: int,
    ) -> None:
        super().__init__(slot, Storage(storage), num_threads)
        self.evaluator = CheckpointEvaluator(self.storage, model, text, harvest, evaluate, prefixes)

    def evaluate(self, run_id: str, wanted: tuple[CheckpointKey, ...]) -> Iterator[Reply[MetricsReport]]:
        """Score checkpoints and write each one's report; yields them as they are done."""
        for report in self.evaluator.evaluate(run_id, wanted):
            reports.write_report(self.storage, report)
            recovered = report.metrics["fidelity"].get("ce_recovered")
            if isinstance(recovered, float):
                self.telemetry.set(EVAL_CE_RECOVERED, recovered, sae=report.name)
            for prefix, fvu in report.metrics["fvu"].items():
                self.telemetry.set(EVAL_FVU, fvu, sae=report.name, prefix=prefix)
            yield self.reply(report)


Evaluator = ray.remote(_Evaluator)
