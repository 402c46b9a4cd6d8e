"""Stream -> step -> checkpoint: every SAE of a run trained on one stream, each chunk read once for all of them.

The loop as a plain class that can stop after any step and go on to the same bits (`workers.actors.trainer` runs it on a
cluster). What must survive a restart is in `save`; what others may use is in `publish`.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from storage import checkpoints
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import CheckpointRecord, Json
from storage.reports import write_history
from storage.stream import ActivationStream
from workers.batches import to_tensor
from workers.config import SAEConfig, TrainConfig
from workers.sae.scaling import input_scale
from workers.sae.trainer import SAETrainer, StepResult

_HISTORY_POINTS = 400


@dataclass(frozen=True)
class Advance:
    """What a slice of training came to."""

    step: int
    num_steps: int
    rows_trained: int
    """Rows each SAE has been trained on since step 0."""
    new_rows: int
    """Of these, in this slice."""
    results: dict[str, dict[str, float]]
    """SAE name -> the last step's figures."""
    step_seconds: list[float]
    """Time of each step, the wait for its data excluded."""
    wait_seconds: float
    """Time this slice waited for data."""
    busy_seconds: float
    published: list[int]
    """Steps at which checkpoints were published in this slice."""
    finished: bool


@dataclass
class _Progress:
    step: int = 0
    history: dict[str, list[Json]] = field(default_factory=dict)


