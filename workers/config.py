"""What the workers can be told: models, text, harvests, SAEs, training, evaluation.

Only the standard library and pydantic, so that a bad recipe is refused before torch or Ray are imported.
Read by every room of `workers` and by `services.config`, which adds storage and cluster.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class FrozenConfig(BaseModel):
    """Base of every config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(FrozenConfig):
    """The language model whose activations are harvested."""

    name: str = "tiny"
    """`tiny` (shipped), `minilm` (the `[real]` extra), a folder with a Hugging Face model, or a hub name."""
    revision: str | None = None
    """Hub revision; the commit it resolves to is what the dataset records."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the forward pass runs; `auto` takes the actor's GPU where it has one."""
    d_model: int | None = Field(None, ge=1)
    """Width of the residual stream, for the plan of a hub model before it is downloaded; checked when it loads."""
    num_layers: int | None = Field(None, ge=1)
    """Number of blocks, likewise."""
    num_parameters: float | None = Field(None, gt=0)
    """Number of parameters, for the plan alone."""


class TextConfig(FrozenConfig):
    """Where text comes from."""

    source: Literal["stdlib", "files", "sae-probes", "hub"] = "stdlib"
    """`stdlib`: Python's own; `files`: text, JSONL or Parquet by glob; `sae-probes`: the wheel's labelled sets; `hub`.
    """
    paths: tuple[str, ...] = ()
    """Globs of .txt, .py, .md, .jsonl or .parquet files (`files`), or the wheel (`sae-probes`)."""
    field: str = "text"
    """The column that holds the text (JSONL, Parquet, hub)."""
    dataset: str | None = None
    """Hub data set, streamed with the `datasets` package (`hub`)."""
    subset: str | None = None
    """Hub data set's configuration."""
    split: str = "train"
    """Hub data set's split."""
    revision: str | None = None
    """Hub data set's revision; required for a reproducible dataset id."""
    held_out_share: float = Field(0.15, gt=0, lt=1)
    """Share of documents, by hash of their name, kept for evaluation (every source but `stdlib`, whose rule is fixed).
    """

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError('text.paths is empty: with text.source = "files" name at least one glob')
        if self.source == "hub" and not self.dataset:
            raise ValueError('text.dataset is missing: with text.source = "hub" name a data set')
        return self


class HarvestConfig(FrozenConfig):
    """How text becomes rows of activations."""

    hooks: tuple[str, ...] = Field(("blocks.2.hook_resid_post",), min_length=1)
    """Hook points, all read in one forward pass that stops after the last needed layer."""
    context_tokens: int = Field(128, ge=8)
    """Length of a window in tokens, BOS included."""
    packing: Literal["document", "packed"] = "document"
    """`document`: a window holds one document, the last one padded; `packed`: documents follow each other."""
    batch_sequences: int = Field(32, ge=1)
    """Windows per forward pass."""
    max_rows: int | None = Field(None, ge=1)
    """Upper bound on rows (tokens, padding included); required for `text.source = "hub"`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the stored activations."""

    @model_validator(mode="after")
    def _hooks_are_distinct(self) -> Self:
        if len(set(self.hooks)) != len(self.hooks):
            raise ValueError("harvest.hooks names a hook twice: remove the repeated one")
        return self


class SAEConfig(FrozenConfig):
    """One sparse autoencoder: BatchTopK, nested (Matryoshka) or not."""

    name: Slug
    """Names its folder and its rows in the report."""
    hook: str
    """Which of `harvest.hooks` it reads."""
    d_latent: int = Field(ge=2)
    """Number of latents."""
    k: int = Field(ge=1)
    """Mean number of active latents per token in training (BatchTopK)."""
    nesting: Literal["none", "fixed", "random"] = "none"
    """`fixed`: the loss is the mean over `widths`; `random`: over `num_prefixes` lengths drawn anew for each batch."""
    widths: tuple[int, ...] = ()
    """Nested widths, increasing, the last one d_latent (`fixed`)."""
    num_prefixes: int = Field(10, ge=2)
    """Prefixes per batch, d_latent always among them (`random`)."""
    prefix_law: Literal["sqrt", "pareto"] = "sqrt"
    """Law of a random length l: `sqrt` falls as l^-0.5 (the author's code), `pareto` as l^-1.5 (textbook Pareto(0.5)).
    """
    seed: Seed = 0
    """Initial weights and random prefixes."""

    @model_validator(mode="after")
    def _values_are_possible(self) -> Self:
        where = f"saes.{self.name}"
        if self.k > self.d_latent:
            raise ValueError(f"{where}.k is {self.k}, above d_latent = {self.d_latent}: lower k")
        if self.nesting == "fixed":
            if not self.widths:
                raise ValueError(
                    f'{where}.widths is empty: nesting = "fixed" needs increasing widths ending in d_latent'
                )
            if any(a >= b for a, b in zip(self.widths, self.widths[1:], strict=False)) or self.widths[0] < 1:
                raise ValueError(
                    f"{where}.widths is {list(self.widths)}: nested widths must increase strictly from 1 or more"
                )
            if self.widths[-1] != self.d_latent:
                raise ValueError(
                    f"{where}.widths ends in {self.widths[-1]}: the last width must be d_latent = {self.d_latent}"
                )
        elif self.widths:
            raise ValueError(
                f'{where}.widths is set but nesting is "{self.nesting}": set nesting = "fixed" or drop widths'
            )
        if self.nesting == "random" and self.num_prefixes > self.d_latent:
            raise ValueError(f"{where}.num_prefixes is above d_latent = {self.d_latent}: lower it")
        return self

    @property
    def variant(self) -> str:
        """The field's name for what this config describes."""
        return {
            "none": "batch_topk",
            "fixed": "matryoshka_batch_topk",
            "random": "matryoshka_batch_topk_random_prefixes",
        }[self.nesting]


