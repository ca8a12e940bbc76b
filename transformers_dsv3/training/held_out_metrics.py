"""What the trainer's own evaluation makes of held-out text: bits per byte, and losses before and after a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy


def nats_of_rows(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """What each row's targets cost, for `Trainer(preprocess_logits_for_metrics=…)`: fp32 `(B,)` in nats.

    Args:
        logits: `(B, L, V)`, or a tuple that begins with it.
        labels: `(B, L)`, -100 where there is no target, not shifted.
    """
    logits_BLV = logits[0] if isinstance(logits, tuple) else logits
    # Row by row: logits in fp32 are the largest tensor of an evaluation
    return torch.stack(
        [
            cross_entropy(row_LV[:-1].float(), targets_L[1:], reduction="sum", ignore_index=-100)
            for row_LV, targets_L in zip(logits_BLV, labels, strict=True)
        ]
    )


class BitsPerByteMetric:
    """`bits_per_byte` and `perplexity` (of a token), for `Trainer(compute_metrics=…)` beside [`nats_of_rows`].

    Args:
        bytes_per_token: of the held-out text.
        groups: of rows, each with its own `NAME_bits_per_byte` and `NAME_loss` (nats a token): name, numbers of the
            first row and of the one behind the last, bytes a token.
    """

    def __init__(self, bytes_per_token: float, groups: Sequence[tuple[str, int, int, float]] = ()):
        self.bytes_per_token = bytes_per_token
        self.groups = groups

    def __call__(self, prediction: Any) -> dict[str, float]:
        nats, labels = prediction.predictions.astype("float64"), prediction.label_ids[:, 1:]
        nats_per_token = float(nats.sum()) / max(int((labels != -100).sum()), 1)
        metrics = {
            "bits_per_byte": nats_per_token / math.log(2) / self.bytes_per_token,
            "perplexity": math.exp(nats_per_token),
        }
        for name, first, end, bytes_per_token in self.groups:
            loss = float(nats[first:end].sum()) / max(int((labels[first:end] != -100).sum()), 1)
            metrics |= {f"{name}_loss": loss, f"{name}_bits_per_byte": loss / math.log(2) / bytes_per_token}
        return metrics


def losses_of_parts(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Of two evaluations of several data sets, `Trainer(eval_dataset={name: …})`, both losses of each, by its name."""
    names = {key: match[1] for key in after if (match := re.fullmatch(r"eval_(\w+)_loss", key)) and key in before}
    return {name: (before[key], after[key]) for key, name in names.items()}


def loss_changes(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """[`losses_of_parts`] in words, a line each."""
    return "\n".join(
        f"{name:8} held-out loss {old:.3f} before, {new:.3f} after ({new - old:+.3f})"
        for name, (old, new) in losses_of_parts(before, after).items()
    )
