"""Text that a checkpoint is measured on, read and put into its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.text_files import TextError, build_corpus, read_documents, standard_library
from ..option_error import OptionError
from ..training.quickstart_run import QuickstartSettings
from .routing import text_stream


def read_texts(paths: Sequence[Path] | None) -> tuple[str, list[str]]:
    """Where the text comes from, in words, and the texts. Without paths, what `quickstart` holds out.

    Raises:
        OptionError: a path that is none, or no text.
    """
    try:
        if paths:
            documents = [document for path in paths for document in read_documents(path)[0]]
            return ", ".join(map(str, paths)), [document.text for document in documents]
        # As `quickstart` cuts it, so that its checkpoints are measured on what they have not seen
        source = "the Python standard library"
        corpus = build_corpus(standard_library(), source, max_bytes=QuickstartSettings.max_text_bytes)
        return f"{source}, {corpus.split}", [document.text for document in corpus.held_out]
    except TextError as error:
        raise OptionError("--text", str(error)) from error


def checked_stream(
    option: str, checkpoint: str, tokenizer: Any, texts: Sequence[str], window: int, vocab_size: int
) -> torch.Tensor:
    """The texts as token ids that the model knows, int64 `(n_tokens,)`, at least a window of them.

    Args:
        option: by which the checkpoint was named.

    Raises:
        OptionError: there is less text, or the tokenizer is another model's.
    """
    stream = text_stream(tokenizer, texts)
    if stream.numel() < window:
        raise OptionError(
            "--text", f"the text makes only {stream.numel():,} tokens, fewer than one window of {window}"
        )
    largest = int(stream.max())
    if largest >= vocab_size:
        raise OptionError(
            option,
            f"{checkpoint}: its tokenizer gives token {largest}, outside the model's vocabulary of {vocab_size}: it "
            "belongs to another model",
        )
    return stream
