"""Concept labels of Python source: what each rule marks, and that the hierarchy holds on real files."""

import io
import keyword
import re
import sys
import tokenize

import numpy as np
import pytest

from workers.texts.concepts import label_document, load_concepts, nested_concepts
from workers.texts.stdlib import stdlib_documents

CONCEPTS = load_concepts()
NAMES = [concept.name for concept in CONCEPTS]
SPECIMEN = '''"""A module."""
import os.path as osp
from . import x

@functools.cache
def f(self, a=1, *, b: int = 2) -> None:
    """A function."""
    for i in range(10):
        if i == a + b:  # a comment
            return self.value[i]
    try:
        raise ValueError("no") from None
    except ValueError:
        pass

class Thing:
    def method(self): return not True
'''


def labels_of(text, pieces, name="module.py"):
    """Label sets of the given pieces, found one after the other in the text."""
    spans, at = [], 0
    for piece in pieces:
        start = text.index(piece, at)
        spans.append((start, start + len(piece)))
        at = start + len(piece)
    labels = label_document(name, text, spans, CONCEPTS)
    return [{NAMES[column] for column in np.flatnonzero(row)} for row in labels]


def bearing(text, concept, name="module.py"):
    """Which words and signs of the text bear a concept."""
    matches = list(re.finditer(r"\w+|[^\w\s]", text))
    labels = label_document(name, text, [match.span() for match in matches], CONCEPTS)
    return [match.group() for match, row in zip(matches, labels, strict=True) if row[NAMES.index(concept)]]


def test_the_data_form_a_hierarchy():
    assert 30 <= len(CONCEPTS) <= 45
    assert len(set(NAMES)) == len(NAMES)
    by_name = {}
    for concept in CONCEPTS:
        assert concept.description.endswith(".")
        if concept.parent is not None:
            parent = by_name[concept.parent]  # comes first
            assert parent.kind == concept.kind
            assert not parent.words or set(concept.words) < set(parent.words)
        by_name[concept.name] = concept


def test_every_concept_without_words_has_a_rule():
    for concept in CONCEPTS:
        if not concept.words:
            assert bearing(SPECIMEN, concept.name), concept.name


def test_keywords_bear_their_own_label_and_those_above():
    found = labels_of("x = [i for i in y if True]\nmatch = None\n", ["for", "in", "if", "True", "match", "None"])
    assert found == [
        {"keyword", "loop_keyword", "for"},
        {"keyword", "logic_keyword"},
        {"keyword", "branch_keyword", "if"},
        {"keyword", "constant_keyword"},
        {"name"},
        {"keyword", "constant_keyword", "none"},
    ]


def test_operators_and_numbers():
    found = labels_of("a.b += (3 <= 0x1F) ** 2 @ c\n", [".", "+=", "(", "3", "<=", "0x1F", ")", "**", "@"])
    kinds = ["dot", "assignment", "bracket", None, "comparison", None, "bracket", "arithmetic", None]
    expected = [{"operator"} | ({kind} if kind else set()) for kind in kinds]
    expected[3] = expected[5] = {"number"}
    assert found == expected


def test_names_by_their_role():
    assert bearing(SPECIMEN, "function_name") == ["f", "method"]
    assert bearing(SPECIMEN, "class_name") == ["Thing"]
    assert bearing(SPECIMEN, "parameter") == ["self", "a", "b", "self"]
    assert bearing(SPECIMEN, "attribute") == ["cache", "value"]  # not path of os.path in an import
    assert bearing(SPECIMEN, "self") == ["self"] * 3
    assert bearing("g = lambda p, *q: p.r\n", "parameter") == ["p", "q"]


def test_only_documenting_strings_are_docstrings():
    text = 'def f():\n    """One\n\n    two."""\n    "three"\n    return "four"\n'
    assert bearing(text, "docstring") == ['"', '"', '"', "One", "two", ".", '"', '"', '"']
    assert {"three", "four"} < set(bearing(text, "string"))


