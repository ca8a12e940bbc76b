"""Streams of token blocks as one, in which every domain has its share of the tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .mixture_order import MixtureError, MixtureOrder, Weights
from .packed_stream import PackedStream


logger = logging.get_logger(__name__)

# Passes over the same text that cost next to nothing (arXiv 2305.16264, section 5), and where no more is gained
WORTH_WHILE, MOST = 4, 16
# Blocks of a domain between two places to which its stream can be sent back
MARK_EVERY = 64


def mix(
    weights: Weights | str | Mapping[int, Weights | str],
    streams: Mapping[str, Any],
    seed: int = 0,
    *,
    block_size: int | None = None,
    allow_repetition: bool = False,
) -> MixedStream:
    """One endless stream of blocks from the streams of several domains, each with its share of the tokens.

    Block n is a pure function of weights, seed and n, whoever asks for it: any number of processes, and a run that was
    stopped. After n blocks every domain is within 1 block of n times its share where 8 divides n, within 3 elsewhere.
    Streams are read in their own order, and again from their start when they end.

    Args:
        weights: shares of tokens by domain, which sum to 1: `{"code": 0.35, "maths": 0.18, "text": 0.47}`; or
            `"article"`, which is 35 % code, 18 % maths and the rest shared evenly by all other domains; or a schedule,
            any of these by the token from which on it holds: `{0: {…}, 10_000_000: {…}}`.
        streams: by domain, anything that can be iterated again and gives dicts with `input_ids`, all of one
            length: a `PackedStream`, `datasets.Dataset` or `IterableDataset`, a list. Lists of numbers become tensors,
            and blocks without `labels` have those of `input_ids`.
        seed: of the order of the domains; the streams have their own.
        block_size: tokens of a block. Needed for a schedule; checked where given.
        allow_repetition: go on where a domain begins its seventeenth pass. Without, that is an error; from the fifth
            on it is a warning.

    Returns:
        A `torch.utils.data.IterableDataset` with `state_dict` and `load_state_dict`, for `Trainer`; `as_dataset()` is
        it for TRL.

    Raises:
        MixtureError: a ValueError that names the domain: weights that do not sum to 1 or have no stream, a domain
            without documents, blocks of different lengths, a domain that is read too often.
    """
    return MixedStream(weights, streams, seed, block_size=block_size, allow_repetition=allow_repetition)


class MixedStream(torch.utils.data.IterableDataset):
    """See [`mix`], which makes it.

    Attributes:
        order: which block is of which domain.
        epochs: passes begun over each domain's text, by the blocks that were drawn.
    """

    def __init__(
        self,
        weights: Weights | str | Mapping[int, Weights | str],
        streams: Mapping[str, Any],
        seed: int = 0,
        *,
        block_size: int | None = None,
        allow_repetition: bool = False,
    ):
        self.order = MixtureOrder(weights, list(streams), seed, block_size)
        used = {name for shares in self.order.schedule.values() for name, share in shares.items() if share}
        unused = [name for name in streams if name not in used]
        if unused:
            raise MixtureError(f"the stream {unused[0]!r} has no weight: leave it out or give it one")
        self.block_size = block_size
        self.allow_repetition = allow_repetition
        self._sources: dict[str, _Packed | _Rows] = {
            name: _Packed(name, stream) if isinstance(stream, PackedStream) else _Rows(name, stream)
            for name, stream in streams.items()
        }
        self._columns: frozenset[str] | None = None
        self._first_block = 0
        self._next_block = 0

    @property
    def epochs(self) -> dict[str, int]:
        return {name: source.epoch + 1 for name, source in self._sources.items()}

    def tokens(self, blocks: int) -> dict[str, int]:
        """Tokens of each domain in the first `blocks` blocks."""
        if self.block_size is None:
            raise MixtureError("block_size is not known before a block was drawn")
        return {name: count * self.block_size for name, count in self.order.counts(blocks).items()}

    def state_dict(self, block: int | None = None) -> dict[str, Any]:
        """What `load_state_dict` needs to make `block` the first one. Plain values, to be kept as JSON.

        Args:
            block: the first that is not trained on yet, which data loaders that read ahead do not know. Default: the
                one behind the last that was drawn.
        """
        block = self._next_block if block is None else block
        counts = self.order.counts(block)
        sources = {name: source.state_dict(counts[name]) for name, source in self._sources.items()}
        return {"block": block, "order": self.order.fingerprint, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place of a `state_dict`.

        Raises:
            MixtureError: it is of other weights, domains or another seed.
        """
        if state.get("order") != self.order.fingerprint:
            raise MixtureError("the state is of a mixture with other weights, domains or another seed")
        self._first_block = self._next_block = state["block"]
        for name, source in self._sources.items():
            source.load_state_dict(state["sources"][name])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise MixtureError(
                f"dataloader_num_workers={worker.num_workers}: one worker reads the streams in their order, and "
                "tokenizes ahead; more of them would each read all of it"
            )
        counts = self.order.counts(self._first_block)
        blocks = {name: source.blocks(counts[name], self._check_epoch) for name, source in self._sources.items()}
        self._next_block = self._first_block
        for name in self.order.from_block(self._first_block):
            block = self._checked(name, next(blocks[name]))
            self._next_block += 1
            yield block

    def as_dataset(self) -> Any:
        """The same blocks as a `datasets.IterableDataset`, which TRL's trainers ask for (with
        `dataset_kwargs={"skip_prepare_dataset": True}`). Its own state knows nothing of the streams': keep this one's.
        """
        from datasets import IterableDataset

        return IterableDataset.from_generator(self.__iter__)

    def _checked(self, name: str, block: Any) -> dict[str, Any]:
        """The block, of lists made tensors, with labels, and as those of the other domains are."""
        if not isinstance(block, Mapping) or "input_ids" not in block:
            raise MixtureError(f"the stream of {name!r} gives no dicts with input_ids")
        block = {
            key: torch.as_tensor(value) if isinstance(value, (list, np.ndarray)) else value
            for key, value in block.items()
        }
        length = len(block["input_ids"])
        if self.block_size is None:
            self.block_size = length
        if length != self.block_size:
            raise MixtureError(
                f"a block of {name!r} has {length:,} tokens, others have {self.block_size:,}: shares are exact in "
                "tokens for blocks of one length alone, so pack the documents into such"
            )
        if "labels" not in block:
            block["labels"] = block["input_ids"].clone()
        if self._columns is None:
            self._columns = frozenset(block)
        if block.keys() != self._columns:
            raise MixtureError(
                f"a block of {name!r} has the columns {', '.join(sorted(block))}, others have "
                f"{', '.join(sorted(self._columns))}: they have to be the same"
            )
        return block

    def _check_epoch(self, name: str, epoch: int) -> None:
        if epoch >= MOST and not self.allow_repetition:
            raise MixtureError(
                f"{name!r} was read {epoch} times, and more passes teach nothing: give it more text or a smaller "
                "weight, or set allow_repetition"
            )
        if epoch >= WORTH_WHILE:
            logger.warning_once(
                f"Pass {epoch + 1} over {name!r} begins: past {WORTH_WHILE} the same text is worth less and less."
            )