class TrainConfig(FrozenConfig):
    """How every SAE of a run is trained, on one stream."""

    rows: int = Field(2_000_000, ge=1)
    """Rows (tokens) each SAE is trained on; epochs follow each other until they are spent."""
    batch_rows: int = Field(2048, ge=2)
    """Rows per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Adam's decay of the second moment."""
    warmup_share: float = Field(0.02, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """Share of the steps, the last ones, over which it falls linearly to 0."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global gradient norm of one SAE; none: no clipping."""
    aux_weight: float = Field(1 / 32, ge=0)
    """Weight of the AuxK loss (Gao et al. 2024) that revives dead latents; 0 turns it off."""
    aux_k: int | None = Field(None, ge=1)
    """Dead latents AuxK may use per token; none: d_in / 2."""
    dead_after_rows: int = Field(200_000, ge=1)
    """A latent that has not fired for so many rows is dead; a tenth of `rows` is usual (10 million of a long run)."""
    threshold_rate: float = Field(0.01, gt=0, le=1)
    """Rate of the running mean of each batch's smallest active value, which becomes the inference threshold."""
    window_chunks: int = Field(16, ge=1)
    """Chunks mixed with each other in the shuffle."""
    publish_every_rows: int | None = Field(None, ge=1)
    """Publish a checkpoint for evaluation so often; none: at the end only."""
    save_every_seconds: float = Field(30.0, gt=0)
    """Save the resume state so often; what a killed trainer loses at most."""
    compute: Literal["fast", "reference"] = "fast"
    """`reference` is the dense formula that the sparse path must equal."""
    seed: Seed = 0
    """Order of the rows."""

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.batch_rows > self.rows:
            raise ValueError(f"train.batch_rows is {self.batch_rows}, above train.rows = {self.rows}: lower it")
        return self

    @property
    def num_steps(self) -> int:
        """Whole batches within `rows`."""
        return self.rows // self.batch_rows


class EvalConfig(FrozenConfig):
    """What is measured on each published checkpoint, on held-out documents."""

    max_sequences: int = Field(256, ge=8)
    """Held-out windows for fidelity (cross-entropy, KL, FVU, L0)."""
    prefixes: tuple[int, ...] = ()
    """Prefix lengths at which every SAE's FVU is given; empty: the fixed Matryoshka SAE's widths, else octaves."""
    probing_k: tuple[int, ...] = (1, 2, 5)
    """Numbers of latents a sparse probe may read."""
    probing_sequences: int = Field(512, ge=8)
    """Windows from which probes are fitted and tested, split by document."""
    examples_per_class: int = Field(1000, ge=50)
    """At most so many tokens of a concept, and as many of the rest, to fit a probe; half as many to test it."""
    min_examples: int = Field(100, ge=10)
    """A concept with fewer positive tokens in either split is left out, and the report says so."""
    num_controls: int = Field(10, ge=1)
    """Random-direction controls beside each sparse probe."""
    erasure_n: tuple[int, ...] = (2, 5, 10, 20)
    """Numbers of latents erased (TPP)."""
    num_latents: int = Field(36, ge=0)
    """Latents shown with their top tokens in context."""
    contexts_per_latent: int = Field(6, ge=1)
    """Contexts shown for each of them."""
    seed: Seed = 0
    """Sampling of examples and controls."""
