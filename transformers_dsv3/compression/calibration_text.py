"""Text that a checkpoint is calibrated on, in its tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..data.text_files import Document, TextError, build_corpus, read_documents, standard_library
from ..evaluation.routing import text_stream
from ..option_error import OptionError
from ..training.quickstart_run import QuickstartSettings
from .settings import CompressionSettings


# Fewer tell less of a layer's inputs than rounding each weight on its own does without any
LEAST_TOKENS = 2048
# Of a longer text so many times the wanted tokens are read, whole documents in an order drawn by the seed
_READ = 4


@dataclass(frozen=True)
class CalibrationText:
    """Windows of a text.

    Attributes:
        source: where it comes from, in words.
        windows: token ids int64 `(windows, window + MTP layers)`: MTP layers see so many tokens ahead.
        sha256: of the token ids.
    """

    source: str
    windows: torch.Tensor
    sha256: str


def calibration_text(
    checkpoint: Path, paths: Sequence[Path] | None, settings: CompressionSettings, mtp_layers: int, vocab_size: int
) -> CalibrationText:
    """Read text and draw windows of it.

    Args:
        checkpoint: folder with the tokenizer.
        paths: UTF-8 text files, and folders of some; None for the part of the standard library that `quickstart`
            trains on.

    Raises:
        OptionError: a path that is none, no text or too little, or a tokenizer that is none or another model's.
    """
    source, documents = _documents(paths)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError("CHECKPOINT", f"{checkpoint} has no tokenizer to calibrate with: {reason}") from error
    draw = random.Random(settings.seed)
    draw.shuffle(documents)
    pieces: list[torch.Tensor] = []
    read = 0
    for document in documents:
        pieces.append(text_stream(tokenizer, [document.text]))
        read += len(pieces[-1])
        if read >= _READ * settings.tokens:
            break
    stream = torch.cat(pieces)
    length = settings.window + mtp_layers
    if len(stream) < max(LEAST_TOKENS, length):
        raise OptionError(
            "--text",
            f"{source} makes only {len(stream):,} tokens, too few to calibrate on: {max(LEAST_TOKENS, length):,} are "
            "the least",
        )
    largest = int(stream.max())
    if largest >= vocab_size:
        raise OptionError(
            "CHECKPOINT",
            f"{checkpoint}: its tokenizer gives token {largest}, outside the model's vocabulary of {vocab_size}: it "
            "belongs to another model",
        )
    starts = range(0, len(stream) - length + 1, settings.window)
    chosen = sorted(draw.sample(starts, min(len(starts), settings.tokens // settings.window)))
    windows = torch.stack([stream[start : start + length] for start in chosen])
    return CalibrationText(source, windows, hashlib.sha256(windows.numpy().tobytes()).hexdigest())


def _documents(paths: Sequence[Path] | None) -> tuple[str, list[Document]]:
    try:
        if paths:
            return ", ".join(map(str, paths)), [document for path in paths for document in read_documents(path)[0]]
        source = "the Python standard library"
        corpus = build_corpus(standard_library(), source, max_bytes=QuickstartSettings.max_text_bytes)
        return f"{source}, what quickstart trains on", list(corpus.train)
    except TextError as error:
        raise OptionError("--text", str(error)) from error
