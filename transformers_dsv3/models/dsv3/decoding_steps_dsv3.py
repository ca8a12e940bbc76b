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


def is_unwatched(own_code: bool) -> bool:
    """Whether nothing but this package's and Transformers' code can have run since the last step."""
    return own_code and _is_alone()


class Steps:
    """Steps of a text that `generate` goes on with, a few tokens a row.

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

        Arguments are those of `run`, for one token a row.
        """
        positions_B1 = None if positions_B is None else positions_B[:, None]
        outputs = self.run(tokens_B[:, None], cache, positions_B1, mask_BS)
        return None if outputs is None else outputs[1][:, 0]

    def run(
        self, tokens_BQ: torch.Tensor, cache: Cache, positions_BQ: torch.Tensor | None, mask_BS: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The last hidden states `(B, Q, D)` and logits `(B, Q, vocabulary)`, or None where the model is to be called.

        Args:
            tokens_BQ: ids that the embedding has.
            positions_BQ: int64, None for the places in the cache.
            mask_BS: bool or int64, with the new tokens, 0 for padding; None for none.
        """
        room, self._room = self._room, None
        B, Q = tokens_BQ.shape
        if room is None or not is_unwatched(self._own_code) or room.filled + Q > room.latent.shape[3]:
            room = self._prepare(tokens_BQ, cache)
        if room is None:
            return None
        model, program, length = self._model, self._program, room.filled
        assert program is not None
        if Q > 1 and not _takes(model.model, program, B, Q, length):
            return None
        last = length + Q - 1 if positions_BQ is None else int(positions_BQ.max())
        if last >= model.config.max_position_embeddings or (positions_BQ is not None and int(positions_BQ.min()) < 0):
            return None  # of which a warning is given there
        decoding_dsv3.Decoding.reach(model.model, program, last)
        mask_BS = None if mask_BS is None else mask_BS.bool().contiguous()
        positions_BQ = None if positions_BQ is None else positions_BQ.contiguous()
        batch = NewTokens([length] * B, [Q] * B, None, positions_BQ, mask_BS, tokens_BQ.contiguous())
        outputs = launch(STEP["program"], program.run, None, batch, room.latent, room.k_rope, True)
        if outputs is None:
            return None
        room.filled = length + Q
        self._room = room
        hidden, logits = outputs
        return hidden.view(B, Q, -1), logits.view(B, Q, -1)

    def _prepare(self, tokens_BQ: torch.Tensor, cache: Cache) -> SharedRoom | None:
        """Where the program writes next, or None where it has to be left to the model's call."""
        model, (B, Q) = self._model, tokens_BQ.shape
        if type(cache) is not DynamicCache or not is_undisturbed(tokens_BQ) or not _is_called_plainly(model):
            return None
        length = cache.get_seq_length()
        ends = whole_program(model, cache) if length else None
        if ends is None or not _takes(model.model, ends.layers, B, Q, length):
            return None
        self._program = ends.program
        return shared_room(cache, ends.layers.layers, torch.empty(B, Q, 0, dtype=ends.layers.dtype, device="cpu"))


def whole_program(model: Any, cache: Cache) -> decoding_dsv3.Ends | None:
    """The program of a model from token ids to logits, or None where it has none."""
    decoder = model.model
    dtype = getattr(getattr(decoder.norm, "weight", None), "dtype", None)
    program = None if dtype is None else decoder.decoding.program_for(decoder, dtype, cache)
    if program is None:
        return None
    ends = decoder.decoding.ends_for(model, program)
    is_whole = ends.has_embedding and ends.has_head
    return ends if is_whole and model.lm_head.out_features <= decoder.embed_tokens.num_embeddings else None


def _takes(decoder: Any, program: Program, B: int, Q: int, length: int) -> bool:
    """Whether a step of so many tokens behind those that are cached is better made by the program."""
    if Q > decoding_dsv3.MOST_QUERIES or B * Q > min(decoding_dsv3.MOST_TOKENS, decoding_dsv3.most_tokens(program)):
        return False
    return decoder.layers[0].self_attn.is_absorbed_cheaper(Q, length + Q)  # type: ignore[no-any-return]


class Drafts:
    """Drafts by the programs of a model's MTP layers, over a cache of their own.

    Args:
        model: a `DeepseekV3ForCausalLM`.
        own_code: as of [`Steps`].
    """

    def __init__(self, model: Any, own_code: bool):
        self._model, self._own_code = model, own_code
        self._programs: list[Program] | None = None
        self._room: SharedRoom | None = None

    def begin(self, tokens_BW: torch.Tensor, cache: Cache, last: int) -> bool:
        """Whether the programs draft behind tokens that are at positions up to `last`, so that `run` may be called."""
        room, self._room = self._room, None
        B, W = tokens_BW.shape
        if room is None or not is_unwatched(self._own_code) or room.filled + W > room.latent.shape[3]:
            room = self._prepare(tokens_BW, cache)
        if room is None or self._programs is None or last >= self._model.config.max_position_embeddings:
            return False
        if not _takes(self._model.model, self._programs[0], B, W, room.filled):
            return False
        for program in self._programs:
            decoding_dsv3.Decoding.reach(self._model.model, program, last)
        self._room = room
        return True

    def run(
        self,
        depth: int,
        previous_BWD: torch.Tensor,
        tokens_BW: torch.Tensor,
        positions_BW: torch.Tensor,
        mask_BS: torch.Tensor | None,
        wanted_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """One MTP layer: its hidden states `(B, W, D)`, and logits `(B, vocabulary)` of one slot of each row.

        Args:
            tokens_BW: those whose embeddings the layer sees beside the hidden states.
            mask_BS: bool, contiguous, over cached and new slots; None for none.
            wanted_B: the slot, counted through all rows.
        """
        assert self._room is not None and self._programs is not None
        (B, W), room, program = tokens_BW.shape, self._room, self._programs[depth]
        batch = NewTokens([room.filled] * B, [W] * B, None, positions_BW, mask_BS, tokens_BW, wanted_B)
        held = room.latent[depth : depth + 1], room.k_rope[depth : depth + 1]
        outputs = launch(STEP["program"], program.run, None, batch, *held, True, previous_BWD)
        if outputs is None:
            self._room = None
            return None
        return outputs[0].view(B, W, -1), outputs[1]

    def end(self, slots: int) -> None:
        """Counts what was written as cached by all layers; one that was not run will not be, as the text is ending."""
        assert self._room is not None
        self._room.filled += slots

    def _prepare(self, tokens_BW: torch.Tensor, cache: Cache) -> SharedRoom | None:
        model, (B, W) = self._model, tokens_BW.shape
        if not is_undisturbed(tokens_BW) or not _is_called_plainly(model) or not cache.get_seq_length():
            return None
        ends = whole_program(model, cache)
        self._programs = None if ends is None else model.model.decoding.drafts_for(model, ends)
        if self._programs is None:
            return None
        like = torch.empty(B, W, 0, dtype=self._programs[0].dtype, device="cpu")
        return shared_room(cache, len(self._programs), like)
