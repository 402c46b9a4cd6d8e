"""Clean, ablated and spliced forward passes over held-out windows -> how much of the model's prediction an SAE keeps.

The clean, zero-ablated and mean-ablated passes are shared by all SAEs. The arithmetic is in `workers.scores.fidelity`.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from storage.arrays import Flag
from storage.records import Json
from workers.batches import Windows
from workers.models.language_model import LanguageModel, Splice
from workers.sae.module import SparseAutoencoder
from workers.scores.fidelity import PredictionAccumulator, log_probabilities, recovered

K = TypeVar("K", bound=Hashable)


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


@dataclass
class _Passes:
    """Accumulators of one SAE's ablations and of its spliced pass."""

    zero: PredictionAccumulator
    mean: PredictionAccumulator
    spliced: PredictionAccumulator


def measure_fidelity(
    model: LanguageModel, windows: Windows, saes: Mapping[K, Spliced], batch_sequences: int
) -> dict[K, Json]:
    """Cross-entropy and KL of each SAE's spliced pass between the clean and the ablated ones; see `definitions`."""
    clean = PredictionAccumulator()
    ablations = {hook: (PredictionAccumulator(), PredictionAccumulator()) for hook in {s.hook for s in saes.values()}}
    passes = {name: _Passes(*ablations[entry.hook], PredictionAccumulator()) for name, entry in saes.items()}
    means = {entry.hook: entry.mean for entry in saes.values()}
    usable = torch.from_numpy(windows.usable).to(model.device)
    for index, (tokens, padding) in enumerate(token_batches(windows, batch_sequences)):
        context = usable[index * batch_sequences :][: len(tokens)]
        on_device, target = tokens.to(model.device), ~padding.to(model.device)
        reference = log_probabilities(model.logits(tokens, padding))

        def add(
            accumulator: PredictionAccumulator,
            hook: str | None = None,
            splice: Splice | None = None,
            *,
            tokens: torch.Tensor = tokens,
            padding: torch.Tensor = padding,
            reference: torch.Tensor = reference,
            masks: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (on_device, context, target),
        ) -> None:
            patched = log_probabilities(model.logits(tokens, padding, hook, splice)) if hook else reference
            accumulator.add(patched, reference, *masks)

        add(clean)
        for hook, (zero, mean) in ablations.items():
            add(zero, hook, torch.zeros_like)
            add(mean, hook, _replace(context, means[hook].to(model.device)))
        for name, entry in saes.items():
            add(passes[name].spliced, entry.hook, _replace(context, entry.sae))
    return {name: _describe(clean, entry, windows) for name, entry in passes.items()}


def _replace(where: torch.Tensor, value: torch.Tensor | SparseAutoencoder) -> Splice:
    """A splice that changes usable positions only: to a constant, or to an SAE's reconstruction."""

    def splice(activation: torch.Tensor) -> torch.Tensor:
        rows = activation[where].float()
        new = value.decode_sparse(value.encode_sparse(rows)) if isinstance(value, SparseAutoencoder) else value
        out = activation.clone()
        out[where] = torch.as_tensor(new).to(activation.dtype).expand_as(rows)
        return out

    return splice


def _describe(clean: PredictionAccumulator, passes: _Passes, windows: Windows) -> Json:
    from_zero = _shares(clean, passes.zero, passes.spliced)
    from_mean = _shares(clean, passes.mean, passes.spliced)
    return {
        "ce_clean": clean.cross_entropy_nats,
        "ce_sae": passes.spliced.cross_entropy_nats,
        "ce_zero": passes.zero.cross_entropy_nats,
        "ce_mean": passes.mean.cross_entropy_nats,
        "ce_recovered": from_zero["cross_entropy"],
        "ce_recovered_mean_ablation": from_mean["cross_entropy"],
        "kl_sae": passes.spliced.kl_nats,
        "kl_zero": passes.zero.kl_nats,
        "kl_recovered": from_zero["kl"],
        "num_tokens": clean.num_predictions,
        "num_documents": len(np.unique(windows.document_ids[windows.usable])),
    }


def _shares(
    clean: PredictionAccumulator, ablated: PredictionAccumulator, spliced: PredictionAccumulator
) -> dict[str, Json | float]:
    """What is recovered; where the ablation does no harm, a sentence in place of each share, which has no meaning."""
    try:
        return dict(vars(recovered(clean, ablated, spliced)))
    except ValueError as error:
        return {"cross_entropy": {"omitted": str(error)}, "kl": {"omitted": str(error)}}
