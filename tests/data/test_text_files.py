import random

import pytest

from transformers_dsv3.data.text_files import (
    Document,
    TextError,
    build_corpus,
    read_documents,
    standard_library,
)


def many_documents(count=40, lines=50):
    draw = random.Random(0)
    return [
        Document(f"folder/file_{i}.txt", "".join(f"line {draw.randrange(10**6)}\n" for _ in range(lines)))
        for i in range(count)
    ]


def test_split_is_by_file_disjoint_and_complete():
    documents = many_documents()
    corpus = build_corpus(documents, "here", held_out_share=0.1)
    train, held_out = {d.name for d in corpus.train}, {d.name for d in corpus.held_out}
    assert held_out and not train & held_out
    assert train | held_out == {d.name for d in documents}
    share = corpus.held_out_bytes / (corpus.held_out_bytes + corpus.train_bytes)
    assert 0.05 <= share <= 0.2


def test_split_and_fingerprint_do_not_depend_on_the_order_of_files():
    documents = many_documents()
    corpus, shuffled = build_corpus(documents, "here"), build_corpus(documents[::-1], "here")
    assert corpus.fingerprint == shuffled.fingerprint
    assert corpus.held_out == shuffled.held_out


@pytest.mark.parametrize("change", ["name", "text", "missing"])
def test_fingerprint_changes_with_the_text(change):
    documents = many_documents()
    other = list(documents)
    if change == "name":
        other[3] = Document("renamed.txt", other[3].text)
    elif change == "text":
        other[3] = Document(other[3].name, other[3].text + "x")
    else:
        del other[3]
    assert build_corpus(documents, "here").fingerprint != build_corpus(other, "here").fingerprint


def test_fingerprint_keeps_name_and_text_apart():
    one = build_corpus([Document("ab", "c" * 100), Document("x", "y" * 100)], "here")
    other = build_corpus([Document("a", "b" + "c" * 100), Document("x", "y" * 100)], "here")
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("count", [1, 2])
def test_few_files_hold_out_the_end_of_each(count):
    documents = [Document(f"{i}.txt", "".join(f"{n} words\n" for n in range(2000))) for i in range(count)]
    corpus = build_corpus(documents, "here")
    assert [a.text + b.text for a, b in zip(corpus.train, corpus.held_out, strict=True)] == [d.text for d in documents]
    assert all(d.text.endswith("\n") for d in corpus.train)
    assert "last 5%" in corpus.split


def test_one_file_without_lines_is_split_too():
    corpus = build_corpus([Document("a.txt", "x" * 10_000)], "here")
    assert len(corpus.train[0].text) == 9_500 and len(corpus.held_out[0].text) == 500


def test_too_little_text_is_refused():
    with pytest.raises(TextError, match=r"notes has 100 bytes of text; at least 5,000 are needed"):
        build_corpus([Document("a.txt", "x" * 100)], "notes", min_bytes=5_000)


def test_too_much_text_is_sampled_the_same_way_each_time():
    documents = many_documents()
    assert sum(d.n_bytes for d in documents) > 12_000
    corpus = build_corpus(documents, "here", max_bytes=6_000)
    size = corpus.train_bytes + corpus.held_out_bytes
    assert 6_000 - 20 <= size <= 6_000
    assert all(d.text.endswith("\n") for d in (*corpus.train, *corpus.held_out))
    assert build_corpus(documents[::-1], "here", max_bytes=6_000).fingerprint == corpus.fingerprint
    one = build_corpus([Document("a.txt", "ö" * 1000)], "here", max_bytes=501)
    assert one.train_bytes + one.held_out_bytes == 500


def test_the_excluded_folder_is_not_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "note.txt").write_text("note")
    documents, _ = read_documents(tmp_path, exclude=tmp_path / "out")
    assert [d.name for d in documents] == ["note.txt"]


def test_a_folder_reads_text_in_order_and_leaves_out_what_is_not(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("zwei\n", encoding="utf-8")
    (tmp_path / "sub" / "a.md").write_text("größer\n", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    (tmp_path / ".git" / "config").write_text("hidden")
    documents, skipped = read_documents(tmp_path)
    assert documents == [Document("b.txt", "zwei\n"), Document("sub/a.md", "größer\n")]
    assert skipped == ["empty.txt", "image.png", "latin.txt"]


def test_bad_paths_are_refused_by_name(tmp_path):
    missing, empty, binary, latin = (tmp_path / name for name in ("missing", "empty.txt", "a.bin", "latin.txt"))
    empty.write_text("\n")
    binary.write_bytes(b"a\0b")
    latin.write_bytes("café au lait".encode("latin-1"))
    for path, message in [
        (missing, "missing does not exist"),
        (empty, "empty.txt is empty"),
        (binary, "a.bin is not text"),
        (latin, r"latin.txt is not UTF-8 text \(byte 3 is 0xe9\)"),
        (tmp_path, "has no UTF-8 text file in it"),
    ]:
        with pytest.raises(TextError, match=message):
            read_documents(path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TextError, match="nothing has no UTF-8 text file"):
        read_documents(tmp_path / "nothing")


def test_standard_library_is_source_without_tests():
    documents = standard_library()
    names = {document.name for document in documents}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name in names)
    assert sum(document.n_bytes for document in documents) > 4_000_000
