"""Examples for supervised fine-tuning, as TRL's `SFTTrainer` takes them: some to train on, some held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .local_paths import BUILDERS, local_or_hub
from .text_stream import TextStream


# TRL reads an example by one of these columns
COLUMNS = ("text", "prompt", "messages")


@dataclass(frozen=True)
class TuningExamples:
    """Examples of one source.

    Attributes:
        train, held_out: `datasets.Dataset`, of the same columns.
        source: what they are, in words.
    """

    train: Any
    held_out: Any
    source: str

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse chats where the tokenizer has no template for them.

        Raises:
            ValueError: see above.
        """
        if "messages" in self.train.column_names and tokenizer.chat_template is None:
            raise ValueError("--dataset has messages, for which the model's tokenizer needs a chat template")

    def cut(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str | None:
        """How many texts to train on are cut at so many tokens, in words; None for examples of other columns."""
        if "text" not in self.train.column_names:
            return None
        long = sum(len(tokenizer(text).input_ids) > max_length for text in self.train["text"])
        return f"{long:,} of {len(self.train):,} examples are cut at --max_length {max_length}."


def dataset_examples(name: str, seed: int) -> TuningExamples:
    """The examples of a dataset's `train` split; a tenth of them, 200 at most, is held out, drawn from `seed`.

    Args:
        name: as for `datasets.load_dataset`, or a file that ends in .jsonl, .json, .parquet, .csv, .arrow or .txt.

    Raises:
        ValueError: it cannot be read, has fewer than two examples, or none of the columns that TRL reads.
    """
    from datasets import load_dataset

    path = local_or_hub(name)
    builder = BUILDERS.get(Path(path).suffix)
    try:
        data = load_dataset(builder or path, split="train", **({"data_files": path} if builder else {}))
    except Exception as error:  # of many kinds, by the file's format; StopIteration where there is nothing
        raise ValueError(f"--dataset {path} cannot be read: {error or 'it has no rows'}") from error
    if len(data) < 2:
        raise ValueError(f"--dataset {path}: {len(data)} examples, some are to train on and some are held out")
    if not set(COLUMNS) & set(data.column_names):
        raise ValueError(f"--dataset {path} has no column text, prompt or messages: {data.column_names}")
    parts = data.train_test_split(min(200, max(1, len(data) // 10)), seed=seed)
    return TuningExamples(parts["train"], parts["test"], name)


def text_examples(stream: TextStream) -> TuningExamples:
    """The documents of a stream, each an example with a column `text`."""
    from datasets import Dataset

    return TuningExamples(
        Dataset.from_dict({"text": [row[stream.text_column] for row in stream.texts_of_pass(0)]}),
        Dataset.from_dict({"text": list(stream.held_out)}),
        f"{stream.source}, {stream.split}",
    )
