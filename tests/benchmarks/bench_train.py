"""Rows per second of a training step: fast and reference path, alternating, and the encoder product alone.

    python -m tests.benchmarks.bench_train --d-in 256 --d-latent 4096 --k 32 --batch 2048 --num-prefixes 5 --threads 2

A step is everything from raw rows in memory to updated weights. Both trainers start from the same weights and see the
same rows, made of random sparse features. The reference is our own dense formula under autograd in float32, not another
project's code. The encoder product alone, in the fast path's precision, is what no training step that scores every
latent can beat.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from workers.config import SAEConfig, TrainConfig
from workers.sae.kernels.selection import preferred_precision
from workers.sae.trainer import SAETrainer


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition, and what follows from them."""

    seconds: list[float]
    rows: int

    @property
    def median_rows_per_second(self) -> float:
        return self.rows / statistics.median(self.seconds)

    @property
    def best_rows_per_second(self) -> float:
        return self.rows / min(self.seconds)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    batches = feature_batches(args.batch, args.d_in, num_batches=4)
    fast, reference = (make_trainer(args, compute) for compute in ("fast", "reference"))
    low = preferred_precision(torch.device("cpu")).dtype
    x, W_enc = batches[0].to(low), fast.sae.W_enc.detach().to(low)
    product = torch.empty(args.batch, args.d_latent, dtype=low)
    contenders: dict[str, Callable[[int], object]] = {
        "fast": lambda i: fast.step(batches[i % len(batches)]).as_floats(),
        "reference": lambda i: reference.step(batches[i % len(batches)]).as_floats(),
        "encoder_product": lambda i: torch.mm(x, W_enc.T, out=product),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(args.steps + 1):  # the first of each, which allocates, is not counted
        for name, run in contenders.items():
            start = time.perf_counter()
            run(i)
            seconds[name].append(time.perf_counter() - start)
    report(args, {name: Timing(values[1:], args.batch) for name, values in seconds.items()})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "d-in": 256, "d-latent": 4096, "k": 32, "batch": 2048, "num-prefixes": 5, "steps": 10, "threads": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args()


def feature_batches(batch: int, d_in: int, num_batches: int) -> list[Tensor]:
    """Rows made of 16 of 4 * d_in random directions each, with exponential strengths, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    batches = []
    for _ in range(num_batches):
        features = torch.randint(0, len(directions), (batch, 16), generator=generator)
        strengths = torch.empty(batch, 16).exponential_(generator=generator)
        noise = 0.05 * torch.randn(batch, d_in, generator=generator)
        batches.append((strengths[..., None] * directions[features]).sum(1) + noise)
    return batches


def make_trainer(args: argparse.Namespace, compute: str) -> SAETrainer:
    n = args.num_prefixes
    widths = tuple(args.d_latent >> shift for shift in reversed(range(n)))
    nesting = {"nesting": "fixed", "widths": widths} if n > 1 else {"nesting": "none"}
    config = SAEConfig.model_validate(
        {"name": "bench", "hook": "none", "d_latent": args.d_latent, "k": args.k, **nesting}
    )
    rows = args.batch * (args.steps + 1)
    train = TrainConfig.model_validate({"rows": rows, "batch_rows": args.batch, "compute": compute})
    return SAETrainer(config, train, args.d_in, torch.zeros(args.d_in), (args.d_in / 32) ** 0.5, "cpu")


def report(args: argparse.Namespace, timings: dict[str, Timing]) -> None:
    ratio = timings["fast"].median_rows_per_second / timings["reference"].median_rows_per_second
    if args.json:
        results = {
            name: asdict(timing)
            | {
                "median_rows_per_second": timing.median_rows_per_second,
                "best_rows_per_second": timing.best_rows_per_second,
            }
            for name, timing in timings.items()
        }
        print(json.dumps({"definition": __doc__, "arguments": vars(args), "results": results, "median_ratio": ratio}))
        return
    print(__doc__)
    print(", ".join(f"{name} = {value}" for name, value in vars(args).items() if name != "json"))
    for name, timing in timings.items():
        print(
            f"{name:16s} rows/s: median {timing.median_rows_per_second:9,.0f}, "
            f"best {timing.best_rows_per_second:9,.0f}; ms: {' '.join(f'{1000 * s:.1f}' for s in timing.seconds)}"
        )
    print(f"fast / reference, medians: {ratio:.1f}")


if __name__ == "__main__":
    main()
