"""Harvest with the store against the forward pass alone, shard by shard in turn, in one run.

    python -m tests.benchmarks.bench_harvest [--shards 8] [--threads 1] [--json]

Both run as a harvester's process does, with one thread unless told otherwise: the same windows through the same model
at the same hook points. One keeps nothing, the other checks, sums, writes and commits (local disk, fsync). Prints
tokens per second of each, their ratio shard by shard, and the share of processor time stolen meanwhile.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

from services.config import load_config
from services.machine import StealMeter
from services.placement import actor_environment
from storage.arrays import Flag
from storage.filesystem import Storage
from storage.manifest import Dataset
from workers.harvesting.harvest import harvest_shard
from workers.harvesting.tokenise import tokenise
from workers.models.language_model import LanguageModel
from workers.models.tokens import Tokenizer
from workers.texts.sources import identify


def _dataset(storage: Storage, model: LanguageModel, config, shards: int) -> Dataset:
    harvest = config.harvest.model_copy(
        update={"max_rows": shards * storage.config.rows_per_chunk * storage.config.chunks_per_shard}
    )
    steps = tokenise(
        storage,
        Tokenizer.load(config.model),
        model=model.identity,
        text=identify(config.text, "harvest"),
        hooks=dict.fromkeys(harvest.hooks, model.identity.d_model),
        text_config=config.text,
        harvest=harvest,
        rows_per_chunk=storage.config.rows_per_chunk,
        chunks_per_shard=storage.config.chunks_per_shard,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _forward_alone(dataset: Dataset, model: LanguageModel, shard: int, batch: int) -> float:
    tokens = dataset.read_uncommitted_tokens(shard)
    shape = (-1, dataset.record.context_tokens)
    ids = torch.from_numpy(tokens["token_ids"].reshape(shape).astype(np.int64))
    padding = torch.from_numpy((tokens["flags"].reshape(shape) & int(Flag.PADDING)) != 0)
    started = time.perf_counter()
    for start in range(0, len(ids), batch):
        model.activations(ids[start : start + batch], padding[start : start + batch], tuple(dataset.record.hooks))
    return time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    environment = actor_environment(hub_is_needed=False)
    if environment.items() - os.environ.items():  # some of it counts only from a process's start
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], {**os.environ, **environment})
    torch.set_num_threads(options.threads)
    config = load_config("tiny")
    steal = StealMeter()
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(config.storage.model_copy(update={"root": folder}))
        model = LanguageModel(config.model)
        dataset = _dataset(storage, model, config, options.shards + 1)
        rows = dataset.record.rows_per_shard
        alone, stored = [], []
        for shard in range(options.shards + 1):
            alone.append(_forward_alone(dataset, model, shard, config.harvest.batch_sequences))
            started = time.perf_counter()
            harvest_shard(dataset, model, shard, config.harvest, "bench")
            stored.append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(alone[1:], stored[1:], strict=True)]  # the first of each warms up
    result = {
        "definition": "tokens/s with the store over tokens/s of the forward pass alone, same shard, in turn",
        "shards": options.shards,
        "rows_per_shard": rows,
        "threads": options.threads,
        "forward_tokens_per_second": round(rows / statistics.median(alone[1:])),
        "harvest_tokens_per_second": round(rows / statistics.median(stored[1:])),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "steal_share": round(steal.share(), 4),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
