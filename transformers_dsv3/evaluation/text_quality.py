"""How well a language model predicts a text, in bits per byte, beside what general compressors make of it."""

from __future__ import annotations

import lzma
import math
import zlib
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of UTF-8 text, and over how many tokens and bytes it was measured."""

    value: float
    tokens: int
    bytes: int


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel,
    stream: torch.Tensor,
    n_bytes: int,
    *,
    window: int,
    stride: int,
    batch_size: int = 8,
) -> BitsPerByte:
    """Bits the model needs per byte of a text.

    Every token after the first is predicted exactly once. The text is cut into windows that start `stride` tokens
    apart; each window scores the tokens the one before it has not, so a token (but for the first `window` of the
    text) has at least `window - stride` tokens before it.

    Args:
        model: a causal language model.
        stream: the text's token ids, int64 `(n_tokens,)`. Begin and end tokens in it count as predictions, not as
            bytes, so that a model pays for telling where a document ends.
        n_bytes: bytes of UTF-8 text behind `stream`.
        window: tokens of a window.
        stride: tokens between two windows' starts, from 1 to `window - 1`.
    """
    if not 0 < stride < window:
        raise ValueError(f"stride must lie between 1 and window - 1 = {window - 1}, got {stride}")
    n_tokens = stream.numel()
    if n_tokens < 2:
        raise ValueError("bits per byte needs at least two tokens")
    was_training = model.training
    model.eval()
    nats = 0.0
    starts = list(range(0, max(n_tokens - window, 0) + stride, stride))
    for first in tqdm(
        range(0, len(starts), batch_size), desc="held-out text", unit="batch", leave=False, disable=None
    ):
        batch = starts[first : first + batch_size]
        ids_BT = torch.zeros(len(batch), min(window, n_tokens), dtype=torch.int64)
        # -100 marks what is not scored here: padding, and tokens that the window before has scored.
        labels_BT = torch.full_like(ids_BT, -100)
        for row, start in enumerate(batch):
            piece = stream[start : start + window]
            fresh = 1 if start == 0 else window - stride
            ids_BT[row, : piece.numel()] = piece
            labels_BT[row, fresh : piece.numel()] = piece[fresh:]
        ids_BT = ids_BT.to(model.device)
        # Causal attention keeps the zeros behind a short last window out of what is scored: no mask is needed.
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten().to(model.device), reduction="sum")
        nats += loss.item()
    model.train(was_training)
    return BitsPerByte(nats / math.log(2) / n_bytes, n_tokens - 1, n_bytes)


def text_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, window: int, stride: int
) -> float:
    """Mean cross-entropy of a text's tokens, in nats, see [`bits_per_byte`]."""
    stream = torch.tensor(tokenizer(text)["input_ids"])
    bits = bits_per_byte(model, stream, len(text.encode("utf-8")), window=window, stride=stride)
    return bits.value * bits.bytes / bits.tokens * math.log(2)


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """What zlib at level 9 and lzma at its strongest preset make of the same text, in bits per byte."""
    return {
        "zlib": 8 * len(zlib.compress(text, 9)) / len(text),
        "lzma": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
