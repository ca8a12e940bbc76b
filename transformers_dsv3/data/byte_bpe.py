"""A byte-level BPE tokenizer trained on given texts, and fixed-length token blocks to train a model on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .text_files import Corpus


BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"


def train_byte_bpe(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text encodes without an unknown token and decodes back to the same text.

    A text encoded on its own gets the begin token in front, as DeepSeek-V3's tokenizer does. The vocabulary is
    smaller than `vocab_size` where the texts do not hold that many distinct pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of token ids, each as begin token (where the tokenizer has one), text, end token.

    Returns:
        int64 `(n_tokens,)`.
    """
    # The backend's batch call uses every core and, unlike the wrapper, does not warn about texts past the context.
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ids: list[int] = []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for encoding in encodings:
        ids.extend(begin)
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


class TokenBlocks(torch.utils.data.Dataset):
    """Consecutive blocks of `length` tokens of a stream, as causal language model examples.

    Blocks run across document borders; the rest of the stream that does not fill a block is left out.
    """

    def __init__(self, stream: torch.Tensor, length: int):
        if stream.numel() < length:
            raise ValueError(f"the text has {stream.numel()} tokens, fewer than one block of {length}")
        self.blocks = stream[: stream.numel() // length * length].view(-1, length)

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus in the tokens of a tokenizer that was trained on it.

    Attributes:
        tokenizer: trained on the training part.
        train: the training part in blocks.
        held_out: the held-out part as one row of token ids, int64 `(n_tokens,)`.
    """

    tokenizer: PreTrainedTokenizerFast
    train: TokenBlocks
    held_out: torch.Tensor


def tokenize_corpus(corpus: Corpus, vocab_size: int, block_length: int, model_max_length: int) -> TokenizedCorpus:
    """Train a byte-level BPE on a corpus and tokenize both of its parts.

    Raises:
        ValueError: the training part makes less than one block.
    """
    train, held_out = ([document.text for document in part] for part in (corpus.train, corpus.held_out))
    tokenizer = train_byte_bpe(train, vocab_size, model_max_length)
    blocks = TokenBlocks(token_stream(tokenizer, train), block_length)
    return TokenizedCorpus(tokenizer, blocks, token_stream(tokenizer, held_out))
