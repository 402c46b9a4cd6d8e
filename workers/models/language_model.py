"""The language model, wrapped in one file over transformer-lens: the forward pass that stops early, and splicing.

Loaded by harvesters (activations at several hook points) and evaluators (logits with a reconstruction put in).
Tokenising is in `workers.models.tokens`.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from storage.records import ModelIdentity
from workers.config import ModelConfig
from workers.models.catalog import files_digest, layer_of, resolve

_CAUSAL = ("ForCausalLM", "LMHeadModel")

Splice = Callable[[torch.Tensor], torch.Tensor]


class LanguageModel:
    """A `TransformerBridge` in evaluation mode on one device."""

    def __init__(self, config: ModelConfig) -> None:
        """Load the weights from a local folder or the hub.

        Raises ValueError when CUDA is asked for and absent, or when transformer-lens cannot load the model.
        """
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from transformer_lens.model_bridge import TransformerBridge

        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError('model.device = "cuda" but this worker sees no GPU: set model.device = "auto"')
        gpu = config.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if gpu else "cpu")
        where = resolve(config.name)
        try:
            self.bridge: Any = TransformerBridge.boot_transformers(
                str(where), device=self.device, dtype=getattr(torch, config.dtype), revision=config.revision
            )
        except (OSError, NotImplementedError) as error:
            raise ValueError(f"model.name: cannot load {config.name}: {error}") from error
        self.bridge.eval()
        architecture = str(self.bridge.cfg.architecture)
        self.identity = ModelIdentity(
            name=config.name,
            fingerprint=_hub_commit(where, config.revision) if isinstance(where, str) else files_digest(where),
            num_layers=int(self.bridge.cfg.n_layers),
            d_model=int(self.bridge.cfg.d_model),
            dtype=config.dtype,
            causal=architecture.endswith(_CAUSAL),
        )

        for field in ("d_model", "num_layers"):
            told, found = getattr(config, field), getattr(self.identity, field)
            if told not in {None, found}:
                raise ValueError(f"model.{field} is {told}, but {config.name} has {found}: correct it or leave it out")

    def check_hooks(self, hooks: tuple[str, ...]) -> None:
        """Raise ValueError naming the first hook point that this model lacks."""
        for hook in hooks:
            if hook not in self.bridge.hook_dict:
                known = ", ".join(h for h in self.bridge.hook_dict if h.startswith(f"blocks.{layer_of(hook)}.hook"))
                raise ValueError(
                    f"harvest.hooks: {self.identity.name} has no {hook}; its block has {known or 'nothing'}"
                )

    @torch.inference_mode()
    def activations(
        self, tokens: torch.Tensor, padding: torch.Tensor, hooks: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """One forward pass that stops after the last needed layer.

        `tokens` int64 [batch, seq]; `padding` bool [batch, seq], true where there is no text. Returns hook -> [batch,
        seq, d].
        """
        _, cache = self.bridge.run_with_cache(
            tokens.to(self.device),
            return_cache_object=False,
            names_filter=list(hooks),
            stop_at_layer=1 + max(layer_of(hook) for hook in hooks),
            **self._mask(padding),
        )
        return {hook: cache[hook] for hook in hooks}

    @torch.inference_mode()
    def logits(
        self, tokens: torch.Tensor, padding: torch.Tensor, hook: str | None = None, splice: Splice | None = None
    ) -> torch.Tensor:
        """Next-token logits [batch, seq, vocabulary]; with `hook`, its activation [batch, seq, d] is replaced by
        `splice` of it."""
        on_device = tokens.to(self.device)
        if hook is None or splice is None:
            return torch.as_tensor(self.bridge(on_device, return_type="logits", **self._mask(padding)))
        hooks = [(hook, lambda activation, hook: splice(activation))]
        return torch.as_tensor(
            self.bridge.run_with_hooks(on_device, return_type="logits", fwd_hooks=hooks, **self._mask(padding))
        )

    def _mask(self, padding: torch.Tensor) -> dict[str, torch.Tensor]:
        # Padding is on the right, where causal attention never looks; an encoder must be told.
        if self.identity.causal:
            return {}
        return {"attention_mask": (~padding).long().to(self.device)}


def _hub_commit(name: str, revision: str | None) -> str:
    """Name and commit of the files that were loaded just now; the model itself has forgotten its commit."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    if commit is None:
        raise ValueError(f"model.name: the hub gave no commit for {name}: name a folder with the model instead")
    return f"hub:{name}@{commit}"
