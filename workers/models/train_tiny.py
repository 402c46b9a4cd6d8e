"""Trains the tiny language model that ships in `workers/models/tiny`: Gemma-2's architecture on the standard library.

    python -m workers.models.train_tiny --out DIR [--epochs E] [--threads N] [--seed S]

Trains a byte-level BPE tokenizer and a model of about four million parameters on the train split, and writes a folder
that `AutoModelForCausalLM` and `AutoTokenizer` read, with `card.json` beside the weights. Only whoever makes the
shipped model anew runs this. On Linux it runs about twice as fast when glibc keeps the memory it frees:
MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 in the environment.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from workers.models.ngrams import Ids, Unigram, WittenBellBigram, cross_entropy_nats
from workers.texts.documents import Document
from workers.texts.stdlib import stdlib_documents

PAD, EOS, BOS, UNK = range(4)
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]  # at the ids above, as in Gemma
VOCABULARY_SIZE = 4096
HELD_OUT_USE = (
    "Batch size and peak learning rate were chosen by the held-out loss of three one-epoch runs. The number of epochs "
    "was set by the computing time there was, weight decay beforehand; the last step's weights are the ones saved."
)


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; everything that decides the weights, but for the number of threads."""

    epochs: int = 3
    """Passes over the train split."""
    window_tokens: int = 256
    """Tokens of a context window, the leading <bos> among them."""
    batch_windows: int = 16
    """Windows of one optimiser step."""
    peak_learning_rate: float = 3e-3
    """Reached after the warm-up; falls to a tenth along a cosine."""
    warmup_fraction: float = 0.05
    """Share of all steps over which the learning rate rises linearly."""
    weight_decay: float = 0.3
    """AdamW's decoupled decay of the matrices; the norms' gains have none."""
    gradient_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    seed: int = 0
    """Seeds the initial weights, and the cuts and order of the windows."""


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """A byte-level BPE tokenizer with GPT-2's pre-tokenisation and exact character offsets that puts <bos> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[Ids]:
    """The token ids of each document, [tokens], with nothing added; a special token's name in a text is plain text."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def cut_windows(ids: Ids, window_tokens: int, first_tokens: int | None = None) -> Ids:
    """Cut a document's ids [tokens] into windows [windows, window_tokens] that start with <bos>, short ones padded.

    The first window takes `first_tokens` of the document, which shifts every later cut; None means a full window.
    """
    room = window_tokens - 1
    pieces = np.split(ids, np.arange(room if first_tokens is None else first_tokens, len(ids), room))
    windows = np.full((len(pieces), window_tokens), PAD, dtype=np.int64)
    windows[:, 0] = BOS
    for window, piece in zip(windows, pieces, strict=True):
        window[1 : 1 + len(piece)] = piece
    return windows


def epoch_batches(documents: list[Ids], recipe: Recipe, epoch: int) -> list[Ids]:
    """One epoch's batches [batch_windows, window_tokens]: documents cut at fresh offsets, windows shuffled."""
    generator = np.random.default_rng([recipe.seed, epoch])
    room = recipe.window_tokens - 1
    offsets = generator.integers(1, room + 1, size=len(documents))
    pairs = zip(documents, offsets, strict=True)
    windows = np.concatenate([cut_windows(ids, recipe.window_tokens, int(offset)) for ids, offset in pairs])
    windows = generator.permutation(windows)
    return np.split(windows, np.arange(recipe.batch_windows, len(windows), recipe.batch_windows))


def build_model(seed: int) -> Gemma2ForCausalLM:
    """A freshly initialised Gemma-2 of 4.2 million parameters in float32.

    The embedding starts at 1 / sqrt(d): Gemma multiplies it by sqrt(d), so that the residual stream starts at unit
    size, as large as what each block's closing norm adds to it, and the tied logits at unit variance.
    """
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        max_position_embeddings=512,
        use_cache=False,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.hidden_size**-0.5)
    return model


def window_loss(model: Gemma2ForCausalLM, windows: Ids, reduction: str) -> torch.Tensor:
    """Cross-entropy in nats of every token of `windows` [windows, window_tokens] but <bos> and padding."""
    ids = torch.from_numpy(windows)
    logits = model(input_ids=ids[:, :-1]).logits.float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD, reduction=reduction)


