"""Training of one sparse autoencoder, one batch at a time: `step`, and what must survive a restart.

Where batches come from, when checkpoints are written and on which machine is the caller's business
(`workers.training`). Either compute path does the same mathematics: `reference` is the dense formula under autograd,
`fast` its sparse equal, with gradients by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from workers.config import SAEConfig, TrainConfig
from workers.sae.dead import DeadLatents
from workers.sae.gradients import BatchGradients, ComputesGradients, Objective, reference_gradients
from workers.sae.initialise import initial_autoencoder
from workers.sae.kernels.step import FastGradients
from workers.sae.module import PARAMETERS, SparseAutoencoder
from workers.sae.optimiser import Optimiser
from workers.sae.prefixes import Prefixes, prefixes_of_step
from workers.sae.scaling import folded
from workers.sae.threshold import RunningThreshold

Number = TypeVar("Number", Tensor, float)


@dataclass(frozen=True)
class StepResult(Generic[Number]):
    """What one step measured, as 0-d tensors on the SAE's device; `as_floats()` copies them in one transfer."""

    loss: Number
    """Nested loss + aux_weight * AuxK, before the update."""
    aux_loss: Number
    """AuxK before its weight."""
    fvu: Number
    """Fraction of variance unexplained, full width, BatchTopK code: sum (x - x_hat)^2 / sum (x - batch mean)^2."""
    l0: Number
    """Mean number of active latents per row."""
    dead_share: Number
    """Share of latents dead after this batch."""
    threshold: Number
    """Running inference threshold, in units of the scaled input."""
    gradient_norm: Number
    """Global norm before clipping."""
    learning_rate: float
    prefix_fvu: dict[int, Number]
    """FVU by width, for fixed nesting; empty otherwise."""

    def as_floats(self) -> "StepResult[float]":
        """The same as Python floats; on a GPU this waits for the step to finish."""
        names = ("loss", "aux_loss", "fvu", "l0", "dead_share", "threshold", "gradient_norm")
        tensors = [getattr(self, name) for name in names] + list(self.prefix_fvu.values())
        values = torch.stack([tensor.double() for tensor in tensors]).tolist()
        prefix_fvu = dict(zip(self.prefix_fvu, values[len(names) :], strict=True))
        return StepResult(
            **dict(zip(names, values, strict=False)), learning_rate=self.learning_rate, prefix_fvu=prefix_fvu
        )


class SAETrainer:
    """One SAE, its optimiser, counters and running threshold."""

    def __init__(
        self,
        config: SAEConfig,
        train: TrainConfig,
        d_in: int,
        mean: Float[Tensor, " d_in"],
        scale: float,
        device: torch.device | str,
    ) -> None:
        """`mean` is that of the raw activations, in their units; `scale` is `scaling.input_scale` of the same data."""
        if mean.shape != (d_in,):
            raise ValueError(f"mean of {config.hook} has shape {list(mean.shape)}: [{d_in}] is needed")
        self.config = config
        self.train = train
        self.scale = scale
        self.device = torch.device(device)
        self.sae = initial_autoencoder(config, mean * scale).to(self.device)
        self.optimiser = Optimiser(self.sae, train)
        self.dead = DeadLatents(config.d_latent, train.dead_after_rows, self.device)
        self.threshold = RunningThreshold(train.threshold_rate, self.device)
        self.objective = Objective(config.k, train.aux_weight, train.aux_k or max(1, d_in // 2))
        self._gradients: ComputesGradients = FastGradients() if train.compute == "fast" else reference_gradients

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self.optimiser.num_steps

    def step(self, x_raw: Float[Tensor, "batch d_in"]) -> StepResult[Tensor]:
        """One update from raw activations. ValueError, and nothing changed, if a value or the loss is not finite."""
        x = self._scaled(x_raw)
        prefixes = prefixes_of_step(self.config, self.num_steps)
        batch = self._gradients(self.sae, x, prefixes, self.dead.mask(), self.objective)
        loss = batch.nested_loss + self.objective.aux_weight * batch.aux_loss
        gradient_norm = self.optimiser.project(batch.gradients)
        if not (loss + gradient_norm).isfinite():
            raise ValueError(
                f"saes.{self.config.name}: loss {loss.item()} or gradient norm {gradient_norm.item()} "
                f"of step {self.num_steps} is not finite: lower train.learning_rate"
            )
        rate = self.optimiser.step(batch.gradients, gradient_norm)
        self.dead.update(batch.active_counts, x.shape[0])
        self.threshold.update(batch.smallest)
        return self._result(x, prefixes, batch, loss, gradient_norm, rate)

    def published(self) -> SparseAutoencoder:
        """A copy that reads raw activations: scale folded in, threshold set."""
        tensors = self.sae.tensors() | {"threshold": self.threshold.value()}
        return folded(SparseAutoencoder.from_tensors(tensors), self.scale)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that `load_state` needs to go on (bit for bit, on a CPU): copies of the tensors, and plain values."""
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self._state_tensors().items()}
        return tensors, {"num_steps": self.num_steps}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, int]) -> None:
        """Continue from what `state` returned. ValueError, and nothing changed, if it is of another SAE."""
        own = self._state_tensors()
        if set(tensors) != set(own) or "num_steps" not in values:
            odd = sorted(set(tensors) ^ set(own)) or ["num_steps"]
            raise ValueError(f"saes.{self.config.name}: the resume state lacks, or has too much of, {', '.join(odd)}")
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise ValueError(
                    f"saes.{self.config.name}: {name} of the resume state is {list(tensors[name].shape)} "
                    f"{tensors[name].dtype}, not {list(tensor.shape)} {tensor.dtype}: it belongs to another config"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.optimiser.set_num_steps(values["num_steps"])

    def _state_tensors(self) -> dict[str, Tensor]:
        return {
            **{name: self.sae.get_parameter(name).detach() for name in PARAMETERS},
            **self.optimiser.tensors(),
            "rows_since_fired": self.dead.rows_since_fired,
            "threshold.weighted_sum": self.threshold.weighted_sum,
            "threshold.weight": self.threshold.weight,
        }

    def _scaled(self, x_raw: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        x = x_raw.to(self.device, self.sae.W_enc.dtype) * self.scale
        if not torch.stack(x.aminmax()).isfinite().all():
            row = int((~x.isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"saes.{self.config.name}: row {row} of the batch from {self.config.hook} holds NaN or infinity: "
                "harvest again with harvest.dtype or model.dtype of a wider range"
            )
        return x

    def _result(
        self,
        x: Float[Tensor, "batch d_in"],
        prefixes: Prefixes,
        batch: BatchGradients,
        loss: Float[Tensor, ""],
        gradient_norm: Float[Tensor, ""],
        rate: float,
    ) -> StepResult[Tensor]:
        fvu = batch.squared_errors / (x - x.mean(0)).square().sum()
        return StepResult(
            loss=loss,
            aux_loss=batch.aux_loss,
            fvu=fvu[-1],
            l0=batch.active_counts.sum() / x.shape[0],
            dead_share=self.dead.mask().float().mean(),
            threshold=self.threshold.value(),
            gradient_norm=gradient_norm,
            learning_rate=rate,
            prefix_fvu=dict(zip(prefixes.lengths, fvu, strict=True)) if self.config.nesting == "fixed" else {},
        )
