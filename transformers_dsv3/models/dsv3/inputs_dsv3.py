"""Checks of model inputs, made before any compute."""

import sys

import torch
from transformers.utils import logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from .configuration_dsv3 import Dsv3Config


logger = logging.get_logger(__name__)


def position_limit(config: Dsv3Config) -> int:
    """How many positions a model takes: no end for dynamic RoPE, which is made to grow past its limit."""
    grows = config.rope_parameters.get("rope_type", "default") == "dynamic"
    return sys.maxsize if grows else config.max_position_embeddings


def check_inputs(
    config: Dsv3Config,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_length: int | torch.Tensor = 0,
    wait_for_device: bool = False,
) -> None:
    """Refuses inputs that would crash the device or give meaningless output.

    Shapes are always checked. Values are checked where they lie in the host's memory, since reading them from an
    accelerator would make the host wait for it at each step.

    Args:
        input_ids: `(B, Q)`. inputs_embeds: `(B, Q, D)` in its place.
        attention_mask: `(B, past + Q)`, or another form that is not checked.
        position_ids: `(B or 1, Q)`.
        past_length: cached positions; a tensor (static caches) is not read.
        wait_for_device: check values on an accelerator too.

    Raises:
        ValueError: naming the argument and what is wrong with it.
    """
    if is_torchdynamo_compiling():
        return

    def readable(tensor: torch.Tensor | None) -> bool:
        return tensor is not None and (tensor.device.type == "cpu" or (wait_for_device and not tensor.is_meta))

    tokens = input_ids if input_ids is not None else inputs_embeds
    name = "input_ids" if input_ids is not None else "inputs_embeds"
    if tokens is None:
        return
    if tokens.shape[0] == 0 or tokens.shape[1] == 0:
        raise ValueError(f"`{name}` of shape {tuple(tokens.shape)} is empty: at least one token is needed.")

    if input_ids is not None and readable(input_ids):
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"`input_ids` has token id {low if low < 0 else high}, outside the vocabulary of "
                f"{config.vocab_size} tokens. Is the tokenizer this model's own?"
            )

    if attention_mask is not None and attention_mask.dim() == 2:
        batch_size, length = tokens.shape[:2]
        lengths = [length + past_length] if isinstance(past_length, int) else [attention_mask.shape[1]]
        if wait_for_device:
            lengths.append(length)  # `generate` takes the whole text too, cached or not
        if attention_mask.shape[0] != batch_size or attention_mask.shape[1] not in lengths:
            raise ValueError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} does not fit `{name}` of {batch_size} rows "
                f"and {length} positions after {past_length} cached ones."
            )
        hidden_rows = (~attention_mask.bool().any(dim=-1)).nonzero() if readable(attention_mask) else []
        if len(hidden_rows):
            raise ValueError(
                f"`attention_mask` hides every token of row {int(hidden_rows[0])}: there is nothing to attend to."
            )

    longest = None
    if position_ids is None:
        longest = tokens.shape[1] + past_length if isinstance(past_length, int) else tokens.shape[1]
        if wait_for_device:  # the whole text again, of which the mask tells how long it is
            longest = tokens.shape[1]
            if attention_mask is not None and attention_mask.dim() == 2:
                longest = attention_mask.shape[1]
    elif readable(position_ids):
        first, last = (int(value) for value in position_ids.aminmax())
        if first < 0:
            raise ValueError(f"`position_ids` has {first}: positions count from 0.")
        longest = last + 1
    limit = position_limit(config)
    if longest is not None and longest > limit:
        raise ValueError(f"{longest} positions exceed `max_position_embeddings={limit}` of this model.")


def check_labels(config: Dsv3Config, labels: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
    """Refuses labels that do not fit the tokens, or that lie outside the vocabulary (where the host can read them).

    Args:
        labels: `(B, S)`, -100 where there is no target. tokens: `(B, S)` ids or `(B, S, D)` embeddings.

    Raises:
        ValueError: naming what is wrong.
    """
    if labels is None or tokens is None or is_torchdynamo_compiling():
        return
    if labels.shape != tokens.shape[:2]:
        raise ValueError(f"`labels` of shape {tuple(labels.shape)} do not fit tokens of {tuple(tokens.shape[:2])}.")
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(value) for value in labels.aminmax())
    if high >= config.vocab_size or (low < 0 and bool(((labels < 0) & (labels != -100)).any())):
        raise ValueError(
            f"`labels` range from {low} to {high}: each must be a token of the vocabulary of {config.vocab_size}, or "
            "-100 where there is no target."
        )
    if high < 0:
        logger.warning_once("A batch has `labels` of -100 only: it has no target, and its loss is 0.")