@torch.no_grad()
def held_out_nats(model: Gemma2ForCausalLM, windows: Ids, batch_windows: int) -> float:
    """Cross-entropy in nats per token of `windows` [windows, window_tokens], <bos> and padding apart."""
    batches = np.split(windows, np.arange(batch_windows, len(windows), batch_windows))
    total = sum(window_loss(model, batch, "sum").item() for batch in batches)
    return total / int((windows[:, 1:] != PAD).sum())


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Linear warm-up to the peak, then a cosine to a tenth of it at `num_steps`."""
    warmup_steps = recipe.warmup_fraction * num_steps
    if step < warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return recipe.peak_learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def build_optimizer(model: Gemma2ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices and not the norms' gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.95))


def train(model: Gemma2ForCausalLM, train_ids: list[Ids], held_out: Ids, recipe: Recipe) -> list[float]:
    """Train `model` in place, printing its progress; return each epoch's mean training loss in nats per token.

    Forward passes run in bfloat16 (autocast), weights and optimiser in float32. The held-out loss, of every eighth
    window, is printed only: nothing in the run depends on it.
    """
    optimizer = build_optimizer(model, recipe)
    epochs = [epoch_batches(train_ids, recipe, epoch) for epoch in range(recipe.epochs)]
    num_steps = sum(map(len, epochs))
    step, epoch_losses = 0, []
    for number, batches in enumerate(epochs, start=1):
        losses, started = [], time.monotonic()
        for batch in batches:
            rate = learning_rate(recipe, step, num_steps)
            losses.append(train_step(model, optimizer, batch, rate, recipe.gradient_norm))
            step += 1
            if step % 50 == 0:
                speed = len(losses) * recipe.batch_windows * recipe.window_tokens / (time.monotonic() - started)
                print(f"step {step}/{num_steps}: loss {losses[-1]:.3f}, {speed:.0f} tokens/s", flush=True)
        epoch_losses.append(float(np.mean(losses)))
        loss = held_out_nats(model, held_out[::8], recipe.batch_windows)
        print(f"epoch {number}/{recipe.epochs}: loss {epoch_losses[-1]:.3f}, held-out loss {loss:.3f}", flush=True)
    return epoch_losses


def train_step(
    model: Gemma2ForCausalLM, optimizer: torch.optim.AdamW, batch: Ids, rate: float, gradient_norm: float
) -> float:
    """One step of AdamW on `batch` [batch_windows, window_tokens]; returns the mean loss in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = window_loss(model, batch, "mean")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_norm)
    optimizer.step()
    return loss.item()


def save(model: Gemma2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, bfloat16 weights and tokenizer to `folder`, in the layout that transformers reads."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # it only repeats the special ids
    names = dict(zip(["pad_token", "eos_token", "bos_token", "unk_token"], SPECIAL_TOKENS, strict=True))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    )
    fast.save_pretrained(folder)


def describe(folder: Path, train_ids: list[Ids], held_out: Ids, recipe: Recipe) -> dict[str, Any]:
    """What `card.json` says of the model saved in `folder`: its size, and its loss beside those of n-gram models."""
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    sequences = [unpadded(window) for window in held_out]
    train_sequences = [unpadded(w) for ids in train_ids for w in cut_windows(ids, recipe.window_tokens)]
    return {
        "architecture": "Gemma2ForCausalLM",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text": "the Python standard library's source, split by file (workers/texts/stdlib.py)",
        "recipe": asdict(recipe),
        "python_version": platform.python_version(),
        "train_files": len(train_ids),
        "train_tokens": sum(map(len, train_ids)),
        "held_out_tokens": sum(len(sequence) - 1 for sequence in sequences),
        "held_out_nats_per_token": {
            "model": held_out_nats(model, held_out, recipe.batch_windows),
            "bigram_witten_bell": cross_entropy_nats(WittenBellBigram.fit(train_sequences, VOCABULARY_SIZE), sequences),
            "unigram": cross_entropy_nats(Unigram.fit(train_sequences, VOCABULARY_SIZE), sequences),
        },
        "held_out_use": HELD_OUT_USE,
    }


def unpadded(window: Ids) -> Ids:
    """A window [window_tokens] without its padding."""
    kept: Ids = window[window != PAD]
    return kept


def main() -> None:
    """Train tokenizer and model, save them, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(epochs=arguments.epochs, seed=arguments.seed)

    train_documents, held_out_documents = stdlib_documents("train"), stdlib_documents("held_out")
    tokenizer = train_tokenizer(train_documents)
    train_ids = encode(tokenizer, train_documents)
    held_out = np.concatenate([cut_windows(ids, recipe.window_tokens) for ids in encode(tokenizer, held_out_documents)])

    model = build_model(recipe.seed)
    started = time.monotonic()
    epoch_losses = train(model, train_ids, held_out, recipe)
    train_seconds = time.monotonic() - started

    save(model, tokenizer, arguments.out)
    card = describe(arguments.out, train_ids, held_out, recipe) | {
        "held_out_files": len(held_out_documents),
        "tokens_trained": recipe.epochs * sum(map(len, train_ids)),
        "train_nats_per_token_by_epoch": [round(loss, 4) for loss in epoch_losses],
        "train_seconds": round(train_seconds),
        "threads": arguments.threads,
    }
    (arguments.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
