"""The standard library as a corpus: what is left out, how files decode, and a split that never changes."""

import sysconfig
from pathlib import Path
from typing import get_args

import pytest

from workers.texts.documents import Document
from workers.texts.stdlib import Split, documents_below, split_of, stdlib_documents

SPLITS: tuple[Split, ...] = get_args(Split)


def _all_below(root: Path) -> list[Document]:
    return sorted((d for split in SPLITS for d in documents_below(root, split)), key=lambda document: document.name)


def _write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "split"),
    [("inspect.py", "train"), ("json/decoder.py", "harvest"), ("os.py", "held_out")],
)
def test_the_split_of_a_path_never_changes(name: str, split: Split) -> None:
    assert split_of(name) == split


def test_splits_have_their_shares_of_many_paths() -> None:
    splits = [split_of(f"package/module_{number}.py") for number in range(20_000)]
    shares = [splits.count(split) / len(splits) for split in ("train", "harvest", "held_out")]
    assert shares == pytest.approx([0.50, 0.35, 0.15], abs=0.02)


def test_the_standard_library_is_split_without_overlap_or_loss() -> None:
    documents = {split: stdlib_documents(split) for split in SPLITS}
    names = [document.name for split in SPLITS for document in documents[split]]
    assert len(set(names)) == len(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    for split in SPLITS:
        own = [document.name for document in documents[split]]
        assert len(own) > 50
        assert own == sorted(own)
        assert all(split_of(name) == split for name in own)


def test_a_document_holds_its_file() -> None:
    document = next(document for document in stdlib_documents(split_of("bisect.py")) if document.name == "bisect.py")
    path = Path(sysconfig.get_path("stdlib")) / "bisect.py"
    assert document.text == path.read_bytes().decode().replace("\r\n", "\n")


def test_tests_packages_caches_and_other_files_are_left_out(tmp_path: Path) -> None:
    kept = ["a.py", "json/tool.py", "tester/c.py", "testing.py"]
    left_out = ["site-packages/x.py", "dist-packages/x.py", "test/x.py", "json/tests/x.py", "idlelib/idle_test/x.py"]
    left_out += ["__pycache__/x.py", "config-3.11-linux/x.py", "readme.txt", "a.pyc"]
    for name in kept + left_out:
        _write(tmp_path, name, b"x = 1\n")
    assert [document.name for document in _all_below(tmp_path)] == kept


def test_files_decode_as_python_decodes_them(tmp_path: Path) -> None:
    _write(tmp_path, "bom.py", b"\xef\xbb\xbfx = '\xc3\xa9'\r\n")
    _write(tmp_path, "cookie.py", b"# -*- coding: latin-1 -*-\r\nx = '\xe9'\r")
    assert [document.text for document in _all_below(tmp_path)] == [
        "x = 'é'\n",
        "# -*- coding: latin-1 -*-\nx = 'é'\n",
    ]


def test_empty_and_undecodable_files_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path, "good.py", b"x = 1\n")
    _write(tmp_path, "empty.py", b"")
    _write(tmp_path, "bad_bytes.py", b"x = '\xff\xfe'\n")
    _write(tmp_path, "bad_bytes_late.py", b"x = 1\n" * 10_000 + b"\xff\n")
    _write(tmp_path, "bad_cookie.py", b"# coding: no-such-encoding\n")
    assert [document.name for document in _all_below(tmp_path)] == ["good.py"]