class _Packed:
    """A [`PackedStream`], which knows the way to any block."""

    def __init__(self, name: str, stream: PackedStream):
        self.name, self.stream, self.epoch = name, stream, 0

    def state_dict(self, block: int) -> dict[str, Any]:
        return self.stream.state_dict(block)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def blocks(self, first: int, check_epoch: Callable[[str, int], None]) -> Iterator[Any]:
        for block in self.stream:
            if self.stream.epoch != self.epoch:
                self.epoch = self.stream.epoch
                check_epoch(self.name, self.epoch)
            yield block


class _Rows:
    """Rows of something that ends and can be read again: each is a block."""

    def __init__(self, name: str, rows: Any):
        self.name, self.rows, self.epoch = name, rows, 0
        streamed = isinstance(rows, torch.utils.data.IterableDataset)
        self.indexed = not streamed and hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
        if self.indexed and len(rows) == 0:
            raise MixtureError(f"the stream of {name!r} is empty")
        if not self.indexed and (not hasattr(rows, "__iter__") or iter(rows) is rows):
            raise MixtureError(
                f"the stream of {name!r} can be read once at most: give something that can be iterated again"
            )
        # Where reading may start to get at a block: its number, the pass, the row within it and the rows' own state
        self._marks: list[dict[str, Any]] = []

    def state_dict(self, block: int) -> dict[str, Any]:
        if self.indexed:
            return {}
        before = [mark for mark in self._marks if mark["block"] <= block]
        self._marks = before[-1:] + self._marks[len(before) :]
        return {"mark": before[-1] if before else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._marks = [] if state.get("mark") is None else [state["mark"]]

    def blocks(self, first: int, check_epoch: Callable[[str, int], None]) -> Iterator[Any]:
        if self.indexed:
            yield from self._indexed(first, check_epoch)
        before = [mark for mark in self._marks if mark["block"] <= first]
        mark: dict[str, Any] = before[-1] if before else {"block": 0, "pass": 0, "row": 0, "source": None}
        self._marks = before[-1:]
        number, self.epoch, row, state = mark["block"], mark["pass"], mark["row"], mark["source"]
        while True:
            rows = self.rows
            keeps_state = hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict")
            if keeps_state:
                rows = copy.deepcopy(rows)  # one that was sent to a place starts there from then on
                if hasattr(rows, "set_epoch"):
                    rows.set_epoch(self.epoch)
                if state is not None:
                    rows.load_state_dict(state)
            seen = row if keeps_state else 0
            for block in rows:
                seen += 1
                if seen <= row:
                    continue
                number += 1
                if number > first:
                    yield block
                # Behind the row: whoever goes on here has had it
                if number % MARK_EVERY == 0:
                    source = copy.deepcopy(rows.state_dict()) if keeps_state else None
                    self._marks.append({"block": number, "pass": self.epoch, "row": seen, "source": source})
            if seen == 0:
                raise MixtureError(f"the stream of {self.name!r} is empty")
            row, state, self.epoch = 0, None, self.epoch + 1
            check_epoch(self.name, self.epoch)

    def _indexed(self, first: int, check_epoch: Callable[[str, int], None]) -> Iterator[Any]:
        self.epoch, row = divmod(first, len(self.rows))
        while True:
            for place in range(row, len(self.rows)):
                yield self.rows[place]
            row, self.epoch = 0, self.epoch + 1
            check_epoch(self.name, self.epoch)


def epochs_needed(weights: Weights, available: Mapping[str, int], total_tokens: int) -> dict[str, float]:
    """How often each domain's text is read in a run of so many tokens, before it begins.

    Args:
        weights: shares of tokens by domain.
        available: tokens of each domain's text.
        total_tokens: of the run.
    """
    return {
        name: share * total_tokens / available[name] if available[name] else float("inf")
        for name, share in weights.items()
        if share
    }


__all__ = ["MOST", "WORTH_WHILE", "MixedStream", "MixtureError", "epochs_needed", "mix"]
