"""Preference pairs: what is made of source code, and what is refused before anything is computed."""

import ast
import random

import pytest

from transformers_dsv3.data.preference_pairs import (
    CORRUPTIONS,
    PREFERRED,
    PairError,
    check_pairs,
    function_pairs,
    functions_of,
    parses,
)
from transformers_dsv3.data.text_files import Document, build_corpus, standard_library


@pytest.fixture(scope="module")
def corpus():
    documents = random.Random(0).sample(standard_library(), 40)
    return build_corpus(documents, "forty files")


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
class TestEachKind:
    def test_both_sides_parse_and_differ(self, corpus, kind):
        rows = function_pairs(corpus.train, [kind], limit=60)
        assert len(rows) > 30 and {row["kind"] for row in rows} == {kind}
        texts = {document.name: document.text for document in corpus.train}
        for row in rows:
            assert row["chosen"] != row["rejected"]
            assert parses(row["prompt"] + row["chosen"]) and parses(row["prompt"] + row["rejected"])
            if kind not in PREFERRED:  # a function of the file, but for its margin
                assert all(line.strip() in texts[row["file"]] for line in row["chosen"].splitlines())

    def test_no_kind_is_told_by_length(self, corpus, kind):
        rows = function_pairs(corpus.train, [kind], limit=200)
        sizes = [len(row["rejected"]) - len(row["chosen"]) for row in rows]
        mean = sum(len(row["chosen"]) for row in rows) / len(rows)
        assert abs(sum(sizes) / len(sizes)) < 0.05 * mean
        if kind == "single_quotes":
            assert not any(sizes)
            return
        assert 0.2 < sum(size > 0 for size in sizes) / sum(size != 0 for size in sizes) < 0.8

    def test_a_seed_makes_the_same_pairs(self, corpus, kind):
        first, again, other = (function_pairs(corpus.train, [kind], limit=20, seed=seed) for seed in (1, 1, 2))
        assert first == again != other


def test_held_out_pairs_are_of_other_files(corpus):
    train, held_out = (
        function_pairs(part, list(CORRUPTIONS), limit=10**6) for part in (corpus.train, corpus.held_out)
    )
    assert not {row["file"] for row in train} & {row["file"] for row in held_out}
    functions = [(row["prompt"], row["chosen"]) for row in train]
    assert len(set(functions)) == len(functions)


def test_functions_are_cut_behind_the_docstring():
    text = (
        "class A:\n    def f(self, x):\n"
        '        """Doubles."""\n        y = x\n        return 2 * y\n\n    def g(self): return 1\n'
    )
    (function,) = functions_of(Document("a.py", text))
    assert function.prompt == 'def f(self, x):\n    """Doubles."""\n'
    assert function.body == "    y = x\n    return 2 * y\n"
    assert functions_of(Document("b.py", "not python at all:")) == []


def test_a_repeated_line_stands_for_the_one_behind_it():
    text = "def f(x):\n    a = 1\n    b = 2\n    return a\n"
    (function,) = functions_of(Document("a.py", text))
    made = CORRUPTIONS["repeated_line"](function, [])
    assert made == ["    a = 1\n    a = 1\n    return a\n", "    a = 1\n    b = 2\n    b = 2\n"]


def test_quotes_are_a_matter_of_style():
    body = '''    a = b"x" + r'y' + "it's" + """three"""\n    return f(a, 'z',  # 'no'\n        "\\n")\n'''
    (function,) = functions_of(Document("a.py", f"def f(x):\n{body}"))
    (rejected,) = CORRUPTIONS["single_quotes"](function, [])
    assert rejected == body.replace('b"x"', "b'x'")
    assert PREFERRED["single_quotes"](function) == body.replace("r'y'", 'r"y"').replace("'z'", '"z"')


def test_both_styles_are_the_same_to_the_interpreter(corpus):
    for row in function_pairs(corpus.train, ["single_quotes"], limit=100):
        chosen, rejected = (ast.dump(ast.parse(row["prompt"] + row[side])) for side in ("chosen", "rejected"))
        assert chosen == rejected


def test_text_without_functions():
    with pytest.raises(PairError, match="no Python function"):
        function_pairs([Document("a.txt", "prose")], ["wrong_name"], limit=3)
    with pytest.raises(PairError, match=r"\['typo'\]; there are single_quotes"):
        function_pairs([], ["typo"], limit=3)


GOOD = {"prompt": "def f():", "chosen": " return 1", "rejected": " pass"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rejected": " return 1"}, "pair 2: 'chosen' and 'rejected' are equal"),
        ({"rejected": ""}, "pair 2: 'rejected' is empty"),
        ({"chosen": " \n"}, "pair 2: 'chosen' is empty"),
        ({"chosen": None}, "pair 2: the column 'chosen' is missing or holds no text"),
        ({"chosen": "a" * 40, "rejected": "a" * 39 + "b"}, "pair 2: its sides are equal in the first max_length=32"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(byte_tokenizer, changes, message):
    with pytest.raises(PairError, match=message):
        check_pairs([GOOD, {**GOOD, **changes}], byte_tokenizer, max_length=32)


def test_no_pairs_and_no_room(byte_tokenizer):
    with pytest.raises(PairError, match="no preference pairs"):
        check_pairs([], byte_tokenizer, max_length=32)
    with pytest.raises(PairError, match="every prompt fills max_length=4"):
        check_pairs([GOOD], byte_tokenizer, max_length=4)


def test_what_is_cut_is_said(byte_tokenizer):
    assert check_pairs([GOOD], byte_tokenizer, max_length=32) == "1 pairs, none longer than 32 tokens"
    rows = [GOOD, {**GOOD, "chosen": "b" * 30}, {**GOOD, "prompt": "x" * 40}]
    said = check_pairs(rows, byte_tokenizer, max_length=32)
    assert said.startswith("3 pairs at max_length=32 tokens: 1 lose the end of a completion (6 tokens in all), 1 are")
