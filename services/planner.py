"""What a run will take, before it starts: rows, bytes, objects, memory. By arithmetic; starts nothing.

`dollhouse run --dry-run` prints it. Figures that cannot be known yet are left out, and estimates say so.
"""

from dataclasses import dataclass
from pathlib import Path

from services.config import RunConfig
from workers.models.catalog import layer_of, local_config, num_layers, resolve
from workers.texts.sources import documents

_BYTES = {"bfloat16": 2, "float32": 4}
_TOKEN_ARRAY_BYTES = 4 + 4 + 4 + 1  # token_ids, positions, document_ids, flags
_BYTES_PER_TOKEN = 3.5  # of source code or English text under a BPE tokenizer; an estimate


@dataclass(frozen=True)
class RunPlan:
    """The plan's figures; none where they cannot be known yet."""

    num_rows: int | None
    rows_are_estimated: bool
    d_model: int | None
    store_bytes: int | None
    num_objects: int | None
    epochs: float | None
    model_bytes: int | None
    """Weights in the forward pass's precision: memory of each harvester, GPU or host, before activations."""
    trainer_bytes: int | None
    """Weights, gradients and both moments in float32, and one batch of pre-activations, over all SAEs."""
    forward_flops: float | None
    """2 x parameters x rows, scaled to the layers that the forward pass reaches."""
    train_flops: float | None
    """Dense count: 12 x d x d_latent x rows for each SAE; the sparse path does about a third (encoder product alone).
    """

    def lines(self) -> list[str]:
        """One line a figure, for people."""
        about = "about " if self.rows_are_estimated else ""
        rows = [
            ("rows to harvest", _count(self.num_rows), about),
            ("width of the residual stream", _count(self.d_model), ""),
            ("bytes in the store", _size(self.store_bytes), about),
            ("objects in the store", _count(self.num_objects), about),
            ("epochs of training", f"{self.epochs:.2f}" if self.epochs else None, about),
            ("memory of each harvester for weights", _size(self.model_bytes), ""),
            ("memory of the trainer", _size(self.trainer_bytes), ""),
            ("forward passes, FLOP", f"{self.forward_flops:.2e}" if self.forward_flops else None, about),
            ("training, FLOP if dense", f"{self.train_flops:.2e}" if self.train_flops else None, ""),
        ]
        return [
            f"{name}: {prefix}{value}" if value else f"{name}: known once the model is loaded"
            for name, value, prefix in rows
        ]


def plan_run(config: RunConfig) -> RunPlan:
    """Compute the plan of a run from its configuration and, for local text, from the size of its files."""
    content = local_config(config.model.name)
    d_model = config.model.d_model or (
        int(content.get("hidden_size") or content.get("n_embd") or 0) if content else None
    )
    rows, estimated = _rows(config)
    storage, width = config.storage, _BYTES[config.harvest.dtype]
    num_hooks = len(config.harvest.hooks)
    store_bytes = rows * (num_hooks * d_model * width + _TOKEN_ARRAY_BYTES) if rows and d_model else None
    num_chunks = -(-rows // storage.rows_per_chunk) if rows else None
    parameters = config.model.num_parameters or _local_parameters(config)
    layers = config.model.num_layers or (num_layers(content) if content else None)
    reach = (1 + max(map(layer_of, config.harvest.hooks))) / layers if layers else None
    trainer = train = None
    if d_model:
        trainer = sum(
            4 * 4 * 2 * d_model * sae.d_latent + 4 * config.train.batch_rows * sae.d_latent for sae in config.saes
        )
        train = float(sum(12 * d_model * sae.d_latent * config.train.rows for sae in config.saes))
    return RunPlan(
        num_rows=rows,
        rows_are_estimated=estimated,
        d_model=d_model,
        store_bytes=store_bytes,
        num_objects=num_chunks * (num_hooks + 4) + -(-num_chunks // storage.chunks_per_shard) if num_chunks else None,
        epochs=config.train.rows / rows if rows else None,
        model_bytes=int(parameters * _BYTES[config.model.dtype]) if parameters else None,
        trainer_bytes=trainer,
        forward_flops=2 * parameters * rows * reach if parameters and rows and reach else None,
        train_flops=train,
    )


def _rows(config: RunConfig) -> tuple[int | None, bool]:
    limit = config.harvest.max_rows
    if limit is not None:
        limit -= limit % config.harvest.context_tokens  # whole windows
    if config.text.source in {"hub", "sae-probes"}:
        return limit, False
    size = sum(len(document.text.encode()) for document in documents(config.text, "harvest"))
    estimate = int(size / _BYTES_PER_TOKEN)
    return (limit, False) if limit is not None and limit < estimate else (estimate, True)


def _local_parameters(config: RunConfig) -> float | None:
    where = resolve(config.model.name)
    if not isinstance(where, Path):
        return None
    stored = sum(path.stat().st_size for path in where.glob("*.safetensors"))
    content = local_config(config.model.name) or {}
    return stored / _BYTES.get(str(content.get("dtype") or content.get("torch_dtype") or "float32"), 4)


def _count(value: int | None) -> str | None:
    return f"{value:,}" if value else None


def _size(value: int | None) -> str | None:
    if not value:
        return None
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:,.2f} {unit}"
    return f"{value / 1e3:,.1f} kB"
