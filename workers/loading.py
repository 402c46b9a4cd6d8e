"""For notebooks: a published SAE, activations of a text, batches of the store. No Ray; nothing is written.

checkpoint, sae = load_sae("dollhouse-data", "matryoshka")
tokens, x = read_text(checkpoint, "for line in file: print(line)")
latents = sae.encode(x)
"""

from collections.abc import Iterator

import torch

from storage import checkpoints
from storage.config import StorageConfig
from storage.filesystem import Storage
from storage.manifest import Dataset
from storage.records import CheckpointRecord
from storage.stream import ActivationStream
from workers.batches import concatenate, to_tensor
from workers.config import ModelConfig
from workers.models.language_model import LanguageModel
from workers.models.tokens import Tokenizer, iter_windows
from workers.sae.module import SparseAutoencoder
from workers.texts.documents import Document


def load_sae(
    root: str, name: str, run_id: str | None = None, step: int | None = None
) -> tuple[CheckpointRecord, SparseAutoencoder]:
    """A published SAE and its record: of the newest run that has one, at its last step, unless told otherwise.

    It reads raw activations of `record.hook`. Raises ValueError where the root holds no such checkpoint.
    """
    storage = Storage(StorageConfig(root=root))
    run_id = run_id or checkpoints.newest_run(storage, name)
    if run_id is None:
        raise ValueError(f"no run under {root} has a checkpoint of {name}: `dollhouse status` tells what there is")
    steps = {found.step for found in checkpoints.list_checkpoints(storage, run_id) if found.name == name}
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"run {run_id} has no checkpoint of {name} at step {step or 'any'}; it has steps {sorted(steps)}"
        )
    record, tensors = checkpoints.load(storage, run_id, name, max(steps) if step is None else step)
    sae = SparseAutoencoder.from_tensors({key: torch.from_numpy(value) for key, value in tensors.items()})
    return record, sae.requires_grad_(False)


def read_text(checkpoint: CheckpointRecord, text: str) -> tuple[list[str], torch.Tensor]:
    """Tokens of a text, without BOS, and their activations [tokens, d_in] at the checkpoint's hook, in float32."""
    config = ModelConfig(
        name=checkpoint.model.name, dtype="bfloat16" if checkpoint.model.dtype == "bfloat16" else "float32"
    )
    tokenizer, model = Tokenizer.load(config), LanguageModel(config)
    if model.identity.fingerprint != checkpoint.model.fingerprint:
        raise ValueError(f"model {config.name} is not the one that {checkpoint.name} was trained on: restore its files")
    length = 2 + len(tokenizer.encode([text])[0][0])
    windows = concatenate(list(iter_windows([Document("text", text)], tokenizer, length, "document")))
    usable = torch.from_numpy(windows.usable)
    x = model.activations(torch.from_numpy(windows.token_ids).long(), ~usable, (checkpoint.hook,))[checkpoint.hook]
    return tokenizer.strings(windows.token_ids[windows.usable]), x[usable.to(x.device)].float().cpu()


def activation_batches(
    root: str, checkpoint: CheckpointRecord, batch_rows: int, seed: int = 0, window_chunks: int = 16
) -> Iterator[torch.Tensor]:
    """Endless shuffled batches [batch_rows, d_in] of the rows that the checkpoint was trained on, as stored."""
    dataset = Dataset.open(Storage(StorageConfig(root=root)), checkpoint.dataset_id)
    with ActivationStream(dataset, (checkpoint.hook,), batch_rows, seed, window_chunks) as stream:
        while True:
            yield to_tensor(stream.next_batch().activations[checkpoint.hook], dataset.record.dtype)
