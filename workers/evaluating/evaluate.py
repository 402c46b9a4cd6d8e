"""Checkpoint -> scores -> report: everything that is measured on a published SAE, on held-out documents.

One forward pass over the texts serves all SAEs of a step. Called by the evaluator actor; the scores themselves are in
`workers.scores`, which see no model and no file.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array

from storage import checkpoints
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import CheckpointRecord, Json, MetricsReport
from workers.config import EvalConfig, HarvestConfig, ModelConfig, TextConfig
from workers.evaluating.contexts import HeldOutTokens, describe_latents
from workers.evaluating.definitions import DEFINITIONS
from workers.evaluating.fidelity import Spliced, measure_fidelity, token_batches
from workers.evaluating.held_out import load_held_out
from workers.evaluating.probes import ConceptProbes
from workers.models.language_model import LanguageModel
from workers.models.tokens import Tokenizer
from workers.sae.module import SparseAutoencoder
from workers.scores import geometry, sparsity
from workers.scores.fidelity import FVUAccumulator

CheckpointKey = tuple[str, int]
"""An SAE's name and a step."""

_ROWS_AT_ONCE = 8192
_FEWEST_FOR_COSINES = 2


@dataclass(frozen=True)
class _Loaded:
    record: CheckpointRecord
    sae: SparseAutoencoder


