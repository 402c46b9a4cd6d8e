"""Second half of a harvest: tokens of a shard -> forward passes -> activations at every hook -> one commit.

The loop as a plain function; `workers.actors.harvester` runs it on a cluster. Batches are fixed by the dataset, so that
a retry computes the same.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from storage.arrays import Flag
from storage.manifest import Dataset
from storage.records import ShardCommit
from storage.shards import write_shard
from workers.config import HarvestConfig
from workers.models.language_model import LanguageModel


@dataclass(frozen=True)
class HarvestedShard:
    """What harvesting one shard came to."""

    commit: ShardCommit
    forward_seconds: float
    write_seconds: float


def harvest_shard(
    dataset: Dataset, model: LanguageModel, shard: int, harvest: HarvestConfig, writer: str
) -> HarvestedShard:
    """Compute and commit the activations of one shard; a shard that is committed already is returned as it is."""
    started = time.perf_counter()
    earlier = dataset.stored_commit(shard)
    if earlier is not None:
        return HarvestedShard(earlier, 0.0, 0.0)
    record = dataset.record
    tokens = dataset.read_uncommitted_tokens(shard)
    hooks = tuple(record.hooks)
    shape = (-1, record.context_tokens)
    token_ids = torch.from_numpy(tokens["token_ids"].reshape(shape).astype(np.int64))
    padding = torch.from_numpy((tokens["flags"].reshape(shape) & int(Flag.PADDING)) != 0)
    parts: dict[str, list[npt.NDArray[np.generic]]] = {hook: [] for hook in hooks}
    for start in range(0, len(token_ids), harvest.batch_sequences):
        batch = slice(start, start + harvest.batch_sequences)
        for hook, activation in model.activations(token_ids[batch], padding[batch], hooks).items():
            parts[hook].append(to_stored(activation.flatten(0, 1), record.dtype))
    forward_seconds = time.perf_counter() - started
    commit = write_shard(dataset, shard, {hook: np.concatenate(part) for hook, part in parts.items()}, writer)
    return HarvestedShard(commit, forward_seconds, time.perf_counter() - started - forward_seconds)


def to_stored(activation: torch.Tensor, dtype: str) -> npt.NDArray[np.generic]:
    """[rows, d] -> its stored form: float32, or the bits of bfloat16 as uint16."""
    host = activation.to(device="cpu", dtype=getattr(torch, dtype)).contiguous()
    return np.asarray(host.view(torch.uint16).numpy() if dtype == "bfloat16" else host.numpy())
