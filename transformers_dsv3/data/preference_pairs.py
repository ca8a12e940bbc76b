"""Preference pairs from Python source: a function's own body, and the same body with one corruption.

The prompt is a function's signature with its docstring, the preferred completion its body. The rejected one parses as
well, so that grammar does not tell them apart, and is of about the same length, so that length does not either.
"""

from __future__ import annotations

import ast
import builtins
import io
import random
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .text_files import Document, build_corpus, standard_library
from .text_stream import BUILDERS


logger = logging.get_logger(__name__)


class PairError(ValueError):
    """A preference pair cannot be trained on; the message names the pair and says why."""


@dataclass(frozen=True)
class Function:
    """A function of a file: its source up to the body (signature, docstring), and its body. Both end their lines."""

    file: str
    prompt: str
    body: str


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def functions_of(document: Document) -> list[Function]:
    """The functions and methods of a Python file, each moved to the left margin; none where the file is not Python.

    Left out are bodies of one line, and functions with decorators or comments that keep them from the margin.
    """
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return []
    lines = document.text.split("\n")
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        has_docstring = ast.get_docstring(node) is not None
        first = node.body[0]
        before_body = (first.end_lineno if has_docstring else first.lineno - 1) or 0
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]) + "\n")
        parts = source.splitlines(keepends=True)
        signature = before_body - node.lineno + 1
        prompt, body = "".join(parts[:signature]), "".join(parts[signature:])
        if prompt.startswith(("def ", "async def ")) and len(body.splitlines()) > 1 and parses(source):
            found.append(Function(document.name, prompt, body))
    return found


def repeated_lines(function: Function, others: Sequence[Function]) -> list[str]:
    """A line gives way to a repetition of the one before it: what language models fall into by themselves."""
    lines = function.body.splitlines()
    return [
        "\n".join([*lines[:at], lines[at - 1], *lines[at + 1 :]]) + "\n"
        for at in range(1, len(lines))
        if lines[at].strip() and lines[at - 1].strip()
    ]


def wrong_names(function: Function, others: Sequence[Function]) -> list[str]:
    """One use of a name gives way to another name of the function."""
    source = function.prompt + function.body
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name) and not hasattr(builtins, node.id)]
    known = sorted({node.id for node in names} | {node.arg for node in nodes if isinstance(node, ast.arg)})
    signature, lines = function.prompt.count("\n"), source.split("\n")
    made = []
    for node in names:
        if node.lineno <= signature:
            continue
        line = lines[node.lineno - 1].encode()  # columns are bytes
        for name in known:
            changed = (line[: node.col_offset] + name.encode() + line[node.end_col_offset :]).decode()
            made.append("\n".join([*lines[signature : node.lineno - 1], changed, *lines[node.lineno :]]))
    return made


def other_bodies(function: Function, others: Sequence[Function]) -> list[str]:
    """The body of another function of the file, of about the same length: not what the docstring says."""
    size = len(function.body)
    return [other.body for other in others if abs(len(other.body) - size) <= 0.15 * size]


