"""Labels of tokens of Python source that need no annotator: Python's own `tokenize` and `ast` give them.

`concepts.toml` lists the concepts, a true hierarchy (keyword > branch_keyword > if; string > docstring; ...). A
language model's token is labelled through the offsets of its characters; tokenising and reading files happen elsewhere.
Called by the evaluation, whose probes and erasures are about these concepts.
"""

import ast
import io
import keyword
import sys
import token
import tokenize
import tomllib
import warnings
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]

_PIECES = ("FSTRING_START", "FSTRING_MIDDLE", "TSTRING_START", "TSTRING_MIDDLE")  # Python 3.12 and 3.14 split strings
_ENDS = ("FSTRING_END", "TSTRING_END")
_OPEN_PIECES = frozenset(getattr(token, name) for name in _PIECES if hasattr(token, name))
_CATEGORIES = {token.STRING: "string", token.COMMENT: "comment", token.NUMBER: "number", token.OP: "operator"}
_CATEGORIES |= {token.NAME: "name"} | {
    getattr(token, name): "string" for name in _PIECES + _ENDS if hasattr(token, name)
}
_DEFINED = {"def": "function_name", "class": "class_name"}
_LITERAL = frozenset({"string", "comment", "number"})
_RULES = {category: frozenset({category}) for category in (*_CATEGORIES.values(), "keyword")} | {
    category: frozenset({"name", "defined_name", category}) for category in _DEFINED.values()
}
"""Which concepts without words a Python token bears by its category."""
_FROM_SYNTAX = frozenset({"attribute", "parameter", "docstring"})
_SCOPES: dict[type[ast.AST], str] = {
    ast.FunctionDef: "in_function",
    ast.AsyncFunctionDef: "in_function",
    ast.ClassDef: "in_class",
    ast.For: "in_loop",
    ast.AsyncFor: "in_loop",
    ast.While: "in_loop",
    ast.Try: "in_try",
    ast.TryStar: "in_try",
}
# Before 3.12 an f-string is one token, and the places that `ast` gives to what is inside it are wrong.
_OPAQUE: tuple[type[ast.AST], ...] = (ast.JoinedStr,) if sys.version_info < (3, 12) else ()
_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()])  # U+3000 is the last white space


@dataclass(frozen=True)
class Concept:
    """One label: its place in the hierarchy and what bears it (see the head of `concepts.toml`)."""

    name: str
    kind: Literal["token", "scope", "file"]
    description: str
    parent: str | None = None
    words: tuple[str, ...] = ()


def load_concepts() -> tuple[Concept, ...]:
    """The shipped concepts, parents before their children."""
    tables = tomllib.loads(Path(__file__).with_name("concepts.toml").read_text(encoding="utf-8"))["concepts"]
    return tuple(Concept(**{**table, "words": tuple(table.get("words", ()))}) for table in tables)


def nested_concepts(concepts: Sequence[Concept]) -> Bools:
    """[concepts, concepts]: whether one of the two is the other's ancestor, or both are the same."""
    column = {concept.name: number for number, concept in enumerate(concepts)}
    nested = np.eye(len(concepts), dtype=np.bool_)
    for concept in concepts:  # a parent comes first, so its own ancestors are known
        if concept.parent is not None:
            child, parent = column[concept.name], column[concept.parent]
            ancestors = nested[parent] & (np.arange(len(concepts)) <= parent)
            nested[child] |= ancestors
            nested[:, child] |= ancestors
    return nested


def label_document(
    name: str, text: str, offsets: Sequence[tuple[int, int]], concepts: Sequence[Concept]
) -> Bools | None:
    """Labels [tokens, concepts] of a language model's tokens, or None if `text` is not valid Python.

    `name` is the document's path, whose first folder is its package; `offsets` are the characters [start, end) of each
    token. A token has the labels of the place of its first visible character. A token of white space alone has the
    scopes and the package of its first character, and no label of kind `token`. An empty span (BOS, padding) has none.
    ValueError if an offset lies outside the text.
    """
    source = _read_source(
        text, frozenset(word for concept in concepts if concept.kind == "token" for word in concept.words)
    )
    if source is None:
        return None
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    if (spans < 0).any() or (spans > len(text)).any():
        raise ValueError(
            f"{name}: a token's offset lies outside the text of {len(text)} characters: pass the same text"
        )
    real = spans[:, 0] < spans[:, 1]
    places, visible = _first_visible(text, spans)
    tokens = np.searchsorted(source.starts, places, side="right") - 1
    covered = visible & (tokens >= 0)
    covered[covered] = places[covered] < source.ends[tokens[covered]]
    package = name.partition("/")[0] if "/" in name else ""
    labels = np.zeros((len(spans), len(concepts)), dtype=np.bool_)
    for column, concept in enumerate(concepts):
        if concept.kind == "file":
            labels[:, column] = real & (package in concept.words)
        elif concept.kind == "scope":
            labels[:, column] = real & _inside(source.scopes[concept.name], len(text))[places]
        else:
            labels[covered, column] = source.bearers(concept)[tokens[covered]]
    return labels


