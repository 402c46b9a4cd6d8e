"""Python's standard library as a text corpus: it is on every machine that runs this code, so nothing is downloaded.

Reads files only; does not tokenise. The tiny model's training, the harvest and the probes all take their split from
here, so that no file serves two of them.
"""

import hashlib
import os
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

from workers.texts.documents import Document

Split = Literal["train", "harvest", "held_out"]

_LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def stdlib_documents(split: Split) -> list[Document]:
    """The documents of one split of the running interpreter's standard library, sorted by name."""
    return documents_below(Path(sysconfig.get_path("stdlib")), split)


def documents_below(root: Path, split: Split) -> list[Document]:
    """The documents of one split among the `.py` files below `root`, sorted by name (POSIX path relative to `root`).

    Left out: third parties' packages, tests, caches, build configuration, empty files, and files that do not decode.
    """
    documents = []
    for name in _source_names(root):
        if split_of(name) == split:
            text = _read_source(root / name)
            if text:
                documents.append(Document(name, text))
    return documents


def split_of(relative_path: str) -> Split:
    """The split of a file, decided by its POSIX path alone: half train, 35 % harvest, 15 % held out.

    The path's 64-bit BLAKE2b digest, read as a big-endian integer modulo 100, is the bucket; so the answer is the same
    in every process and Python version.
    """
    bucket = int.from_bytes(hashlib.blake2b(relative_path.encode(), digest_size=8).digest(), "big") % 100
    if bucket < 50:
        return "train"
    return "harvest" if bucket < 85 else "held_out"


def _source_names(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_left_out(name)]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(names)


def _is_left_out(folder_name: str) -> bool:
    return folder_name in _LEFT_OUT_FOLDERS or folder_name.startswith("config-")


def _read_source(path: Path) -> str | None:
    """The text as Python itself would decode it (byte-order mark, coding cookie, newlines), or None if it cannot."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # an unknown or contradictory cookie; bytes that are not of its encoding
        return None
