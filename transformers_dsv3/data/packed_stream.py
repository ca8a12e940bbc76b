"""Fixed blocks of tokens, cut from a stream of documents while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .text_files import TextError
from .text_stream import TextStream, checked_text


# Documents are tokenized together, up to so many of them or so many characters: fast tokenizers use every core then.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 1_000_000


def check_boundary_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has no token to tell where a document ends."""
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has neither a begin nor an end token: documents would run into each other")


def tokenize_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts as one row of token ids, each as begin token, text, end token, as far as the tokenizer has them.

    Returns:
        int32 `(n,)`, the ids, and bool `(n,)`, true where a document starts.
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose: documents longer than the context are no mistake here
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    documents = [np.asarray(before + ids + after, dtype=np.int32) for ids in encoded]
    lengths = np.array([len(ids) for ids in documents])
    starts = np.zeros(lengths.sum(), dtype=bool)
    starts[np.cumsum(lengths) - lengths] = True
    return np.concatenate(documents), starts


def packed_example(ids: np.ndarray, starts: np.ndarray, reset_positions: bool) -> dict[str, torch.Tensor]:
    """One block `(L,)` as an example for a causal language model, all int64 `(L,)`.

    With `reset_positions`, `position_ids` start at 0 again with each document, from which the model takes that
    documents do not see each other, and the first token of a document, which nothing tells, is no target.
    """
    input_ids = torch.from_numpy(ids.astype(np.int64))
    if not reset_positions:
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    places = np.arange(len(ids))
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(torch.from_numpy(starts), -100),
        "position_ids": torch.from_numpy(places - np.maximum.accumulate(np.where(starts, places, 0))),
    }


class PackedStream(torch.utils.data.IterableDataset):
    """An endless stream of blocks of `block_size` tokens from a text stream, read again and again.

    Documents are laid end to end and cut into blocks. `shuffle_window` blocks at a time are put into an order drawn
    from the seed: blocks beside each other are often of one document, and a batch of them would teach little more than
    one.

    Block n is the same whoever asks for it, so a position in the stream is the number of a block. `state_dict` adds
    where reading may start to get there, which is the start of a window. Unlike a shuffle buffer this loses nothing.

    Args:
        texts_of_pass: see [`TextStream`].
        reset_positions: see [`packed_example`].
        shuffle_window: 1 keeps the order of the text. A window is held in memory, at 5 bytes a token.

    Attributes:
        epoch: the pass over the text, 0 for the first, in which the window of the block that was given last begins.
    """

    def __init__(
        self,
        texts_of_pass: Callable[[int], Any],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        text_column: str = "text",
        reset_positions: bool = False,
        shuffle_window: int = 1024,
        seed: int = 0,
    ):
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2, not {block_size}")
        if shuffle_window < 1:
            raise ValueError(f"shuffle_window must be at least 1, not {shuffle_window}")
        self.texts_of_pass = texts_of_pass
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.text_column = text_column
        self.reset_positions = reset_positions
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.epoch = 0
        self._first_block = 0
        # Where reading may start to get at a window, by the window's number
        self._marks: dict[int, dict[str, Any]] = {}

    def state_dict(self, block: int) -> dict[str, Any]:
        """What `load_state_dict` needs to make `block` the first one. Plain values, to be kept as JSON.

        The block is named by the caller, since data loaders read ahead of what was trained on.
        """
        window = block // self.shuffle_window
        before = [number for number in self._marks if number <= window]
        for number in sorted(before)[:-1]:
            del self._marks[number]
        nearest = max(before, default=None)
        return {"block": block, "mark": None if nearest is None else {"window": nearest, **self._marks[nearest]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first_block = state["block"]
        self._marks = {}
        if state["mark"] is not None:
            mark = dict(state["mark"])
            self._marks[mark.pop("window")] = mark

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={worker.num_workers}: one worker reads the stream in its order, and "
                "tokenizes ahead; more of them would each read all of it"
            )
        wanted, first = divmod(self._first_block, self.shuffle_window)
        number = max((n for n in self._marks if n <= wanted), default=0)
        for ids, starts in self._windows(number):
            if number >= wanted:
                order = np.random.default_rng((self.seed, number)).permutation(self.shuffle_window)
                for place in order[first:]:
                    block = slice(place * self.block_size, (place + 1) * self.block_size)
                    yield packed_example(ids[block], starts[block], self.reset_positions)
                first = 0
            number += 1

    def _windows(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and document starts of the windows from `number` on, of which there is a mark unless it is 0."""
        size = self.shuffle_window * self.block_size
        mark = self._marks.get(number)
        skip = 0 if mark is None else mark["skip"]
        ids: np.ndarray = np.zeros(0, dtype=np.int32)
        starts: np.ndarray = np.zeros(0, dtype=bool)
        # Of each batch that is not used up: where it began, counted from the first of `ids`, and how to read it again
        origins: list[tuple[int, dict[str, Any]]] = []
        for origin, batch_ids, batch_starts in self._batches(mark):
            origins.append((len(ids) - skip, origin))
            ids, starts = np.concatenate([ids, batch_ids[skip:]]), np.concatenate([starts, batch_starts[skip:]])
            skip = 0
            while len(ids) >= size:
                while len(origins) > 1 and origins[1][0] <= 0:
                    origins.pop(0)
                place, origin = origins[0]
                self._marks.setdefault(number, {**origin, "skip": -place})
                self.epoch = origin["pass"]
                yield ids[:size], starts[:size]
                ids, starts = ids[size:], starts[size:]
                origins = [(place - size, origin) for place, origin in origins]
                number += 1

    def _batches(self, mark: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """Ids and document starts of some documents at a time, and how to read them again."""
        pass_number, source = (0, None) if mark is None else (mark["pass"], mark["source"])
        while True:
            texts = self.texts_of_pass(pass_number)
            if source is not None:
                texts.load_state_dict(source)
            origin = {"pass": pass_number, "source": source}
            batch: list[str] = []
            characters, empty = 0, source is None
            for example in texts:
                batch.append(checked_text(example[self.text_column], self.text_column))
                characters += len(batch[-1])
                if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                    yield origin, *tokenize_documents(self.tokenizer, batch)
                    origin = {"pass": pass_number, "source": texts.state_dict()}
                    batch, characters, empty = [], 0, False
            if batch:
                yield origin, *tokenize_documents(self.tokenizer, batch)
            elif empty:
                raise TextError("there is no text to train on")
            pass_number, source = pass_number + 1, None


class HeldOutBlocks(torch.utils.data.Dataset):
    """The held-out texts as blocks, in their order; the rest that fills no block is left out.

    Attributes:
        bytes_per_token: of the held-out text, begin and end tokens counted as tokens but not as bytes.
        groups: none, see [`HeldOutMixture`].

    Raises:
        TextError: the texts make less than one block.
    """

    groups: Sequence[tuple[str, int, int, float]] = ()

    def __init__(self, stream: TextStream, tokenizer: PreTrainedTokenizerBase, block_size: int, reset_positions: bool):
        ids, starts = tokenize_documents(tokenizer, stream.held_out or [""])
        if len(ids) < block_size:
            raise TextError(
                f"of {stream.source} {len(ids):,} tokens are held out ({stream.split}), fewer than one block of "
                f"{block_size:,}: more text or a smaller block is needed"
            )
        self.bytes_per_token = stream.held_out_bytes / len(ids)
        self.examples = [
            packed_example(ids[start : start + block_size], starts[start : start + block_size], reset_positions)
            for start in range(0, len(ids) - block_size + 1, block_size)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]
