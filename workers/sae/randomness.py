"""Named random generators: one seed, spread over purposes that cannot disturb each other."""

import hashlib

import torch


def named_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose alone, e.g. "initial weights"."""
    digest = hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