class TrainingLoop:
    """Trains `saes` on `dataset`, from the newest saved state of `slot` if there is one."""

    def __init__(
        self,
        storage: Storage,
        dataset: Dataset,
        run_id: str,
        slot: str,
        saes: tuple[SAEConfig, ...],
        train: TrainConfig,
        *,
        device: torch.device,
        verify: bool = True,
    ) -> None:
        self.storage, self.dataset, self.run_id, self.slot, self.train = storage, dataset, run_id, slot, train
        self.stream = ActivationStream(
            dataset,
            hooks=tuple(dict.fromkeys(sae.hook for sae in saes)),
            batch_rows=train.batch_rows,
            seed=train.seed,
            window_chunks=train.window_chunks,
            verify=verify,
        )
        self.trainers = {sae.name: _new_trainer(dataset, sae, train, device) for sae in saes}
        self.progress = _Progress(history={sae.name: [] for sae in saes})
        self._saved_at = time.monotonic()
        self._restore()

    @property
    def finished(self) -> bool:
        """True once every planned step has been taken."""
        return self.progress.step >= self.train.num_steps

    def advance(self, seconds: float) -> Advance:
        """Train for about `seconds`, at least one step; publish and save when they are due."""
        first, started, waited = self.progress.step, time.perf_counter(), self.stream.seconds_waited
        step_seconds: list[float] = []
        published: list[int] = []
        results: dict[str, StepResult[torch.Tensor]] = {}
        while not self.finished and (not step_seconds or time.perf_counter() - started < seconds):
            before = time.perf_counter() - self.stream.seconds_waited
            results = self._step()
            step_seconds.append(time.perf_counter() - self.stream.seconds_waited - before)
            if self._publish_is_due():
                self.publish()
                published.append(self.progress.step)
        if self.finished or published or time.monotonic() - self._saved_at > self.train.save_every_seconds:
            self.save()
        elapsed = time.perf_counter() - started
        wait = self.stream.seconds_waited - waited
        return Advance(
            step=self.progress.step,
            num_steps=self.train.num_steps,
            rows_trained=self.progress.step * self.train.batch_rows,
            new_rows=(self.progress.step - first) * self.train.batch_rows,
            results={name: _figures(result) for name, result in results.items()},
            step_seconds=step_seconds,
            wait_seconds=wait,
            busy_seconds=elapsed - wait,
            published=published,
            finished=self.finished,
        )

    def _step(self) -> dict[str, StepResult[torch.Tensor]]:
        """One batch to every SAE. Figures leave the device for points of a curve and for the slice's last step only."""
        batch = self.stream.next_batch()
        inputs = {hook: to_tensor(stored, self.dataset.record.dtype) for hook, stored in batch.activations.items()}
        step = self.progress.step + 1
        results = {name: trainer.step(inputs[trainer.config.hook]) for name, trainer in self.trainers.items()}
        if step % max(1, self.train.num_steps // _HISTORY_POINTS) == 0 or step in {1, self.train.num_steps}:
            for name, result in results.items():
                row = {"step": step, "rows": step * self.train.batch_rows, **_figures(result)}
                self.progress.history[name].append(row)
        self.progress.step = step
        return results

    def _publish_is_due(self) -> bool:
        every = self.train.publish_every_rows
        if self.finished:
            return True
        if every is None:
            return False
        batch = self.train.batch_rows
        return self.progress.step * batch // every > (self.progress.step - 1) * batch // every

    def save(self) -> None:
        """Write the raw resume state: weights, moments, counters, generators, the stream's place, the curves so far."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        scalars: Json = {
            "step": self.progress.step,
            "stream": self.stream.get_state(),
            "dataset_digest": self.dataset.record.digest(),
            "history": self.progress.history,
            "saes": {},
        }
        for name, trainer in self.trainers.items():
            state, numbers = trainer.state()
            tensors.update({f"{name}/{key}": tensor.detach().cpu().numpy() for key, tensor in state.items()})
            scalars["saes"][name] = numbers
        checkpoints.save_state(self.storage, self.run_id, self.slot, self.progress.step, tensors, scalars)
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        found = checkpoints.load_latest_state(self.storage, self.run_id, self.slot)
        if found is None:
            return
        step, tensors, scalars = found
        if scalars["dataset_digest"] != self.dataset.record.digest():
            raise ValueError(
                f"run {self.run_id} was trained on another dataset than {self.dataset.record.dataset_id}: "
                "its text or model has changed since; pass --new for a run of its own"
            )
        for name, trainer in self.trainers.items():
            prefix = f"{name}/"
            own = {
                key.removeprefix(prefix): torch.from_numpy(value.copy())
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            trainer.load_state(own, scalars["saes"][name])
        self.stream.set_state(scalars["stream"])
        self.progress = _Progress(step, scalars["history"])

    def publish(self) -> None:
        """Write each SAE, scale factors folded in, and its curve so far. What is published already stays as it is."""
        manifest_digest = self.dataset.manifest_digest()
        for name, trainer in self.trainers.items():
            write_history(self.storage, self.run_id, name, self.progress.history[name])
            sae = trainer.published()
            tensors = {key: tensor.detach().cpu().numpy() for key, tensor in sae.tensors().items()}
            checkpoints.publish(self.storage, self._record(trainer, manifest_digest, float(sae.threshold)), tensors)

    def _record(self, trainer: SAETrainer, manifest: str, threshold: float) -> CheckpointRecord:
        config, record = trainer.config, self.dataset.record
        last = self.progress.history[config.name][-1]
        return CheckpointRecord(
            run_id=self.run_id,
            name=config.name,
            step=self.progress.step,
            rows_trained=self.progress.step * self.train.batch_rows,
            dataset_id=record.dataset_id,
            dataset_digest=record.digest(),
            manifest_digest=manifest,
            hook=config.hook,
            model=record.model,
            sae=config.model_dump(mode="json"),
            train=self.train.model_dump(mode="json"),
            variant=config.variant,
            d_in=record.hooks[config.hook],
            d_latent=config.d_latent,
            threshold=threshold,
            scale=trainer.scale,
            train_metrics={key: float(value) for key, value in last.items() if isinstance(value, float)},
            tensors_sha256="",  # storage fills it in
        )

    def close(self) -> None:
        """Stop the stream's prefetching."""
        self.stream.close()


def _figures(result: StepResult[torch.Tensor]) -> dict[str, float]:
    """A step's figures by name; FVU of each nested width as `fvu_<width>`."""
    floats = result.as_floats()
    named = {key: value for key, value in vars(floats).items() if key != "prefix_fvu"}
    return named | {f"fvu_{width}": value for width, value in floats.prefix_fvu.items()}


def _new_trainer(dataset: Dataset, sae: SAEConfig, train: TrainConfig, device: torch.device) -> SAETrainer:
    """A trainer whose input scale and decoder bias come from the dataset's own statistics."""
    moments = dataset.moments(sae.hook)
    mean = np.asarray(moments.mean)
    mean_square_norm = float((mean**2).sum() + np.sum(moments.sum_squared_deviations) / moments.count)
    if not 0 < mean_square_norm < float("inf"):
        raise ValueError(
            f"the activations at {sae.hook} have mean squared norm {mean_square_norm}: nothing can be trained on them"
        )
    d_in = dataset.record.hooks[sae.hook]
    return SAETrainer(
        sae, train, d_in, torch.from_numpy(mean).float(), scale=input_scale(d_in, mean_square_norm), device=device
    )