class CheckpointEvaluator:
    """Scores checkpoints; the model, the held-out windows and the dense probes are made once and shared by all SAEs."""

    def __init__(
        self,
        storage: Storage,
        model: ModelConfig,
        text: TextConfig,
        harvest: HarvestConfig,
        evaluate: EvalConfig,
        prefixes: tuple[int, ...],
    ) -> None:
        self.storage, self.harvest, self.config, self.prefixes = storage, harvest, evaluate, prefixes
        self.model = LanguageModel(model)
        tokenizer = Tokenizer.load(model)
        self.held_out = load_held_out(text, tokenizer, harvest, evaluate)
        windows = self.held_out.windows
        self.tokens = HeldOutTokens(
            strings=tokenizer.strings(windows.token_ids.ravel()),
            document_ids=windows.document_ids.ravel(),
            usable=windows.usable.ravel(),
            document_names={number: document.name for number, document in enumerate(self.held_out.documents)},
            context_tokens=harvest.context_tokens,
        )
        self._activations: dict[str, torch.Tensor] = {}
        self._probes: dict[str, ConceptProbes] = {}

    def evaluate(self, run_id: str, wanted: tuple[CheckpointKey, ...]) -> Iterator[MetricsReport]:
        """Yield the report of each checkpoint, in the order given; all of them share one set of forward passes.

        Raises ValueError when a checkpoint is damaged, or belongs to another model than this evaluator runs.
        """
        started = time.perf_counter()
        loaded = {key: self._load(run_id, *key) for key in wanted}
        fidelity = self._fidelity(loaded)
        for key, entry in loaded.items():
            metrics = {"fidelity": fidelity[key], **self._scores(entry), "definitions": DEFINITIONS}
            yield MetricsReport(
                run_id=run_id,
                name=entry.record.name,
                step=entry.record.step,
                checkpoint_digest=entry.record.digest(),
                text=self.held_out.identity,
                evaluate=self.config.model_dump(mode="json"),
                metrics=metrics,
                num_tokens=int(self._fidelity_rows().sum()),
                seconds=round(time.perf_counter() - started, 2),
            )
            started = time.perf_counter()

    def _load(self, run_id: str, name: str, step: int) -> _Loaded:
        record, tensors = checkpoints.load(self.storage, run_id, name, step)
        if record.model.fingerprint != self.model.identity.fingerprint:
            raise ValueError(
                f"checkpoint {name} at step {step} was trained on model {record.model.name} "
                f"({record.model.fingerprint[:12]}), this evaluator runs {self.model.identity.name} "
                f"({self.model.identity.fingerprint[:12]}): evaluate it with its own model"
            )
        sae = SparseAutoencoder.from_tensors({key: torch.from_numpy(value) for key, value in tensors.items()})
        return _Loaded(record, sae)

    def _fidelity(self, loaded: dict[CheckpointKey, _Loaded]) -> dict[CheckpointKey, Json]:
        if not self.model.identity.causal:
            reason = "the model is an encoder: it predicts no next token, so there is no cross-entropy to recover"
            return {key: {"omitted": reason} for key in loaded}
        spliced = {
            key: Spliced(entry.record.hook, entry.sae.to(self.model.device), self._mean(entry.record))
            for key, entry in loaded.items()
        }
        windows = self.held_out.windows.take(slice(0, self.held_out.num_fidelity))
        return measure_fidelity(self.model, windows, spliced, self.harvest.batch_sequences)

    def _mean(self, record: CheckpointRecord) -> torch.Tensor:
        dataset = Dataset.open(self.storage, record.dataset_id)
        return torch.tensor(dataset.moments(record.hook).mean, dtype=torch.float32)

    def _scores(self, entry: _Loaded) -> Json:
        """Everything that needs activations but no further forward pass."""
        hook, sae = entry.record.hook, entry.sae.cpu()
        activations = self._activations_at(hook)
        codes, fvu = self._encode(sae, activations)
        usable = self.held_out.windows.usable.ravel()
        firing = sparsity.firing(codes[usable])
        return {
            "fvu": {str(prefix): value for prefix, value in fvu.items()},
            "l0": firing.l0,
            "dead_share": firing.dead_share,
            "firing": firing.histogram(),
            "geometry": _geometry(sae, torch.from_numpy(firing.rates > 0)),
            **self._probes_at(hook).scores(codes, sae.W_dec.detach().numpy()),
            "latents": describe_latents(
                codes,
                self.tokens,
                self._widths(sae),
                self.config.num_latents,
                self.config.contexts_per_latent,
            ),
        }

    def _encode(self, sae: SparseAutoencoder, activations: torch.Tensor) -> tuple[csr_array, dict[int, float]]:
        """Latents of every row (none at flagged rows), and the FVU of every prefix over the fidelity rows."""
        rows = torch.from_numpy(np.flatnonzero(self.held_out.windows.usable.ravel()))
        last = int(self._fidelity_rows().nonzero()[0].max())
        prefixes = self._widths(sae)
        accumulator = FVUAccumulator(prefixes)
        parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
        for some in rows.split(_ROWS_AT_ONCE):
            x = activations[some]
            codes = sae.encode_sparse(x)
            parts.append((some[codes.rows].numpy(), codes.cols.numpy(), codes.values.numpy()))
            inside = some <= last
            if inside.any():
                accumulator.add(x[inside], {prefix: sae.decode_sparse(codes, prefix)[inside] for prefix in prefixes})
        row, column, value = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        latents = csr_array((value, (row, column)), shape=(len(activations), sae.d_latent))
        return latents, accumulator.fvu()

    def _widths(self, sae: SparseAutoencoder) -> tuple[int, ...]:
        """The prefix lengths of every SAE, ascending, and this one's full width."""
        return tuple(sorted({*self.prefixes, sae.d_latent}))

    def _fidelity_rows(self) -> npt.NDArray[np.bool_]:
        usable = self.held_out.windows.usable.copy()
        usable[self.held_out.num_fidelity :] = False
        return usable.ravel()

    def _activations_at(self, hook: str) -> torch.Tensor:
        """[rows, d] float32 over all held-out windows; every harvested hook comes out of the one pass."""
        if not self._activations:
            parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.harvest.hooks}
            for tokens, padding in token_batches(self.held_out.windows, self.harvest.batch_sequences):
                for name, activation in self.model.activations(tokens, padding, self.harvest.hooks).items():
                    parts[name].append(activation.flatten(0, 1).float().cpu())
            self._activations = {name: torch.cat(part) for name, part in parts.items()}
        return self._activations[hook]

    def _probes_at(self, hook: str) -> ConceptProbes:
        if hook not in self._probes:
            self._probes[hook] = ConceptProbes(self.held_out, self._activations_at(hook).numpy(), self.config)
        return self._probes[hook]


def _geometry(sae: SparseAutoencoder, fired: torch.Tensor) -> Json:
    """Cosines of the latents that fired; an SAE that has died all but for one gets a sentence in their place."""
    if int(fired.sum()) < _FEWEST_FOR_COSINES:
        return {"omitted": f"{int(fired.sum())} latents fire on the held-out tokens: cosines need two"}
    found = geometry.decoder_cosines(sae.W_enc.detach().T, sae.W_dec.detach(), fired)
    return {
        "mean_max_decoder_cosine": found.mean_max_decoder_cosine,
        "mean_encoder_decoder_cosine": found.mean_encoder_decoder_cosine,
    }
