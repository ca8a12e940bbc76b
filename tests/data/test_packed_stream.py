"""Streams of text and of token blocks: what is read, in which order, and coming back to a place in it."""

import json
import random

import numpy as np
import pytest
import torch

from transformers_dsv3.data import packed_stream, text_stream
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.data.packed_stream import HeldOutBlocks, PackedStream, packed_example, tokenize_documents
from transformers_dsv3.data.text_files import TextError
from transformers_dsv3.data.text_stream import Span, read_spans, stream_dataset, stream_files


pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """`datasets` counts on the Hub which of its builders are used, where it can."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [
        f"{i}: " + " ".join(rng.choice("ab cd ef gh".split()) for _ in range(rng.randint(9, 400))) for i in range(30)
    ]


@pytest.fixture(scope="module")
def notes(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("notes")
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_byte_bpe(texts, 280, 64)


@pytest.fixture(params=["files", "file", "folder"])
def source(request, notes, jsonl):
    """Function to a new stream of text files, of a JSONL file, of a folder that `datasets` opens."""
    if request.param == "files":
        return lambda: stream_files([notes], seed=3)
    name = str(jsonl if request.param == "file" else jsonl.parent)
    return lambda: stream_dataset(name, held_out_documents=3)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_comes_back_to_any_block(source, tokenizer, window, monkeypatch):
    monkeypatch.setattr(packed_stream, "BATCH_DOCUMENTS", 5)

    def new():
        return PackedStream(source().texts_of_pass, tokenizer, 16, shuffle_window=window, seed=1)

    stream, blocks, states = new(), [], {}
    for example in stream:
        blocks.append(example["input_ids"])
        if len(blocks) % 61 == 5:  # a loader has read three blocks ahead
            states[len(blocks) - 4] = json.dumps(stream.state_dict(len(blocks) - 4))
        if len(blocks) == 900:  # the text is read more than twice
            break
    for block, state in states.items():
        resumed = new()
        resumed.load_state_dict(json.loads(state))
        later = min(block + 40, 890)
        for number, example in zip(range(block, later + 1), resumed):
            assert torch.equal(example["input_ids"], blocks[number]), (block, number)
        # A resumed stream can be resumed
        again = new()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict(later))))
        assert torch.equal(next(iter(again))["input_ids"], blocks[later])
    # Without a mark it reads from the beginning
    resumed = new()
    resumed.load_state_dict({"block": 100, "mark": None})
    assert torch.equal(next(iter(resumed))["input_ids"], blocks[100])


def test_a_mark_is_behind_the_beginning(notes, tokenizer, monkeypatch):
    """Resuming reads from the place, not everything before it."""
    monkeypatch.setattr(packed_stream, "BATCH_DOCUMENTS", 2)
    stream = PackedStream(stream_files([notes]).texts_of_pass, tokenizer, 16, shuffle_window=8)
    for _ in zip(range(200), stream):
        pass
    assert stream.state_dict(190)["mark"]["source"]["examples_iterable"]["shard_idx"] > 10
    assert len(stream._marks) <= 3


def test_every_token_comes_once_a_pass(notes, texts, tokenizer):
    text = stream_files([notes], held_out_share=0.2)
    train = text.head(10**9)
    assert sorted([*train, *text.held_out]) == sorted(texts)
    ids, _ = tokenize_documents(tokenizer, train)
    blocks = [e["input_ids"] for _, e in zip(range(len(ids) // 16), PackedStream(text.texts_of_pass, tokenizer, 16))]
    # The last window mixes in tokens of the next pass, so not all of the first need be here, but nothing twice
    assert len(blocks) == len(ids) // 16
    ordered = PackedStream(text.texts_of_pass, tokenizer, 16, shuffle_window=1)
    read = torch.cat([example["input_ids"] for _, example in zip(range(len(ids) // 16), ordered)])
    assert np.array_equal(read.numpy(), ids[: len(read)])


def test_passes_have_orders_of_their_own(notes):
    text = stream_files([notes], seed=1)
    orders = [[example["text"] for example in text.texts_of_pass(number)] for number in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != [example["text"] for example in stream_files([notes], seed=2).texts_of_pass(0)]


def test_positions_start_again_with_each_document():
    starts = np.array([False, False, True, False, True, True, False])
    example = packed_example(np.arange(7, dtype=np.int32), starts, reset_positions=True)
    assert example["position_ids"].tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert example["labels"].tolist() == [0, 1, -100, 3, -100, -100, 6]
    assert packed_example(np.arange(7, dtype=np.int32), starts, False).keys() == {"input_ids", "labels"}


def test_documents_of_a_block_do_not_see_each_other(make_model):
    model = make_model(vocab_size=96)
    starts = np.array([True] + [False] * 5 + [True] + [False] * 5)
    ids = torch.randint(0, 96, (12,)).numpy().astype(np.int32)
    other = ids.copy()
    other[:6] = (other[:6] + 1) % 96

    def logits(row, reset):
        example = packed_example(row, starts, reset)
        example.pop("labels")
        with torch.no_grad():
            return model(**{name: value[None] for name, value in example.items()}).logits[0, 6:]

    torch.testing.assert_close(logits(ids, True), logits(other, True))
    assert (logits(ids, False) - logits(other, False)).abs().max() > 1e-3


def test_files_are_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "PIECE_BYTES", 100)
    lines = [f"line {i} " + "ä" * (i % 60) + "\n" for i in range(300)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    text = stream_files([tmp_path / "a.txt"])
    assert text.split.startswith("too few files")
    train = sorted(text.head(10**9), key=lambda piece: int(piece.split()[1]))
    assert len(train) > 50
    assert "".join(train) + "".join(text.held_out) == "".join(lines)


def test_what_is_not_text_is_left_out(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\0")
    (tmp_path / "b.txt").write_text("a\0b")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("of the run itself")
    (tmp_path / "d.txt").write_bytes("\ufeffwords".encode())
    names = {path.name: Span(str(path), 0, path.stat().st_size) for path in tmp_path.glob("[a-d].*")}
    assert list(read_spans(list(names.values()))) == [{"text": "words"}]
    text = stream_files([tmp_path], exclude=tmp_path / "out", held_out_share=0)
    assert text.head(100) == ["words"]


def test_wrong_sources_are_refused_by_name(tmp_path, jsonl):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xyz").write_text("text")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n' * 9)
    with pytest.raises(TextError, match="nowhere does not exist"):
        stream_files([tmp_path / "nowhere"])
    with pytest.raises(TextError, match="empty has no file with text in it"):
        stream_files([tmp_path / "empty"])
    with pytest.raises(TextError, match="a.xyz: the ending is none of .jsonl"):
        stream_dataset(str(tmp_path / "a.xyz"))
    with pytest.raises(TextError, match="no column 'body'; it has 'text'"):
        stream_dataset(str(jsonl), text_column="body")
    with pytest.raises(TextError, match="30 documents or fewer: none is left to train on"):
        stream_dataset(str(jsonl), held_out_documents=30)
    with pytest.raises(TextError, match="the column 'text' holds int, not text"):
        stream_dataset(str(tmp_path / "numbers.jsonl"), held_out_documents=1)
    with pytest.raises(TextError, match="cannot be opened as a dataset, split 'test'"):
        stream_dataset(str(jsonl), split="test")


def test_held_out_blocks(jsonl, tokenizer):
    text = stream_dataset(str(jsonl), held_out_documents=3)
    blocks = HeldOutBlocks(text, tokenizer, 16, reset_positions=False)
    ids, _ = tokenize_documents(tokenizer, text.held_out)
    assert len(blocks) == len(ids) // 16
    assert blocks.bytes_per_token == sum(len(t) for t in text.held_out) / len(ids)
    with pytest.raises(TextError, match="fewer than one block of 5,000: more text or a smaller block is needed"):
        HeldOutBlocks(text, tokenizer, 5000, reset_positions=False)
