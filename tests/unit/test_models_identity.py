"""Which model is meant: names, folders and hub commits are told apart before any activation is stored under them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.config import load_config
from workers.models.catalog import TINY, files_digest, is_local, resolve


def test_a_folder_needs_a_config_and_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    assert resolve(str(tmp_path)) == tmp_path


def test_the_digest_of_a_folder_follows_weights_and_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "tokenizer.json").write_text("{}")
    first = files_digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "card.json").write_text("{}")
    assert files_digest(tmp_path) == first
    (tmp_path / "tokenizer.json").write_text("{ }")
    second = files_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert len({first, second, files_digest(tmp_path)}) == 3


def test_a_shipped_name_means_the_shipped_model_whatever_folders_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == TINY
    assert load_config("tiny").with_absolute_paths().model.name == "tiny"
    assert not is_local("somebody/model")


def test_a_hub_model_is_known_by_its_name_and_commit(tmp_path: Path) -> None:
    """From a cache laid out as the hub's client lays it out; the loaded model does not tell its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(TINY / "config.json")
    refs = tmp_path / "models--somebody--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    script = "from workers.models.language_model import _hub_commit; print(_hub_commit('somebody/model', None))"
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"hub:somebody/model@{commit}", done.stderr
