"""Where text comes from: one function from a TextConfig to documents, one to the identity of what they are.

Sources: Python's standard library, the user's files (text, JSONL, Parquet), the labelled sets inside the sae-probes
wheel, a hub data set. Each is split into `harvest` and `held_out` documents. Does not tokenise. Called by harvesting
and evaluating.
"""

import glob
import hashlib
import importlib.util
import io
import json
import os
import platform
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from storage.records import TextIdentity
from workers.config import TextConfig
from workers.texts.documents import Document
from workers.texts.stdlib import stdlib_documents

Part = Literal["harvest", "held_out"]

_PLAIN = {".txt", ".py", ".md"}
_WHEEL_TABLES = "sae_probes/data/cleaned_data/"


def documents(config: TextConfig, part: Part) -> Iterator[Document]:
    """Yield the documents of one part of a source, in a fixed order.

    `stdlib` is split by its own rule. Any other source is split by a hash of the text itself, so that a text that
    occurs twice never falls into both parts. Raises ValueError naming the field when there is nothing to read.
    """
    if config.source == "stdlib":
        yield from stdlib_documents(part)
        return
    for document in _all_documents(config):
        if _is_held_out(document.text, config.held_out_share) == (part == "held_out"):
            yield document


def identify(config: TextConfig, part: Part) -> TextIdentity:
    """What the documents of `part` are, by digest of their names and contents (hub: of the data set's coordinates)."""
    total = hashlib.sha256(part.encode())
    if config.source == "hub":
        total.update(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode())
        description = (
            f"hub data set {config.dataset}, split {config.split}, revision {config.revision or 'newest'}, {part} part"
        )
        return TextIdentity(source="hub", fingerprint=total.hexdigest(), description=description)
    count = 0
    if config.source == "sae-probes":
        for path in _matches(config.paths):
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        total.update(str(config.held_out_share).encode())
        description = f"the labelled sets of {', '.join(Path(p).name for p in _matches(config.paths))}, {part} part"
        return TextIdentity(source="sae-probes", fingerprint=total.hexdigest(), description=description)
    for document in documents(config, part):
        total.update(f"{document.name}\0{hashlib.sha256(document.text.encode()).hexdigest()}\n".encode())
        count += 1
    if config.source == "stdlib":
        description = f"standard library of Python {platform.python_version()}, {part} part, {count} files"
    else:
        description = f"{count} documents of {len(_matches(config.paths))} files, {part} part"
    return TextIdentity(source=config.source, fingerprint=total.hexdigest(), description=description)


def check_sources(config: TextConfig) -> None:
    """Raise ValueError, before anything starts, when files that the config names are not there."""
    if config.source in {"files", "sae-probes"}:
        _matches(config.paths, config.source)
    elif config.source == "hub" and importlib.util.find_spec("datasets") is None:
        raise ValueError('text.source = "hub" needs the package `datasets`: pip install datasets')


def check_held_out(config: TextConfig) -> None:
    """Raise ValueError, before a long run, when no document is left to evaluate on."""
    if next(iter(documents(config, "held_out")), None) is None:
        raise ValueError(
            "text: no document is held out for evaluation: name more documents, or raise text.held_out_share"
        )


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _matches(patterns: tuple[str, ...], source: str = "sae-probes") -> list[str]:
    found = sorted(
        {
            path
            for pattern in patterns
            for path in glob.glob(str(Path(pattern).expanduser()), recursive=True)
            if not Path(path).is_dir()
        }
    )
    if not found:
        hint = (
            "pip download --no-deps sae-probes, then name the wheel" if source == "sae-probes" else "correct the glob"
        )
        raise ValueError(f"text.paths: nothing matches {', '.join(patterns) or 'an empty list'}: {hint}")
    return found


def _all_documents(config: TextConfig) -> Iterator[Document]:
    if config.source == "hub":
        yield from _hub(config)
    elif config.source == "sae-probes":
        for path in _matches(config.paths):
            yield from _wheel(Path(path))
    else:
        files = [Path(path).absolute() for path in _matches(config.paths, "files")]
        base = os.path.commonpath([file.parent for file in files])
        for file in files:  # named from their common folder on: a moved corpus is the same corpus
            yield from _file(file, file.relative_to(base).as_posix(), config.field)


def _file(path: Path, name: str, field: str) -> Iterator[Document]:
    if path.suffix in _PLAIN:
        yield Document(name, _decoded(path.read_bytes(), str(path)))
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Document(
                        f"{name}:{number}", _text_of(_json(line, f"{path}:{number}"), field, f"{path}:{number}")
                    )
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield Document(f"{name}:{number}", _text_of(row, field, f"{path}:{number}"))
                number += 1
    else:
        raise ValueError(f"text.paths: {path} is not .txt, .py, .md, .jsonl or .parquet: narrow the glob")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"text.paths: {where} is not UTF-8 ({error}): convert it, or narrow the glob") from error


def _json(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"text.paths: {where} is not JSON ({error}): correct the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"text.paths: {where} is not a JSON object: each line must hold one, with a field of text")
    return row


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise ValueError(f"text.field: {where} has no text in {field!r}; it has {', '.join(row)}")
    return text


def _wheel(path: Path) -> Iterator[Document]:
    """One document of each table in turn, so that any first part holds every table. No code is imported."""
    import pyarrow
    import pyarrow.csv

    columns: dict[str, list[str]] = {}
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if not (name.startswith(_WHEEL_TABLES) and name.endswith(".csv.zst")):
                continue
            raw = pyarrow.CompressedInputStream(pyarrow.BufferReader(wheel.read(name)), "zstd").read()
            table = pyarrow.csv.read_csv(
                io.BytesIO(raw), parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)
            )
            columns[Path(name).name.removesuffix(".csv.zst")] = [str(text) for text in table["prompt"].to_pylist()]
    if not columns:
        raise ValueError(f"text.paths: {path} holds no tables under {_WHEEL_TABLES}: name the sae-probes wheel")
    for number in range(max(map(len, columns.values()))):
        for name, texts in columns.items():
            if number < len(texts):
                yield Document(f"{name}/{number}", texts[number])


def _hub(config: TextConfig) -> Iterator[Document]:
    import datasets

    stream = datasets.load_dataset(
        config.dataset, config.subset, split=config.split, revision=config.revision, streaming=True
    )
    for number, row in enumerate(stream):
        yield Document(f"{config.dataset}/{number}", _text_of(row, config.field, f"{config.dataset}/{number}"))
