"""RunConfig: everything a run can be told, from a TOML recipe and `--set a.b=c`. Heavy imports come after.

Standard library and pydantic only. Unknown keys, wrong types and impossible values are refused with one sentence.
"""

import hashlib
import json
import os
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from storage.config import StorageConfig
from workers.config import EvalConfig, FrozenConfig, HarvestConfig, ModelConfig, SAEConfig, TextConfig, TrainConfig
from workers.models.catalog import SHIPPED, check_context, check_hooks
from workers.texts.sources import check_sources

RECIPES = Path(__file__).parent / "recipes"

_NOT_IN_RUN_ID = {"cluster": True, "storage": {"root", "verify_reads", "num_retries", "timeout_seconds"}}


class ClusterConfig(FrozenConfig):
    """Where the actors run, and where their metrics are served. No part of a run's identity."""

    address: str | None = None
    """Ray address to join (`auto`, `ray://host:10001`, host:6379); none starts Ray on this machine."""
    num_cpus: int = Field(default_factory=lambda: max(2, os.cpu_count() or 2), ge=1)
    """Cores for a Ray that we start."""
    object_store_bytes: int = Field(1 << 30, ge=80 << 20)
    """Object store of a Ray that we start; activations never pass through it."""
    num_harvesters: int = Field(2, ge=1)
    """Harvester actors."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs of each harvester, trainer and evaluator; 0: the actors use the CPU."""
    metrics_host: str = "127.0.0.1"
    """Address that /metrics and /health listen on."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """Their port; 0 takes a free one."""
    shared_filesystem: bool = False
    """Says that a local root is the same folder on every node of a joined cluster."""


class RunConfig(FrozenConfig):
    """One run: a model, text, a harvest, SAEs, their training and evaluation."""

    recipe: str = "custom"
    """Name of the recipe it came from."""
    storage: StorageConfig = StorageConfig()
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    harvest: HarvestConfig = HarvestConfig(hooks=("blocks.2.hook_resid_post",))
    saes: tuple[SAEConfig, ...] = Field(min_length=1)
    train: TrainConfig = TrainConfig()
    evaluate: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = [sae.name for sae in self.saes]
        if len(set(names)) != len(names):
            raise ValueError(f"saes: the name {max(names, key=names.count)} occurs twice: names must differ")
        for sae in self.saes:
            if sae.hook not in self.harvest.hooks:
                raise ValueError(f"saes.{sae.name}.hook is {sae.hook}, which harvest.hooks does not list: add it there")
        if self.storage.rows_per_chunk % self.harvest.context_tokens:
            raise ValueError(
                f"storage.rows_per_chunk = {self.storage.rows_per_chunk} is no multiple of harvest.context_tokens = "
                f"{self.harvest.context_tokens}: a window must lie in one chunk"
            )
        if self.text.source == "hub" and self.harvest.max_rows is None:
            raise ValueError("harvest.max_rows is missing: a hub data set is streamed, say how many rows to harvest")
        if self.harvest.max_rows is not None and self.harvest.max_rows < self.harvest.context_tokens:
            raise ValueError("harvest.max_rows is below harvest.context_tokens: allow at least one window")
        narrowest = min(sae.d_latent for sae in self.saes)
        if any(not 1 <= prefix <= narrowest for prefix in self.evaluate.prefixes):
            raise ValueError(f"evaluate.prefixes must lie between 1 and the smallest d_latent = {narrowest}")
        if not self.evaluate.probing_k or not 1 <= min(self.evaluate.probing_k) <= narrowest:
            raise ValueError(f"evaluate.probing_k must start between 1 and the smallest d_latent = {narrowest}")
        if not self.evaluate.erasure_n or min(self.evaluate.erasure_n) < 1:
            raise ValueError("evaluate.erasure_n must hold numbers of latents, 1 or more")
        return self

    @property
    def eval_prefixes(self) -> tuple[int, ...]:
        """Prefix lengths at which every SAE's FVU is given."""
        if self.evaluate.prefixes:
            return self.evaluate.prefixes
        narrowest = min(sae.d_latent for sae in self.saes)
        for sae in self.saes:
            if sae.nesting == "fixed" and sae.d_latent == narrowest:
                return sae.widths
        return tuple(narrowest >> shift for shift in range(5, -1, -1) if narrowest >> shift)

    def identity(self) -> dict[str, Any]:
        """The configuration without what says where and how fast a run happens."""
        return self.model_dump(mode="json", exclude=_NOT_IN_RUN_ID)  # type: ignore[arg-type]

    @property
    def run_id(self) -> str:
        """Digest of the configuration without root, addresses and ports: the same run is found again anywhere."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return f"{self.recipe}-{digest[:12]}"

    def with_absolute_paths(self) -> Self:
        """The same for workers, which run in other folders: root, model folder and globs are absolute."""
        root, name = self.storage.root, self.model.name
        paths = tuple(str(Path(path).expanduser().absolute()) for path in self.text.paths)
        if "://" not in root:
            root = str(Path(root).expanduser().absolute())
        if name not in SHIPPED and Path(name).expanduser().is_dir():
            name = str(Path(name).expanduser().absolute())
        return self.model_copy(
            update={
                "storage": self.storage.model_copy(update={"root": root}),
                "model": self.model.model_copy(update={"name": name}),
                "text": self.text.model_copy(update={"paths": paths}),
            }
        )

    def check(self, *, starts: bool = True) -> None:
        """Refuse, before anything starts, what can be known to fail: hooks, files, root, and a port that it needs."""
        check_hooks(self.model, self.harvest.hooks)
        check_context(self.model, self.harvest.context_tokens)
        check_sources(self.text)
        root, cluster = self.storage.root, self.cluster
        if root.startswith("memory:"):
            raise ValueError(
                f"storage.root = {root} exists in one process only; a run has several: name a folder or a bucket"
            )
        local = "://" not in root or root.startswith("file://")
        if local and cluster.address not in {None, "auto", "local"} and not cluster.shared_filesystem:
            raise ValueError(
                f"storage.root = {root} is a folder of one machine, but cluster.address joins a cluster: "
                "use a bucket, or pass --set cluster.shared_filesystem=true if every node sees that folder"
            )
        if starts:
            check_port(cluster.metrics_host, cluster.metrics_port)


def check_port(host: str, port: int) -> None:
    """Raise ValueError when the metrics port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cluster.metrics_port = {port} on {host} cannot be used ({error.strerror}): "
                "pass --set cluster.metrics_port=0 for a free one"
            ) from error


