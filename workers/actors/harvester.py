"""The harvester as a Ray actor: tokenises a dataset, harvests shards. A shell around `workers.harvesting`."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import cast

import ray
import torch

from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from workers.actors.shell import Reply, Shell
from workers.config import HarvestConfig, ModelConfig, TextConfig
from workers.harvesting.harvest import HarvestedShard, harvest_shard
from workers.harvesting.tokenise import dataset_id, tokenise
from workers.models.language_model import LanguageModel
from workers.models.tokens import Tokenizer
from workers.telemetry import FORWARD_SECONDS_TOTAL, HARVEST_TOKENS_TOTAL
from workers.texts.sources import check_held_out, identify


@dataclass(frozen=True)
class Prepared:
    """Progress of tokenising: rows so far, and the dataset's id once it is complete."""

    num_rows: int
    dataset_id: str | None = None


class _Harvester(Shell):
    def __init__(
        self,
        slot: str,
        storage: StorageConfig,
        model: ModelConfig,
        text: TextConfig,
        harvest: HarvestConfig,
        num_threads: int,
    ) -> None:
        super().__init__(slot, Storage(storage), num_threads)
        self.storage_config, self.text, self.harvest_config = storage, text, harvest
        self.model_config = model
        self.model = LanguageModel(model)
        self.model.check_hooks(harvest.hooks)
        self.dataset: Dataset | None = None

    def prepare(self) -> Iterator[Reply[Prepared]]:
        """Find the dataset, or write its tokens and record; yields progress, the last one with the id."""
        identity = identify(self.text, "harvest")
        hooks = self._widths()
        layout = {
            "rows_per_chunk": self.storage_config.rows_per_chunk,
            "chunks_per_shard": self.storage_config.chunks_per_shard,
        }
        name = dataset_id(self.model.identity, identity, hooks, self.harvest_config, **layout)
        found = Dataset.find(self.storage, name)
        if found is None:
            check_held_out(self.text)
            steps = tokenise(
                self.storage,
                Tokenizer.load(self.model_config),
                model=self.model.identity,
                text=identity,
                hooks=hooks,
                text_config=self.text,
                harvest=self.harvest_config,
                **layout,
            )
            found = yield from self._narrated(steps)
        yield self.reply(Prepared(found.record.num_rows, name))

    def _narrated(self, steps: Generator[int, None, Dataset]) -> Generator[Reply[Prepared], None, Dataset]:
        while True:
            try:
                rows = next(steps)
            except StopIteration as end:
                return cast(Dataset, end.value)
            yield self.reply(Prepared(rows))

    def _widths(self) -> dict[str, int]:
        """Width of each hook, from a forward pass over one short window."""
        tokens = torch.zeros((1, 2), dtype=torch.int64)
        out = self.model.activations(tokens, torch.zeros_like(tokens, dtype=torch.bool), self.harvest_config.hooks)
        for hook, activation in out.items():
            if activation.ndim != 3:
                raise ValueError(
                    f"harvest.hooks: {hook} has shape {tuple(activation.shape)}, not [batch, seq, d]: "
                    "choose a hook of one vector a token"
                )
        return {hook: activation.shape[-1] for hook, activation in out.items()}

    def harvest(self, dataset: str, shard: int) -> Reply[HarvestedShard]:
        """Compute and commit one shard."""
        if self.dataset is None or self.dataset.record.dataset_id != dataset:
            self.dataset = Dataset.open(self.storage, dataset)
        result = harvest_shard(self.dataset, self.model, shard, self.harvest_config, self.writer)
        self.telemetry.count(HARVEST_TOKENS_TOTAL, result.commit.num_rows)
        self.telemetry.count(FORWARD_SECONDS_TOTAL, result.forward_seconds)
        return self.reply(result)


Harvester = ray.remote(_Harvester)
