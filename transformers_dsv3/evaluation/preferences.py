"""Which side of preference pairs a model itself finds more likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def preference_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int,
    batch_size: int = 16,
) -> dict[str, float]:
    """Share of pairs whose `chosen` has the larger log-probability given `prompt`, summed over its tokens and the end.

    Args:
        rows: with `prompt`, `chosen`, `rejected`, and `kind` if there are several.
        max_length: tokens of prompt and completion that count.

    Returns:
        `all` and each kind; `shorter_is_chosen`, what choosing the side with fewer tokens would reach (ties by half).
    """
    was_training = model.training
    model.eval()
    sequences = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"][:max_length]
            sequences.append((start, torch.tensor(ids)))
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda at: len(sequences[at][1]))  # little padding
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids_BT = torch.nn.utils.rnn.pad_sequence([sequences[at][1] for at in batch], batch_first=True)
        labels_BT = torch.full_like(ids_BT, -100)
        for place, at in enumerate(batch):
            start, ids = sequences[at]
            labels_BT[place, start : len(ids)] = ids[start:]
        # Causal attention keeps the padding behind a sequence out of it
        logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits[:, :-1].float().cpu()
        nll_BT = cross_entropy(logits_BTV.transpose(1, 2), labels_BT[:, 1:], reduction="none")
        sums[batch] = -nll_BT.double().sum(dim=1)
    model.train(was_training)
    right = (sums[0::2] > sums[1::2]).double()
    lengths = torch.tensor([len(ids) for _, ids in sequences])
    shorter = (lengths[0::2] < lengths[1::2]).double() + 0.5 * (lengths[0::2] == lengths[1::2]).double()
    kinds = [row.get("kind", "all") for row in rows]
    result = {"all": float(right.mean())}
    for kind in sorted(set(kinds) - {"all"}):
        result[kind] = float(right[[at for at, of in enumerate(kinds) if of == kind]].mean())
    return {**result, "shorter_is_chosen": float(shorter.mean())}
