"""The pool of the filter's study: parts that share nothing, junk that is what it says, the same bytes again."""

import hashlib
import json
import random

import pytest

from tests.data.known_pool.fake_packages import make_packages
from transformers_dsv3.data.known_pool import sources
from transformers_dsv3.data.known_pool.choices import ALL, CHOICES, CLEAN, FILTER, MIDDLE, RANDOM, Choices, read_lines
from transformers_dsv3.data.known_pool.junk import KINDS
from transformers_dsv3.data.known_pool.pool import OVERLAP, make_pool


SCALE = 0.025


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    make_packages(folder)
    return folder


@pytest.fixture(scope="module")
def pool(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("known") / "pool"
    return folder, make_pool(packages, folder, SCALE)


def texts_in(folder):
    seed = [path.read_text(encoding="utf-8") for path in sorted((folder / "seed").glob("*/*.txt"))]
    held_out = read_lines(sorted((folder / "held_out").glob("*.jsonl")))
    return seed, held_out, read_lines(sorted((folder / "pool").glob("*.jsonl")))


def runs_of(text):
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return {tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}


def test_parts_share_nothing(pool):
    seed, held_out, rows = texts_in(pool[0])
    measured = set().union(*(runs_of(row["text"]) for row in held_out))
    assert measured and not any(measured & runs_of(row["text"]) for row in rows)
    assert not set(seed) & {row["text"] for row in rows}
    assert {row["kind"] for row in rows} == {"code", "maths", "prose", "languages", *KINDS}
    in_seed = {row["set"] for row in held_out if row["in_seed"]}
    others = {row["set"] for row in held_out} - in_seed
    assert len(in_seed) >= 8 and len(others) >= 10
    pooled = {row["source"].partition("/")[0] for row in rows}
    assert not {name.split()[-1] for name in others} & pooled
    sizes = {kind: counts["bytes"] for kind, counts in pool[1]["kinds"].items()}
    for kind, megabytes in KINDS.items():
        assert sizes[kind] <= megabytes * 1e6 * SCALE


def test_documents_are_of_bounded_length():
    text = "".join(f"{'word ' * random.Random(i).randint(1, 60)}\n" for i in range(2000)) + "x" * 40_000 + "\nend\n"
    cut = list(sources.pieces(text))
    assert max(len(piece.encode()) for piece in cut) <= sources.MOST_BYTES
    assert "".join(cut) == text.replace("x" * 40_000 + "\n", "") and len(cut) > 10


def test_the_same_packages_give_the_same_bytes(packages, pool, tmp_path):
    def digest(folder):
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }

    make_pool(packages, tmp_path / "again", SCALE)
    assert digest(tmp_path / "again") == digest(pool[0])


def test_what_is_missing_is_named_before_anything_is_made(tmp_path, monkeypatch):
    assert set(sources.missing(tmp_path)) == set(sources.packages())
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(RuntimeError, match="apt-get is needed and not there"):
        sources.download(tmp_path / "packages", ["gnome-user-docs"])
    assert "gnome-user-docs" in sources.missing(tmp_path / "packages")


def test_choices_take_their_part(pool, tmp_path):
    pytest.importorskip("datatrove")
    pytest.importorskip("pycld2")
    choices = Choices(pool[0], tmp_path, 0.19)
    whole = sum(len(text.encode()) for text in choices.texts)
    kinds = {row["text"]: row["kind"] for row in choices.rows}
    for choice in CHOICES:
        taken = choices.take(choice)
        share = sum(len(text.encode()) for text in taken) / whole
        assert set(taken) <= set(kinds)
        if choice in (RANDOM, MIDDLE, FILTER):
            assert share == pytest.approx(0.19, abs=0.04), choice
        if choice == CLEAN:
            assert {kinds[text] for text in taken} == set(json.loads((pool[0] / "pool.json").read_text())["clean"])
        assert (share == 1) == (choice == ALL)
