"""Checks of model inputs, made before any compute.

What native accepts is accepted. Refused is what would crash the device or late, with a message that does not say why.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from .configuration_dsv3 import DeepseekV3Config


logger = logging.get_logger(__name__)

# Of so few numbers Python finds the largest sooner than an operator is called
FEW = 64


def bounds(numbers: torch.Tensor) -> tuple[int, int]:
    """The least and the largest of whole numbers, of which there are some."""
    if numbers.numel() <= FEW:
        values = numbers.flatten().tolist()
        return min(values), max(values)
    lowest, highest = numbers.aminmax()
    return int(lowest), int(highest)


def check_inputs(
    config: DeepseekV3Config,
    embedding: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: object,
    position_ids: torch.Tensor | None,
    past_length: int | torch.Tensor = 0,
    wait_for_device: bool = False,
) -> None:
    """Refuses inputs that would crash, and warns once of positions that the model was not made for.

    Shapes are always checked. Values are checked where they lie in the host's memory, since reading them from an
    accelerator would make the host wait for it at each step.

    Args:
        embedding: of the tokens; one that is no `nn.Embedding` may take any.
        input_ids: `(B, Q)`. inputs_embeds: `(B, Q, D)` in its place.
        attention_mask: `(B, S)`, or another form that is not checked.
        position_ids: `(B or 1, Q)`.
        past_length: cached positions; a tensor (static caches) is not read.
        wait_for_device: check values on an accelerator too.

    Raises:
        ValueError: naming the argument and what is wrong with it.
    """
    if is_torchdynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return  # values are not there to be read, or a mode would see the reading
    if torch._C._are_functorch_transforms_active():
        return  # nor are they under `vmap`

    tokens = input_ids if input_ids is not None else inputs_embeds
    name = "input_ids" if input_ids is not None else "inputs_embeds"
    if tokens is None:
        return
    is_readable = type(tokens) is torch.Tensor and (tokens.is_cpu or (wait_for_device and not tokens.is_meta))
    if tokens.shape[0] == 0 or tokens.shape[1] == 0:
        raise ValueError(f"`{name}` of shape {tuple(tokens.shape)} is empty: at least one token is needed.")

    # One that is hooked or replaced may take ids that stand for something else, such as images
    if (
        input_ids is not None
        and is_readable
        and type(embedding) is nn.Embedding
        and not (embedding._forward_pre_hooks or embedding._forward_hooks or "forward" in embedding.__dict__)
    ):
        low, high = bounds(input_ids)
        if low < 0 or high >= embedding.num_embeddings:
            raise ValueError(
                f"`input_ids` has token id {low if low < 0 else high}, outside the vocabulary of "
                f"{embedding.num_embeddings} tokens. Is the tokenizer this model's own?"
            )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        batch_size, length = tokens.shape[:2]
        # Transformers takes what a shorter mask lacks for padding, and hides the very tokens that are given.
        # `generate` takes the whole text, cached or not.
        before = past_length if isinstance(past_length, int) and not wait_for_device else 0
        # Of rows that are not there Transformers reads nothing where the mask hides nothing
        rows = attention_mask.shape[0]
        has_rows = rows >= batch_size or (rows == 1 and attention_mask.is_cpu and bool(attention_mask.all()))
        if not has_rows or attention_mask.shape[1] < before + length:
            raise ValueError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} does not fit `{name}` of {batch_size} rows "
                f"and {length} positions after {past_length} cached ones."
            )

    longest = None
    if position_ids is None:
        longest = tokens.shape[1] + past_length if isinstance(past_length, int) else tokens.shape[1]
    elif position_ids.is_cpu or (wait_for_device and not position_ids.is_meta):
        longest = bounds(position_ids)[1] + 1
    if longest is None or longest <= config.max_position_embeddings:
        return
    if config.rope_parameters.get("rope_type", "default") != "dynamic":  # which is made to go past its limit
        logger.warning_once(
            f"More positions than `max_position_embeddings={config.max_position_embeddings}` of this model, for which "
            "it was not trained: what it predicts there may be poor."
        )


def begins_anew(position_ids: torch.Tensor | None) -> bool:
    """Whether positions `(B or 1, Q)` go back somewhere, so that they are of several sequences behind each other."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2 or position_ids.is_meta:
        return False
    if is_torchdynamo_compiling() or torch._C._are_functorch_transforms_active():
        return True  # which Transformers finds out by its own means
    return bool((position_ids[:, 1:] <= position_ids[:, :-1]).any())


def new_token_mask(
    attention_mask: object, rows: int, length: int, past_length: int | torch.Tensor
) -> torch.Tensor | None:
    """`(B, Q)` bool, False for padding among the new tokens; None where a mask does not tell by token.

    Args:
        attention_mask: `(B, S)` counts, other forms do not; S may reach beyond the new tokens.
        rows: B. length: Q. past_length: cached positions, before the new tokens.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    start = past_length if attention_mask.shape[1] >= past_length + length else attention_mask.shape[1] - length
    return attention_mask[:rows, start : start + length].bool().expand(rows, -1)


def check_labels(
    vocab_size: int, labels: torch.Tensor | None, tokens: torch.Tensor | None, ignore_index: int = -100
) -> None:
    """Refuses labels that do not fit the tokens, or that lie outside the vocabulary (where the host can read them).

    Args:
        vocab_size: how many tokens the head knows.
        labels: `(B, S)`, `ignore_index` where there is no target. tokens: `(B, S)` ids or `(B, S, D)` embeddings.

    Raises:
        ValueError: naming what is wrong.
    """
    if labels is None or tokens is None or is_torchdynamo_compiling():
        return
    if labels.numel() != tokens.shape[:2].numel():
        raise ValueError(f"`labels` of shape {tuple(labels.shape)} do not fit tokens of {tuple(tokens.shape[:2])}.")
    if labels.device.type != "cpu" or labels.numel() == 0 or torch._C._len_torch_dispatch_stack():
        return
    if type(labels) is not torch.Tensor or torch._C._are_functorch_transforms_active():
        return
    targets = labels[labels != ignore_index]
    if targets.numel() == 0:
        logger.warning_once(f"A batch has `labels` of {ignore_index} only: it has no target, and its loss is 0.")
        return
    low, high = (int(value) for value in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`labels` range from {low} to {high}: each must be a token of the vocabulary of {vocab_size}, or "
            f"{ignore_index} where there is no target."
        )