def load_config(
    recipe: str, overrides: list[str] | None = None, root: str | None = None, address: str | None = None
) -> RunConfig:
    """Read a shipped recipe by name or a TOML file by path, apply `a.b=c` overrides, validate.

    Raises ValueError with one sentence that names the field and the fix.
    """
    path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"there is no recipe {recipe}: name a .toml file or one of {shipped}")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    content.setdefault("recipe", path.stem)
    for override in overrides or []:
        _override(content, override)
    if root is not None:
        content.setdefault("storage", {})["root"] = root
    if address is not None:
        content.setdefault("cluster", {})["address"] = address
    return parse(content, str(path.name))


def storage_at(root: str) -> StorageConfig:
    """Storage at a root; ValueError with one sentence, which never repeats a secret, otherwise."""
    try:
        return StorageConfig(root=root)
    except ValidationError as error:
        raise ValueError(_first_error(error, "--root")) from None


def parse(content: dict[str, Any], where: str) -> RunConfig:
    """Validate a config as parsed from TOML or JSON; ValueError with one sentence otherwise."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(_first_error(error, where)) from error


def _first_error(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where}: {field} is missing: add it"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {field}: remove it or correct its spelling"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {field}: {message}" if first["type"] != "value_error" else f"{where}: {message}"


def _override(content: dict[str, Any], text: str) -> None:
    """Apply one `a.b=c`; the value is read as TOML, a bare word as a string; `saes.NAME.k=8` reaches into the list."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"--set {text}: write it as field=value, for example train.rows=100000")
    *parents, last = path.split(".")
    target: Any = content
    for part in parents:
        target = _child(target, part, text)
    if not isinstance(target, dict):
        raise ValueError(f"--set {text}: {'.'.join(parents)} has no fields")
    target[last] = _toml_value(value)


def _child(target: Any, part: str, text: str) -> Any:
    if isinstance(target, list):
        for item in target:
            if isinstance(item, dict) and item.get("name") == part:
                return item
        raise ValueError(f"--set {text}: nothing in the list is named {part}")
    if not isinstance(target, dict):
        raise ValueError(f"--set {text}: {part} has no fields")
    return target.setdefault(part, {})


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
