"""Which prefixes of the latents one batch is trained to reconstruct from, and how much each counts.

A nested (Matryoshka) SAE decodes every batch from several prefixes 1..m_g of its latents (Bussmann et al. 2025, section
3.1). The lengths are fixed, or drawn anew for each batch; the full width is always among them. Called by the trainer;
losses only read the result.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from workers.config import SAEConfig
from workers.sae.randomness import named_generator


@dataclass(frozen=True)
class Prefixes:
    """Prefix lengths of one batch, increasing, the last one d_latent, and their weights, which sum to 1."""

    lengths: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def equal(cls, lengths: tuple[int, ...]) -> "Prefixes":
        """Every prefix counts 1/G."""
        return cls(lengths, (1 / len(lengths),) * len(lengths))


def prefixes_of_step(config: SAEConfig, step: int) -> Prefixes:
    """The prefixes of a step, counted from 0. They depend on config and step alone: a resumed run draws the same."""
    if config.nesting == "none":
        return Prefixes.equal((config.d_latent,))
    if config.nesting == "fixed":
        return Prefixes.equal(config.widths)
    law = length_law(config.d_latent, config.prefix_law)
    generator = named_generator(config.seed, f"prefixes of step {step}")
    drawn = 1 + torch.multinomial(law, config.num_prefixes - 1, replacement=False, generator=generator)
    return Prefixes.equal((*sorted(drawn.tolist()), config.d_latent))


def length_law(d_latent: int, law: str) -> Float64[Tensor, " d_latent_minus_1"]:
    """P(l) for l = 1..d_latent - 1, by which the random lengths are drawn without replacement.

    Two laws go under the name "truncated Pareto(0.5)": `sqrt`, P(l) ~ sqrt(l) - sqrt(l - 1), a density that falls as
    l^-0.5, is what the author's code does; `pareto`, P(l) ~ l^-1.5, is what the name says.
    """
    lengths = torch.arange(1, d_latent, dtype=torch.float64)
    mass = lengths.sqrt() - (lengths - 1).sqrt() if law == "sqrt" else lengths**-1.5
    return mass / mass.sum()
