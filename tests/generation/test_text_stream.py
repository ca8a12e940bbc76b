"""Text that comes token by token is the text of all tokens, up to where it stops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from transformers_dsv3.generation.text_stream import TextStream, decoder_of


def lossy(ids):
    """A token a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def tell(stream, tokens):
    parts = [stream.add(token) for token in tokens]
    return [text for text, _ in parts]


@given(st.text(max_size=80) | st.lists(st.integers(0, 255), max_size=80).map(bytes))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_or_told_twice(text):
    tokens = list(text.encode() if isinstance(text, str) else text)
    stream = TextStream(lossy)
    assert "".join(tell(stream, tokens)) + stream.end() == lossy(tokens)


def test_a_character_waits_for_its_last_byte():
    stream = TextStream(lossy)
    assert tell(stream, "aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert stream.end() == ""
    assert tell(TextStream(lossy), [0xFF] * 6)[-1] == "\N{REPLACEMENT CHARACTER}"  # what never becomes one goes on


def test_a_prompt_may_end_within_a_character():
    stream = TextStream(lossy, prompt=list("x😀".encode())[:-2])
    assert "".join(tell(stream, list("😀!".encode())[-3:])) == "😀!"


def test_decoding_looks_back_at_a_few_tokens_only():
    longest = []

    def decode(ids):
        longest.append(len(ids))
        return lossy(ids)

    stream = TextStream(decode)
    tell(stream, b"abc" * 300)
    assert max(longest) < 32


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_end_the_text_before_them(text, stops, sizes):
    """Whatever tokens the text comes in; what was told before is never more than what stays."""
    tokens, rest = [], text
    for size in sizes:
        tokens.append(rest[:size])
        rest = rest[size:]
    stream, told = TextStream(lambda ids: "".join(tokens[i] for i in ids), stops), ""
    seen = ""
    for index, part in enumerate(tokens):
        seen += part
        new, stop = stream.add(index)
        told += new
        first = min((seen.find(each) for each in stops if each in seen), default=-1)
        if stop is not None:
            assert told == seen[:first] and seen.startswith(stop, first)
            return
        assert first == -1 and seen.startswith(told)
    assert told + stream.end() == text


def test_stops_that_may_not_come_yet_are_text():
    stream = TextStream(lossy, ["b"])
    assert [stream.add(token, may_stop) for token, may_stop in zip(b"abab", (False, False, True, True))] == [
        ("a", None),
        ("b", None),
        ("a", None),
        ("", "b"),
    ]


def test_the_first_of_several_stops_counts():
    stream = TextStream(lambda ids: "x, y." * len(ids), [".", ","])
    assert stream.add(0) == ("x", ",")


@pytest.fixture(scope="module")
def words():
    """Words whose first space is written where something comes before."""
    vocabulary = {"<s>": 0, "▁Hello": 1, "▁world": 2, "s": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    return tokenizer


def test_spaces_between_words_are_the_prompts_or_the_texts(words):
    decode = decoder_of(words)
    assert tell(TextStream(decode), [1, 2, 3]) == ["Hello", " world", "s"]
    assert tell(TextStream(decode, prompt=[0, 1]), [2, 3, 0]) == [" world", "s", ""]


def test_tokenizers_that_clean_up_do_it_themselves(words):
    class Cleaning:
        clean_up_tokenization_spaces = True
        backend_tokenizer = None

        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return "clean"

    assert decoder_of(Cleaning())([1]) == "clean"