def test_a_docstring_in_pieces_leaves_out_the_comment_between():
    text = 'class C:\n    ("one"  # why\n     "two")\n'
    assert bearing(text, "docstring") == ['"', "one", '"', '"', "two", '"']
    assert bearing(text, "comment") == ["#", "why"]


def test_a_string_over_several_lines_is_one_string_and_holds_no_keywords():
    text = 'x = """if\n\tdef é # no\n"""\n'
    assert bearing(text, "keyword") == []
    assert bearing(text, "comment") == []
    assert bearing(text, "string") == ['"', '"', '"', "if", "def", "é", "#", "no", '"', '"', '"']


def test_places_after_characters_of_several_bytes():
    text = 'ü = "日本"; é.ñandú = lambda 値: é.𝒳\n'
    assert bearing(text, "attribute") == ["ñandú", "𝒳"]
    assert bearing(text, "parameter") == ["値"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="f-strings are split since Python 3.12")
def test_an_f_string_is_one_string_before_312():
    text = 'x = f"if {a.b} {{" + c.d\n'
    assert set("ab") < set(bearing(text, "string"))
    assert bearing(text, "attribute") == ["d"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="f-strings are one token before Python 3.12")
def test_an_f_string_has_names_within_since_312():
    text = 'x = f"if {a.b} {{" + c.d\n'
    assert not set("ab") & set(bearing(text, "string"))
    assert bearing(text, "attribute") == ["b", "d"]


def test_the_literal_parts_of_an_f_string_are_strings():
    text = 'x = f"if{{b{a}}}" f"""def\nclass"""\n'
    assert bearing(text, "keyword") == []
    assert {'"', "if", "b", "def", "class"} < set(bearing(text, "string"))
    assert bearing(text, "string").count("{") >= 2  # both of {{


def test_scopes_run_from_the_first_statement_of_a_body_to_its_last():
    text = "class A:\n    @d\n    def f(x):\n        while x:\n            y\n        else:\n            z\nw\n"
    assert bearing(text, "in_class") == re.findall(r"\w+|[^\w\s]", text[text.index("@") : text.index("w\n")])
    assert bearing(text, "in_function") == ["while", "x", ":", "y", "else", ":", "z"]
    assert bearing(text, "in_loop") == ["y"]
    assert bearing(text, "decorator") == ["@", "d"]


def test_a_decorator_starts_at_its_own_at_sign():
    text = "@a(b @ c)\n@(\n  e)\nclass D: x @ y\n"
    assert bearing(text, "decorator") == ["@", "a", "(", "b", "@", "c", ")", "@", "(", "e"]


def test_only_the_body_of_try_counts():
    text = "try:\n    a\nexcept E:\n    b\nelse:\n    c\nfinally:\n    d\n"
    assert bearing(text, "in_try") == ["a"]


def test_white_space_has_scopes_and_package_but_no_token_labels():
    text = 'def f():\n    """One\n    two."""\n    return 1\n'
    found = labels_of(text, ["\n    ", "\n    ", "\n    ", " ", "\n"], "email/parser.py")
    assert found == [{"email"}, *[{"email", "in_function"}] * 3, {"email"}]


def test_a_token_with_leading_space_is_labelled_by_its_first_visible_character():
    assert labels_of("if x:\n\treturn_ = 1\n", ["\n\treturn", "_ ="]) == [{"name"}, {"name"}]
    assert labels_of("a = not b\n", [" not b"]) == [{"keyword", "logic_keyword"}]


def test_a_line_continuation_is_no_python_token():
    assert labels_of("a = 1 + \\\n  b\n", ["+", " \\\n", "b"]) == [{"operator", "arithmetic"}, set(), {"name"}]


def test_a_form_feed_ends_no_line():
    assert bearing("a = 1\n\x0c\nb.c = 2  # é\x0b\u2028\nd.e\n", "attribute") == ["c", "e"]


