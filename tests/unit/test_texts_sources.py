"""Text sources: what the user names is what is read, in a fixed order, and held-out text is never harvested."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from workers.config import TextConfig
from workers.texts.sources import check_sources, documents, identify


def _write(folder: Path) -> TextConfig:
    texts = [f"text number {n}" for n in range(40)]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts[1:20]))
    parquet.write_table(pa.table({"body": texts[20:]}), folder / "c.parquet")
    return TextConfig(source="files", paths=(str(folder / "*"),), field="body", held_out_share=0.3)


def test_text_jsonl_and_parquet_are_read_and_split_without_overlap(tmp_path: Path) -> None:
    config = _write(tmp_path)
    harvest = [document.text for document in documents(config, "harvest")]
    held_out = [document.text for document in documents(config, "held_out")]
    assert sorted(harvest + held_out) == sorted(f"text number {n}" for n in range(40))
    assert 0 < len(held_out) < len(harvest)
    assert harvest == [document.text for document in documents(config, "harvest")]


def test_equal_texts_fall_into_the_same_part(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"t{n % 7}"}) for n in range(70)))
    config = TextConfig(source="files", paths=(str(tmp_path / "*.jsonl"),), held_out_share=0.4)
    harvest = {document.text for document in documents(config, "harvest")}
    assert not harvest & {document.text for document in documents(config, "held_out")}


def test_the_identity_follows_the_contents(tmp_path: Path) -> None:
    config = _write(tmp_path)
    before = identify(config, "harvest").fingerprint
    assert before == identify(config, "harvest").fingerprint != identify(config, "held_out").fingerprint
    (tmp_path / "d.txt").write_text("one more, which may fall into either part")
    (tmp_path / "e.txt").write_text("and another one")
    (tmp_path / "f.txt").write_text("and a third one")
    assert before != identify(config, "harvest").fingerprint


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    config = _write(tmp_path).model_copy(update={"field": "text"})
    with pytest.raises(ValueError, match="has no text in 'text'; it has body"):
        list(documents(config, "harvest"))


def test_a_glob_that_matches_nothing_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="correct the glob"):
        check_sources(TextConfig(source="files", paths=(str(tmp_path / "*.txt"),)))
    with pytest.raises(ValueError, match="pip download --no-deps sae-probes"):
        check_sources(TextConfig(source="sae-probes", paths=(str(tmp_path / "*.whl"),)))


def test_blank_lines_and_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n\n')
    config = TextConfig(source="files", paths=(str(tmp_path / "**"),), held_out_share=1e-6)
    assert [(Path(d.name).name, d.text) for d in documents(config, "harvest")] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", "two"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'"one"', r"a\.jsonl:1 is not a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(TextConfig(source="files", paths=(str(tmp_path / "*"),)), "harvest"))


def test_newlines_of_every_system_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    config = TextConfig(source="files", paths=(str(tmp_path / "*"),), held_out_share=1e-6)
    assert [document.text for document in documents(config, "harvest")] == ["one\ntwo\nthree\n"]


def test_a_data_set_is_streamed_through_the_hubs_library(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"body": f"text {n}"}) for n in range(20)))
    config = TextConfig(source="hub", dataset=str(tmp_path), field="body", held_out_share=0.3)  # a folder is a data set
    found = {part: [document.text for document in documents(config, part)] for part in ("harvest", "held_out")}
    assert sorted(found["harvest"] + found["held_out"]) == sorted(f"text {n}" for n in range(20))
    assert found["held_out"]