@dataclass
class _Source:
    """What `tokenize` and `ast` say of a text; every place is an index into it."""

    text: str
    starts: list[int] = field(default_factory=list)  # of each Python token
    ends: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    forms: dict[tuple[str, str], int] = field(default_factory=dict)  # (category, word) -> number
    form_numbers: list[int] = field(default_factory=list)  # of each Python token
    at_signs: list[int] = field(default_factory=list)
    bearing: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # places of their tokens
    scopes: defaultdict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.lines = self.text.split("\n")  # not splitlines: a form feed ends no line of Python
        self.line_starts = list(accumulate((len(line) + 1 for line in self.lines), initial=0))

    def bearers(self, concept: Concept) -> Bools:
        """[Python tokens]: which bear a concept of kind `token`."""
        if concept.name in _FROM_SYNTAX:
            chosen = np.zeros(len(self.starts), dtype=np.bool_)
            chosen[np.searchsorted(self.starts, self.bearing[concept.name], side="right") - 1] = True
            return chosen
        if concept.words:
            bears = [word in concept.words for _, word in self.forms]
        else:
            bears = [concept.name in _RULES[category] for category, _ in self.forms]
        return np.array(bears, dtype=np.bool_)[self.form_numbers]

    def place(self, line: int, utf8_column: int) -> int:
        """`ast` counts lines from 1 and columns in bytes of UTF-8."""
        row = self.lines[line - 1]
        column = utf8_column if row.isascii() else len(row.encode()[:utf8_column].decode())
        return self.line_starts[line - 1] + column

    def start(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Where a node starts; a decorated definition starts at its first `@`, which `ast` leaves out."""
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        if decorators:
            return self.at_sign(decorators[0])
        return self.place(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.place(node.end_lineno, node.end_col_offset)

    def at_sign(self, decorator: ast.expr) -> int:
        return self.at_signs[bisect_right(self.at_signs, self.place(decorator.lineno, decorator.col_offset)) - 1]


def _read_source(text: str, words: frozenset[str]) -> _Source | None:
    source = _Source(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the text's own invalid escapes and the like
            tree = ast.parse(text)
        _add_tokens(source, words)
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):  # ValueError: NUL or a lone surrogate
        return None
    _add_syntax(source, tree)
    return source


def _add_tokens(source: _Source, words: frozenset[str]) -> None:
    ends: list[int] = []
    previous, glued = "", False
    for kind, string, (line, column), (end_line, end_column), _ in tokenize.generate_tokens(
        io.StringIO(source.text).readline
    ):
        category = _CATEGORIES.get(kind)
        if category is None:  # newlines, indentation, the end
            continue
        if category == "name":
            category = "keyword" if keyword.iskeyword(string) else _DEFINED.get(previous, "name")
        start = source.line_starts[line - 1] + column
        if glued:
            ends[-1] = start  # a piece of an f-string reaches to the next; `tokenize` loses the second { of {{
        form = (category, string if string in words and category not in _LITERAL else "")
        source.starts.append(start)
        ends.append(source.line_starts[end_line - 1] + end_column)
        source.form_numbers.append(source.forms.setdefault(form, len(source.forms)))
        if string == "@" and category == "operator":
            source.at_signs.append(start)
        previous, glued = string, kind in _OPEN_PIECES
    source.ends = np.array(ends, dtype=np.int64)


def _add_syntax(source: _Source, tree: ast.Module) -> None:
    for node in _nodes(tree):
        scope = _SCOPES.get(type(node))
        if isinstance(node, ast.Attribute):
            source.bearing["attribute"].append(source.end(node) - 1)
        elif isinstance(node, ast.arg):
            source.bearing["parameter"].append(source.start(node))
        elif scope is not None:
            body: list[ast.stmt] = node.body  # type: ignore[attr-defined]
            source.scopes[scope].append((source.start(body[0]), source.end(body[-1])))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            _add_docstring(source, node.body)
        for decorator in getattr(node, "decorator_list", ()):
            source.scopes["decorator"].append((source.at_sign(decorator), source.end(decorator)))


def _add_docstring(source: _Source, body: list[ast.stmt]) -> None:
    match body:
        case [ast.Expr(value=ast.Constant(value=str()) as constant), *_]:
            first, last = (
                bisect_left(source.starts, place) for place in (source.start(constant), source.end(constant))
            )
            string = source.forms["string", ""]  # pieces may have a comment between them
            source.bearing["docstring"] += [
                source.starts[number] for number in range(first, last) if source.form_numbers[number] == string
            ]


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, _OPAQUE):
            pending.extend(ast.iter_child_nodes(node))


def _inside(ranges: list[tuple[int, int]], num_characters: int) -> Bools:
    """[num_characters + 1]: whether a place lies in any of the ranges [start, end)."""
    steps = np.zeros(num_characters + 1, dtype=np.int32)
    bounds = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    np.add.at(steps, bounds[:, 0], 1)
    np.subtract.at(steps, bounds[:, 1], 1)
    return np.cumsum(steps) > 0


def _first_visible(text: str, spans: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Bools]:
    """The place of each span's first character that is not white space, else its first; and whether there is one."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    places = np.append(np.where(np.isin(characters, _SPACES), len(text), np.arange(len(text))), len(text))
    following = np.minimum.accumulate(places[::-1])[::-1]
    found = following[spans[:, 0]]
    visible = found < spans[:, 1]
    return np.where(visible, found, spans[:, 0]), visible
