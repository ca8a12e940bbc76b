import pytest
import torch
from transformers import AutoTokenizer

from transformers_dsv3.data.byte_bpe import TokenBlocks, token_stream, train_byte_bpe


TEXTS = ["def main():\n    return 1\n" * 20, "import os\n\n\nclass Stack:\n    pass\n" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(TEXTS, vocab_size=300, model_max_length=64)


@pytest.mark.parametrize("text", [*TEXTS, "größe 漢字 \x00\x01 🙂\r\n\t  spaces ", "", "<|end_of_text"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_training_is_repeatable(tokenizer):
    again = train_byte_bpe(TEXTS, vocab_size=300, model_max_length=64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_begin_token_is_added_and_all_bytes_are_known(tokenizer):
    assert tokenizer("def").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    assert len(tokenizer) <= 300
    assert tokenizer.unk_token is None


def test_auto_tokenizer_reads_it_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS[1]).input_ids == tokenizer(TEXTS[1]).input_ids
    assert again.decode(again(TEXTS[1]).input_ids, skip_special_tokens=True) == TEXTS[1]
    assert again.eos_token_id == tokenizer.eos_token_id


def test_stream_wraps_each_text_in_begin_and_end(tokenizer):
    expected = []
    for text in TEXTS:
        expected += [0, *tokenizer(text, add_special_tokens=False).input_ids, 1]
    assert token_stream(tokenizer, TEXTS).tolist() == expected


def test_blocks_are_consecutive_and_drop_the_rest():
    blocks = TokenBlocks(torch.arange(23), 5)
    assert len(blocks) == 4
    assert torch.cat([blocks[i]["input_ids"] for i in range(4)]).tolist() == list(range(20))
    with pytest.raises(ValueError, match="23 tokens, fewer than one block of 24"):
        TokenBlocks(torch.arange(23), 24)
