"""The loop of `generate` around a decoding step, on the CPU, without what only other kinds of generation need."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_steps_dsv3 import Steps
from .sampling_dsv3 import NextToken


_KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}


def loop_refusal(
    model: Any,
    input_ids: torch.Tensor,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why `generate` runs Transformers' own loop, or None."""
    if model.device.type != "cpu" or input_ids.device.type != "cpu":
        return "on a GPU launches and waiting count, not these operators"
    wanted = (config.output_scores, config.output_logits, config.output_attentions, config.output_hidden_states)
    if config.return_dict_in_generate and any(wanted):
        return "scores, logits, attentions or hidden states are to be returned"
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache") or not isinstance(cache, Cache) or cache.is_compileable:
        return "takes caches that grow"
    if others := set(model_kwargs) - _KNOWN_INPUTS:
        return f"knows nothing of {', '.join(sorted(others))}"
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if synced_gpus or config.is_assistant or not alone:
        return "runs in one process, on its own"
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill"):
        if name in vars(model) or getattr(type(model), name) is not getattr(GenerationMixin, name):
            return f"`{name}` is somebody else's"
    if config._pad_token_tensor is None and any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria):
        return "rows that end need a padding token"
    return None


class Ended:
    """Which rows have ended. Length and end tokens are looked at here, any other criteria as they are."""

    def __init__(self, criteria: StoppingCriteriaList, config: GenerationConfig, rows: int):
        self.criteria = criteria
        self.rows = [False] * rows
        # As in Transformers, rows are padded behind their end if there are end tokens
        self.pads = any(hasattr(one, "eos_token_id") for one in criteria)
        self.pad = int(config._pad_token_tensor) if self.pads else 0
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        self.max_length = min(lengths, default=float("inf"))
        self.ends: set[int] | None = set()
        for one in criteria:
            if type(one) is EosTokenCriteria:
                self.ends |= set(one.eos_token_id.tolist())
            elif type(one) is not MaxLengthCriteria or _warns(one):
                self.ends = None
                break

    def padded(self, next_B: torch.Tensor) -> torch.Tensor:
        return next_B.masked_fill(torch.tensor(self.rows), self.pad) if self.pads and any(self.rows) else next_B

    def all_after(self, next_B: torch.Tensor, input_ids: torch.Tensor) -> bool:
        if self.ends is None:
            now = self.criteria(input_ids, None).tolist()
        else:
            now = [token in self.ends for token in next_B.tolist()]
        self.rows = [before or ends for before, ends in zip(self.rows, now, strict=True)]
        return all(self.rows) or input_ids.shape[1] >= self.max_length


def _warns(criteria: MaxLengthCriteria) -> bool:
    """Whether it has a warning to give before the text ends: of positions the model was not made for."""
    return criteria.max_position_embeddings is not None and criteria.max_length > criteria.max_position_embeddings


def _steps_of(
    model: Any, choose: NextToken, ended: Ended, streamer: Any, mask: Any, positions: torch.Tensor | None
) -> Steps | None:
    """What makes the steps without calling the model, where its masks and positions are of the usual kinds."""
    if mask is not None and (type(mask) is not torch.Tensor or mask.dim() != 2):
        return None
    if positions is not None and (positions.dim() != 2 or positions.dtype is not torch.int64):
        return None
    return Steps(model, streamer is None and ended.ends is not None and not choose.processors)


def decode(
    model: Any,
    input_ids: torch.Tensor,
    choose: NextToken,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """[`GenerationMixin._sample`] where [`loop_refusal`] has nothing against it. The model is called as there.

    Returns token ids `(B, length)`, int64, or the output that holds them and the cache.
    """
    ended = Ended(stopping_criteria, config, len(input_ids))
    outputs = model._prefill(input_ids, config, model_kwargs)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    cache, called = outputs.past_key_values, {"use_cache": True, "return_dict": True}
    if "logits_to_keep" in model_kwargs:
        called["logits_to_keep"] = model_kwargs["logits_to_keep"]
    if positions is not None:
        positions = positions[..., -1:]
    logits_BV, is_of_steps = outputs.logits[:, -1], False
    steps = _steps_of(model, choose, ended, streamer, mask, positions)
    # Where nothing is padded, and positions are the places in the cache, neither is looked at
    is_plain = mask is None or bool(mask.all())
    is_plain = is_plain and (positions is None or bool((positions == cache.get_seq_length() - 1).all()))
    while True:
        if not (is_of_steps and choose.only_reads):
            # A copy: processors may write to it, and the logits of a long prompt are not kept
            logits_BV = logits_BV.to(copy=True, dtype=torch.float32, device=input_ids.device)
        del outputs
        next_B = ended.padded(choose(input_ids, logits_BV))
        input_ids = torch.cat([input_ids, next_B[:, None]], dim=1)
        stop = ended.all_after(next_B, input_ids)
        if streamer is not None:
            streamer.put(next_B)
        if stop:
            break
        outputs = None
        if positions is not None:
            positions = positions + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if steps is not None:
            places = None if is_plain or positions is None else positions[:, 0].expand(len(next_B)).contiguous()
            logits_BV = steps.logits(next_B, cache, places, None if is_plain else mask)
        is_of_steps = steps is not None and logits_BV is not None
        if not is_of_steps:
            if positions is not None:
                called["position_ids"] = positions
            if mask is not None:
                called["attention_mask"] = mask
            outputs = model(input_ids=next_B[:, None], past_key_values=cache, **called)
            cache, logits_BV = outputs.past_key_values, outputs.logits[:, -1]
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)
