"""Command line arguments that say which text to train on, for `HfArgumentParser`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ..data.byte_bpe import train_byte_bpe
from ..data.local_paths import local_or_hub
from ..data.mixture import MixedStream
from ..data.packed_stream import HeldOutBlocks, PackedStream, check_boundary_tokens
from ..data.python_reference import python_reference
from ..data.text_files import Corpus, TextError
from ..data.text_mixture import HeldOutMixture, TextMixture, read_mixture
from ..data.text_stream import TextStream, stream_corpus, stream_dataset, stream_files
from ..data.tuning_examples import TuningExamples, dataset_examples, text_examples


logger = logging.get_logger(__name__)

# Less than this teaches nothing that holds for other text.
MIN_TEXT_BYTES = 100_000
# How much of the text a new tokenizer is trained on
TOKENIZER_BYTES = 10_000_000


@dataclass
class TextArguments:
    """The text, and how it is cut into blocks of tokens. It is read and tokenized while training goes on."""

    text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text files, or folders of which every UTF-8 file is read (source code as well as prose). Without "
            "--text and --dataset: the source of Python's standard library."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "In place of --text, a dataset that `datasets` streams: a name on the Hub, a local folder, or a "
            "local .jsonl, .parquet, .csv or .txt file."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration, if it has any."})
    dataset_split: str = field(default="train", metadata={"help": "The dataset's split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "The dataset's split to evaluate on. Default: --eval_documents of the training split."},
    )
    eval_documents: int = field(
        default=200,
        metadata={"help": "How many of the dataset's first documents are held out for evaluation."},
    )
    text_column: str = field(default="text", metadata={"help": "The dataset's column that holds the text."})
    block_size: int = field(
        default=256,
        metadata={
            "help": "Tokens of an example. Documents are laid end to end and cut into blocks of this size, so no "
            "token is padding. Memory grows with it times the batch size."
        },
    )
    reset_positions: bool = field(
        default=False,
        metadata={
            "help": "Hide the documents of a block from each other: positions start again with each document. Off, as "
            "DeepSeek-V3 was pre-trained; worth its cost where documents are much shorter than a block."
        },
    )
    shuffle_window: int = field(
        default=1024,
        metadata={
            "help": "Blocks that are shuffled together. Larger mixes documents better, and takes longer to fill at "
            "the start and when resuming; 1 keeps the order of the text."
        },
    )

    def check(self, max_position_embeddings: int) -> None:
        """Refuse what can be told to be wrong without reading text.

        Raises:
            ValueError: naming the option.
        """
        if self.text and self.dataset:
            raise ValueError("--text and --dataset: give one of them")
        for name, least in (("block_size", 2), ("shuffle_window", 1), ("eval_documents", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.block_size > max_position_embeddings:
            raise ValueError(
                f"--block_size {self.block_size} exceeds the model's max_position_embeddings={max_position_embeddings}"
            )

    def stream(self, seed: int, exclude: Path, default: Corpus | None = None) -> TextStream:
        """The text as a stream, `exclude` (the folder that is trained into) left out.

        Args:
            default: in place of the standard library, where neither `text` nor `dataset` is given.

        Raises:
            TextError: it is missing or too little.
        """
        if default is not None and not self.text and not self.dataset:
            return stream_corpus(default, seed)
        if self.dataset:
            stream = stream_dataset(
                self.dataset,
                config=self.dataset_config,
                split=self.dataset_split,
                text_column=self.text_column,
                held_out_split=self.eval_split,
                held_out_documents=self.eval_documents,
            )
        else:
            stream = stream_files(
                [Path(path).expanduser() for path in self.text] if self.text else None, seed=seed, exclude=exclude
            )
        found = sum(len(text.encode("utf-8")) for text in stream.head(MIN_TEXT_BYTES))
        if found < MIN_TEXT_BYTES:
            raise TextError(
                f"{stream.source} has {found:,} bytes of text beside what is held out ({stream.split}); at least "
                f"{MIN_TEXT_BYTES:,} are needed to learn from"
            )
        return stream

    def datasets(
        self, stream: TextStream, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> tuple[PackedStream, HeldOutBlocks]:
        """The blocks to train on and the blocks held out.

        Raises:
            TextError, ValueError: less than a block is held out, or the tokenizer cannot mark where documents end.
        """
        check_boundary_tokens(tokenizer)
        packed = PackedStream(
            stream.texts_of_pass,
            tokenizer,
            self.block_size,
            text_column=stream.text_column,
            reset_positions=self.reset_positions,
            shuffle_window=self.shuffle_window,
            seed=seed,
        )
        return packed, HeldOutBlocks(stream, tokenizer, self.block_size, self.reset_positions)

    def settings(self, stream: TextStream | TextMixture) -> dict[str, Any]:
        """What decides which blocks come in which order, for `check_run_folder`."""
        return {
            "text": stream.source,
            "text_fingerprint": stream.fingerprint,
            **{name: getattr(self, name) for name in ("block_size", "reset_positions", "shuffle_window")},
        }


@dataclass
class CorpusArguments(TextArguments):
    """The text, of one kind or of several domains in given shares."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "In place of --text, a mixture of domains: a JSON file (examples/data.md), or the folder that "
            "`transformers-dsv3 filter` wrote."
        },
    )
    weights: str | None = field(
        default=None,
        metadata={"help": "Shares of tokens in place of those of --data: 'article', or JSON, {\"code\": 0.35, …}."},
    )
    allow_repetition: bool = field(
        default=False, metadata={"help": "Train even where a domain of --data would be read more than 16 times."}
    )

    def check_mixture(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ValueError: naming them.
        """
        if self.data and (self.text or self.dataset):
            raise ValueError(f"--data and --{'text' if self.text else 'dataset'}: give one of them")
        if self.weights and not self.data:
            raise ValueError("--weights are those of the domains of --data, which is not given")

    def stream(  # type: ignore[override]
        self, seed: int, exclude: Path, default: Corpus | None = None, run: TrainingArguments | None = None
    ) -> TextStream | TextMixture:
        """As of [`TextArguments`], or the mixture that `data` names.

        Args:
            run: of which it is told beforehand how often it would read a domain.

        Raises:
            TextError, ValueError: a domain has no documents, or would be read more than 16 times while
                `allow_repetition` is off; it is named.
        """
        self.check_mixture()
        if not self.data:
            return super().stream(seed, exclude, default)
        mixture = read_mixture(self.data, seed, exclude, _weights(self.weights))
        for name, stream in mixture.streams.items():
            if not stream.head(1):
                raise TextError(f"--data {self.data}: the domain {name!r} has no documents beside those held out")
        if run is not None:
            rows = run.train_batch_size * run.gradient_accumulation_steps * run.world_size
            total = run.max_steps * rows * self.block_size
            refusal = mixture.repetition_refusal(total, self.block_size)
            if refusal and not self.allow_repetition:
                raise ValueError(f"--data {self.data}: {refusal}, or give --allow_repetition")
            if warning := mixture.repetition_warning(total, self.block_size):
                logger.warning_once(f"--data {self.data}: {warning}")
        return mixture

    def datasets(  # type: ignore[override]
        self, stream: TextStream | TextMixture, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> tuple[PackedStream | MixedStream, HeldOutBlocks | HeldOutMixture]:
        """As of [`TextArguments`], or those of a mixture."""
        if not isinstance(stream, TextMixture):
            return super().datasets(stream, tokenizer, seed)
        check_boundary_tokens(tokenizer)
        packed = stream.packed(
            tokenizer,
            self.block_size,
            reset_positions=self.reset_positions,
            shuffle_window=self.shuffle_window,
            seed=seed,
            allow_repetition=self.allow_repetition,
        )
        return packed, HeldOutMixture(stream, tokenizer, self.block_size, self.reset_positions)


def _weights(given: str | None) -> Any:
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ValueError(f"--weights is no JSON: {error}") from None


@dataclass
class DomainArguments:
    """The text of a domain for supervised fine-tuning, and the text that must not suffer."""

    text: list[str] | None = field(
        default=None,
        metadata={"help": "Files or folders to train on. Default: the reference documentation of Python."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "In place of --text, a dataset's name, or a .jsonl, .parquet or .csv file."}
    )
    general: list[str] | None = field(
        default=None,
        metadata={"help": "Files or folders of general text, of which a part is measured. Default: standard library."},
    )

    def examples(self, seed: int, exclude: Path) -> TuningExamples:
        """Examples of the domain, `exclude` (the folder that is trained into) left out.

        Raises:
            ValueError: they are missing or cannot be read, or `text` and `dataset` are both given.
        """
        if self.text and self.dataset:
            raise ValueError("--text and --dataset: give one of them")
        if self.dataset:
            return dataset_examples(self.dataset, seed)
        if self.text:
            return text_examples(stream_files(self.text, seed=seed, exclude=exclude))
        return text_examples(stream_corpus(python_reference(), seed))


def given_or_trained_tokenizer(
    given: str | Path | None, stream: TextStream | TextMixture, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer of that folder or name; where there is none, a byte-level BPE trained on the first of the text.

    Args:
        config: of the model: the size of its vocabulary and its context.

    Raises:
        ValueError: it has more tokens than the model, or is a folder that is not there or holds no tokenizer.
        OSError: it cannot be opened.
    """
    if given is None:
        return train_byte_bpe(stream.head(TOKENIZER_BYTES), config.vocab_size, config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(local_or_hub(str(given), one_of=("tokenizer*", "vocab*", "*.model")))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer {given} has {len(tokenizer):,} tokens, more than the model's vocabulary of "
            f"{config.vocab_size:,}"
        )
    return tokenizer
