"""Steps of one text by the program of a model, from token ids to logits, without the modules' calls around it.

What a program rests on is compared before a step where anybody else's code may have run since the last one: streamers,
criteria and processors of the user's, other threads. In between nothing can have changed.
"""

import sys
import threading
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from ...kernels.backends import STEP
from ...kernels.cpu.cached import NewTokens
from ...kernels.cpu.step import Program
from ...kernels.dispatch import launch
from ...kernels.selection import is_undisturbed
from . import decoding_dsv3
from .cache_dsv3 import SharedRoom, shared_room
from .objectives_dsv3 import tell_decoder_the_targets


def _is_called_plainly(model: Any) -> bool:
    """Whether calling a `DeepseekV3ForCausalLM`, and its decoder, does what their classes say and nothing else."""
    from . import modeling_dsv3  # which imports this file

    decoder = model._modules["model"]
    for module, kind in ((model, modeling_dsv3.DeepseekV3ForCausalLM), (decoder, modeling_dsv3.DeepseekV3Model)):
        state = module.__dict__
        if type(module) is not kind or kind.forward is not modeling_dsv3.FORWARDS[kind] or "forward" in state:
            return False
        if state["_forward_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"] or module.training:
            return False
    if decoder._forward_pre_hooks or list(model._forward_pre_hooks.values()) != [tell_decoder_the_targets]:
        return False
    native = modeling_dsv3.native
    return (
        native.DeepseekV3Model.forward is modeling_dsv3.NATIVE_MODEL_FORWARD
        and native.DeepseekV3ForCausalLM.forward is modeling_dsv3.NATIVE_LANGUAGE_MODEL_FORWARD
    )


def _is_alone() -> bool:
    """Whether no other thread runs Python code, but those that watch over progress bars, as loading leaves one."""
    others = len(sys._current_frames()) - 1
    return not others or others == sum(type(thread).__module__.startswith("tqdm.") for thread in threading.enumerate())


class Steps:
    """Steps of a text that `generate` goes on with, one token a row.

    Args:
        model: a `DeepseekV3ForCausalLM`.
        own_code: whether between two steps runs nothing but this package's and Transformers' code.
    """

    def __init__(self, model: Any, own_code: bool):
        self._model, self._own_code = model, own_code
        self._program: Program | None = None
        self._room: SharedRoom | None = None

    def logits(
        self, tokens_B: torch.Tensor, cache: Cache, positions_B: torch.Tensor | None, mask_BS: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What a call of the model gives for the next token of each row, `(B, vocabulary)`, or None where it is to be.

        Args:
            positions_B: int64, None for the places in the cache.
            mask_BS: bool or int64, with the new tokens, 0 for padding; None for none.
        """
        B, room = len(tokens_B), self._room
        unwatched = self._own_code and _is_alone()
        if room is None or not unwatched or room.filled + 1 > room.latent.shape[3]:
            room = self._room = self._prepare(tokens_B, cache)
        if room is None:
            return None
        program: Any = self._program
        length = room.filled
        last = length if positions_B is None else int(positions_B.max())
        if last >= self._model.config.max_position_embeddings or (
            positions_B is not None and int(positions_B.min()) < 0
        ):
            return None  # of which a warning is given there
        decoding_dsv3.Decoding.reach(self._model.model, program, last)
        mask_BS = None if mask_BS is None else mask_BS.bool().contiguous()
        batch = NewTokens([length] * B, [1] * B, None, positions_B, mask_BS, tokens_B)
        outputs = launch(STEP["program"], program.run, None, batch, room.latent, room.k_rope, True)
        if outputs is None:
            self._room = None
            return None
        room.filled = length + 1
        return outputs[1]

    def _prepare(self, tokens_B: torch.Tensor, cache: Cache) -> SharedRoom | None:
        """Where the program writes next, or None where it has to be left to the model's call."""
        model, B = self._model, len(tokens_B)
        if type(cache) is not DynamicCache or not is_undisturbed(tokens_B) or not _is_called_plainly(model):
            return None
        decoder, length = model.model, cache.get_seq_length()
        dtype = getattr(getattr(decoder.norm, "weight", None), "dtype", None)
        if not length or dtype is None:
            return None
        program = decoder.decoding.program_for(decoder, dtype, cache)
        if program is None or B > min(decoding_dsv3.MOST_TOKENS, decoding_dsv3.most_tokens(program)):
            return None
        if not decoder.layers[0].self_attn.is_absorbed_cheaper(1, length + 1):
            return None
        ends = decoder.decoding.ends_for(model, program)
        if (
            not ends.has_embedding
            or not ends.has_head
            or model.lm_head.out_features > decoder.embed_tokens.num_embeddings
        ):
            return None
        self._program = ends.program
        return shared_room(cache, program.layers, torch.empty(B, 1, 0, dtype=dtype, device="cpu"))