def test_empty_spans_have_no_label():
    labels = label_document("email/x.py", "a = 1\n", [(0, 0), (0, 1), (6, 6)], CONCEPTS)
    assert labels.any(axis=1).tolist() == [False, True, False]
    assert not label_document("email/x.py", "@d\ndef f(): pass\n", [(0, 0), (12, 12)], CONCEPTS).any()  # within scopes
    assert label_document("email/x.py", "", [(0, 0)], CONCEPTS).tolist() == [[False] * len(CONCEPTS)]
    assert label_document("x.py", "a = 1\n", [], CONCEPTS).shape == (0, len(CONCEPTS))


def test_the_package_is_the_first_folder():
    assert bearing("a\n", "asyncio", "asyncio/events.py") == ["a"]
    assert bearing("a\n", "asyncio", "asyncio.py") == []
    assert bearing("a\n", "asyncio", "xml/asyncio/b.py") == []


@pytest.mark.parametrize("text", ["def f(:\n", 'x = """open\n', "if x:\na\n", "a = 1\0", "a = '\ud800'\n", "(\n"])
def test_what_does_not_parse_gives_none(text):
    assert label_document("x.py", text, [(0, 1)], CONCEPTS) is None


def test_an_offset_outside_the_text_is_refused():
    with pytest.raises(ValueError, match=r"x\.py.*outside the text of 2 characters"):
        label_document("x.py", "a\n", [(0, 3)], CONCEPTS)


def test_on_the_standard_library_a_child_implies_its_parent():
    parents = [(NAMES.index(concept.name), NAMES.index(concept.parent)) for concept in CONCEPTS if concept.parent]
    seen = np.zeros(len(CONCEPTS), dtype=bool)
    for document in stdlib_documents("held_out")[::6]:
        spans = [(start, min(start + 3, len(document.text))) for start in range(0, len(document.text), 3)]
        labels = label_document(document.name, document.text, spans, CONCEPTS)
        for child, parent in parents:
            assert not (labels[:, child] & ~labels[:, parent]).any(), (document.name, NAMES[child])
        seen |= labels.any(axis=0)
    assert seen[[concept.kind != "file" for concept in CONCEPTS]].all()


def test_on_the_standard_library_token_labels_are_those_of_tokenize():
    for document in stdlib_documents("held_out")[::12]:
        starts = np.cumsum([0, *(len(line) + 1 for line in document.text.split("\n"))])
        tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(document.text).readline)
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.STRING, tokenize.COMMENT, tokenize.NUMBER)
        ]
        spans = [(starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1]) for t in tokens]
        labels = dict(zip(NAMES, label_document(document.name, document.text, spans, CONCEPTS).T, strict=True))
        for number, token in enumerate(tokens):
            is_keyword = token.type == tokenize.NAME and keyword.iskeyword(token.string)
            assert labels["keyword"][number] == is_keyword
            assert labels["name"][number] == (token.type == tokenize.NAME and not is_keyword)
            assert labels["operator"][number] == (token.type == tokenize.OP)
            assert labels["string"][number] == (token.type == tokenize.STRING)
            assert labels["comment"][number] == (token.type == tokenize.COMMENT)
            assert labels["number"][number] == (token.type == tokenize.NUMBER)
            assert labels["return"][number] == (token.string == "return")


def test_nested_are_ancestors_and_descendants_but_not_siblings():
    nested = nested_concepts(CONCEPTS)

    def are_nested(one, other):
        return nested[NAMES.index(one), NAMES.index(other)]

    assert (nested == nested.T).all()
    assert nested.diagonal().all()
    assert are_nested("if", "branch_keyword")
    assert are_nested("if", "keyword")  # two levels up
    assert are_nested("keyword", "if")
    assert not are_nested("if", "for")
    assert not are_nested("branch_keyword", "loop_keyword")
    assert not are_nested("if", "string")
