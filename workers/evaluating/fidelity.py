"""Clean, ablated and spliced forward passes over held-out windows -> how much of the model's prediction an SAE keeps.

The clean, zero-ablated and mean-ablated passes are shared by all SAEs. The arithmetic is in `workers.scores.fidelity`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from storage.records import Json
from storage.shards import Flag
from workers.batches import Windows
from workers.models.language_model import LanguageModel
from workers.sae.module import SparseAutoencoder
from workers.scores.fidelity import PredictionAccumulator, recovered


@dataclass(frozen=True)
class Spliced:
    """An SAE and where it is put in."""

    hook: str
    sae: SparseAutoencoder
    mean: torch.Tensor
    """[d_in]: mean activation at the hook, for the mean ablation."""


def token_batches(windows: Windows, batch_sequences: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids int64 and padding bool, each [batch, seq]."""
    for start in range(0, len(windows), batch_sequences):
        some = windows.take(slice(start, start + batch_sequences))
        padding = torch.from_numpy((some.flags & int(Flag.PADDING)) != 0)
        yield torch.from_numpy(some.token_ids.astype(np.int64)), padding