def with_quotes(function: Function, quote: str) -> str:
    """The body with its strings in these quotes, where that takes no escape; the same to the interpreter."""
    source = function.prompt + function.body
    lines = source.splitlines(keepends=True)
    signature = function.prompt.count("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, start), (last, end) = token.start, token.end
        if token.type != tokenize.STRING or row != last or row <= signature:
            continue
        prefix, inner = token.string.split(token.string[-1], 1)
        if not set(inner[:-1]) & set("\"'\\"):  # triple quotes have quotes within
            line = lines[row - 1]
            lines[row - 1] = line[:start] + prefix + quote + inner[:-1] + quote + line[end:]
    return "".join(lines[signature:])


def single_quotes(function: Function, others: Sequence[Function]) -> list[str]:
    """Strings in single quotes: the same to the interpreter, another style."""
    return [with_quotes(function, "'")]


CORRUPTIONS: dict[str, Callable[[Function, Sequence[Function]], list[str]]] = {
    "single_quotes": single_quotes,
    "repeated_line": repeated_lines,
    "wrong_name": wrong_names,
    "other_body": other_bodies,
}

# Kinds whose preferred side is rewritten too: a style that the text does not keep
PREFERRED: dict[str, Callable[[Function], str]] = {"single_quotes": lambda function: with_quotes(function, '"')}


def function_pairs(
    documents: Iterable[Document],
    kinds: Sequence[str],
    *,
    limit: int,
    seed: int = 0,
    most_characters: int = 600,
) -> list[dict[str, str]]:
    """Pairs of a function's body and a corrupted one, in an order drawn from `seed`.

    Args:
        kinds: names in `CORRUPTIONS`; the pairs are of each in turn.
        limit: how many pairs at most.
        most_characters: longer functions are left out.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `kind` and `file`, no function in two of them.

    Raises:
        PairError: unknown kinds, or documents without a function that can be corrupted so.
    """
    unknown = sorted(set(kinds) - CORRUPTIONS.keys())
    if unknown or not kinds:
        raise PairError(f"no such kind of corruption: {unknown}; there are {', '.join(CORRUPTIONS)}")
    chance = random.Random(seed)
    by_file = {document.name: functions_of(document) for document in documents}
    functions = [f for found in by_file.values() for f in found if len(f.prompt + f.body) <= most_characters]
    chance.shuffle(functions)
    rows: list[dict[str, str]] = []
    seen = set()
    for function in functions:
        if len(rows) == limit:
            break
        kind = kinds[len(rows) % len(kinds)]
        if kind in PREFERRED:
            function = replace(function, body=PREFERRED[kind](function))
        made = CORRUPTIONS[kind](function, by_file[function.file])
        made = [body for body in made if body != function.body and parses(function.prompt + body)]
        if made and (function.prompt, function.body) not in seen:
            seen.add((function.prompt, function.body))
            fields = {"prompt": function.prompt, "chosen": function.body, "rejected": chance.choice(made)}
            rows.append({**fields, "kind": kind, "file": function.file})
    if not rows:
        raise PairError("the text has no Python function that can be corrupted")
    return rows


def dataset_pairs(name: str, *, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs to train on and the first `held_out` of a dataset's `train` split, which are kept apart.

    Args:
        name: as for `datasets.load_dataset`, or a file that ends in .jsonl, .json, .parquet, .csv or .arrow.

    Raises:
        PairError: it has no more pairs than are held out.
    """
    from datasets import load_dataset

    builder = BUILDERS.get(Path(name).suffix)
    rows = load_dataset(builder or name, split="train", **({"data_files": name} if builder else {})).to_list()
    if len(rows) <= held_out:
        raise PairError(f"{name} has {len(rows)} pairs, all of which would be held out ({held_out})")
    return rows[held_out:], rows[:held_out]


def check_pairs(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Refuses pairs that teach nothing, before anything is computed, and says what of the others is cut.

    Args:
        rows: with `prompt`, `chosen` and `rejected`, texts.
        max_length: tokens of prompt and completion that are kept, from the start.

    Returns:
        What is cut, in words; also logged as a warning where anything is.

    Raises:
        PairError: a column is missing or no text, a side is empty, both sides are equal, in all or in what is kept.
    """
    number = cut = dropped = lost = 0
    for number, row in enumerate(rows, 1):
        for column in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(column), str):
                raise PairError(f"pair {number}: the column {column!r} is missing or holds no text")
            if column != "prompt" and not row[column].strip():
                raise PairError(f"pair {number}: {column!r} is empty")
        if row["chosen"] == row["rejected"]:
            raise PairError(f"pair {number}: 'chosen' and 'rejected' are equal")
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [tokenizer(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")]
        if len(prompt) >= max_length:
            dropped += 1
        elif max(map(len, sides)) > max_length:
            if sides[0][:max_length] == sides[1][:max_length]:
                raise PairError(f"pair {number}: its sides are equal in the first max_length={max_length} tokens")
            cut += 1
            lost += sum(max(len(side) - max_length, 0) for side in sides)
    if number == 0:
        raise PairError("there are no preference pairs")
    if dropped == number:
        raise PairError(f"every prompt fills max_length={max_length} tokens: nothing is left to learn")
    if not (cut or dropped):
        return f"{number:,} pairs, none longer than {max_length} tokens"
    said = (
        f"{number:,} pairs at max_length={max_length} tokens: {cut:,} lose the end of a completion "
        f"({lost:,} tokens in all), {dropped:,} are left out, since their prompt alone is as long"
    )
    logger.warning(said)
    return said


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs of one source.

    Attributes:
        train, held_out: rows with `prompt`, `chosen` and `rejected`.
        source: what they are, in words.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    source: str

    def to_dict(self) -> dict[str, Any]:
        """What a training run's record tells of its pairs."""
        return {"source": self.source, "pairs": len(self.train), "held_out_pairs": len(self.held_out)}

    def check(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
        """[`check_pairs`] of both parts, a line each."""
        parts = {"Training": self.train, "Held out": self.held_out}
        return "\n".join(f"{name}: {check_pairs(rows, tokenizer, max_length)}." for name, rows in parts.items())


def preference_pairs(
    dataset: str | None, kinds: Sequence[str], limit: int, held_out: int, *, seed: int = 0
) -> PreferencePairs:
    """The pairs of a dataset, or without one those of functions of Python's standard library.

    Args:
        dataset: see [`dataset_pairs`].
        kinds, limit, seed: of functions to train on, see [`function_pairs`].
        held_out: how many pairs are held out; of functions these are of the files that the quickstart holds out, and
            the same for every seed.

    Raises:
        PairError: there are none.
    """
    if dataset is not None:
        return PreferencePairs(*dataset_pairs(dataset, held_out=held_out), source=dataset)
    source = "the Python standard library"
    corpus = build_corpus(standard_library(), source)
    return PreferencePairs(
        function_pairs(corpus.train, kinds, limit=limit, seed=seed),
        function_pairs(corpus.held_out, kinds, limit=held_out),
        source=f"functions of {source} ({', '.join(kinds)})",
    )
