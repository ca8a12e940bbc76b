"""The forward pass over pages of latents, for many sequences at once: some decode, others bring a part of a prompt.

Latents and rotary keys lie in pages of a pool, and each sequence has a table of the pages that hold its tokens, in
order (arXiv 2309.06180). What a page holds may be shared by several sequences; who may write to it is the caller's to
know. New tokens of all sequences go through the layers as one row of T tokens, without padding, so projections,
experts and head are the model's own modules, adapters, hooks and all. Attention alone looks at sequences.

Shape suffixes: B sequences, T new tokens of all of them, P pages of a table, W rows whose logits are wanted, and those
of `attention_dsv3.py`; F new tokens with features in place of embeddings.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ...kernels.backends import PAGED
from ...kernels.cpu.cached import NewTokens
from ...kernels.dispatch import serve
from ...kernels.pages import in_huge_pages
from .attention_dsv3 import AttendingCache, DeepseekV3Attention, is_known_attention
from .decoder_dsv3 import DeepseekV3DecoderLayer
from .decoding_dsv3 import ROPE_BY_LENGTH
from .inputs_dsv3 import bounds
from .linear_dsv3 import linear


# Tokens of a page. What a sequence leaves empty of its last one is lost, half a page on the average
PAGE_SIZE = 64


def paged_refusal(model: Any) -> str | None:
    """The reason why a model cannot run over pages, or None where it can.

    Args:
        model: a `DeepseekV3ForCausalLM`.
    """
    decoder = model.model
    layers = decoder.layers[: model.config.num_hidden_layers]
    for index, layer in enumerate(layers):
        if not isinstance(layer, DeepseekV3DecoderLayer) or not isinstance(layer.self_attn, DeepseekV3Attention):
            return f"layer {index} is a {type(layer).__name__}, not the plugin's own"
        if layer.self_attn.is_head_parallel:
            return "its heads are shared out among processes"
        if layer.self_attn.layer_idx != index:
            return f"layer {index}'s place in the cache is another"
    implementation = model.config._attn_implementation or "eager"
    if not is_known_attention(implementation):
        return f"{implementation!r} is an attention function that computes something of its own"
    if decoder.rotary_emb.rope_type in ROPE_BY_LENGTH:  # those of a sequence would depend on its neighbours
        return f"rotary embeddings of type {decoder.rotary_emb.rope_type!r} follow the longest position of a call"
    return None


class PagedLatents:
    """The memory of a page pool: what all layers hold of each token.

    Args:
        model: a `DeepseekV3ForCausalLM`, read for its sizes.
        pages: how many.
        page_size: tokens of a page.
        dtype, device: those of the model's activations unless given.

    Attributes:
        latent: `(layers, pages, page_size, R)`, normalised latents. Uninitialised until it is written to.
        k_rope: `(layers, pages, page_size, P)`, rotated keys that all heads share.

    Raises:
        ValueError: for sizes below 1, or a model that cannot run over pages.
    """

    def __init__(
        self,
        model: Any,
        pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        for name, number in (("pages", pages), ("page_size", page_size)):
            if number < 1:
                raise ValueError(f"`{name}` is {number}, not at least 1")
        if (reason := paged_refusal(model)) is not None:
            raise ValueError(f"The model does not run over pages: {reason}.")
        config, like = model.config, model.model.norm.weight
        self.pages, self.page_size = pages, page_size
        self.latent, self.k_rope = (
            in_huge_pages(
                torch.empty(
                    *(config.num_hidden_layers, pages, page_size, width),
                    dtype=dtype or like.dtype,
                    device=like.device if device is None else device,
                )
            )
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        )

    @property
    def bytes_per_page(self) -> int:
        """Bytes that a page takes in all layers."""
        return (self.latent.nbytes + self.k_rope.nbytes) // self.pages

    def copy_page(self, source: int, target: int) -> None:
        """Copies what a page holds, in all layers, to another one.

        Raises:
            IndexError: for a page that there is not.
        """
        for tensor in (self.latent, self.k_rope):
            tensor[:, target] = tensor[:, source]


@dataclass
class RaggedBatch:
    """New tokens of several sequences, for [`forward_pages`].

    Args:
        tokens_T: int64, all new tokens, sequence after sequence.
        starts_B: how many tokens of each sequence the pages hold already.
        counts_B: how many new ones each has, at least one.
        tables_BP: whole numbers, the pages of each sequence, in order, with room for its new tokens. Entries behind
            those that are needed are not read.
        wanted_W: int64, places in `tokens_T` whose logits are wanted.
        places_F, features_FD: int64, places in `tokens_T`, and what stands there in place of embeddings, of their
            dtype: features of pictures.
    """

    tokens_T: torch.Tensor
    starts_B: list[int]
    counts_B: list[int]
    tables_BP: torch.Tensor
    wanted_W: torch.Tensor
    places_F: torch.Tensor | None = None
    features_FD: torch.Tensor | None = None

    def embeds(self, embedding: Any) -> torch.Tensor:
        """Of the new tokens, `(T, D)`, with features in their places."""
        embeds_TD: torch.Tensor = embedding(self.tokens_T[None])[0]
        if self.places_F is None or self.features_FD is None:
            return embeds_TD
        return embeds_TD.index_copy(0, self.places_F, self.features_FD)


class PagedOutput(NamedTuple):
    """
    Args:
        logits: `(W, vocabulary)`, in the weights' dtype.
        hidden_states: `(T, D)` of all new tokens, after the last norm, from which MTP layers draft.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor


class _PagedStep(AttendingCache):
    """One pass over pages, in the place of a cache.

    In fp32 all sequences are attended on the latents themselves, be it cheaper or not, so that what a token gives does
    not depend on the pieces in which its text comes. Otherwise those are expanded for which it is cheaper.

    Args:
        tables_BP: int32, contiguous, on the pages' device.

    Attributes:
        positions_T: int64, of each new token in its sequence.
        places_T: int64, where each new token lies in the pool, counted in tokens.
    """

    def __init__(self, pages: PagedLatents, batch: RaggedBatch, tables_BP: torch.Tensor):
        self.pages, self.batch, self.tables_BP = pages, batch, tables_BP
        self.pool = pages.latent, pages.k_rope
        self.firsts = [0, *itertools.accumulate(batch.counts_B)]
        # Made with the first layer: sequences that are absorbed, with their rows among all, and the others
        self._forms: tuple[NewTokens | None, torch.Tensor | None, list[int]] | None = None

    @cached_property
    def positions_T(self) -> torch.Tensor:
        counts_B = torch.tensor(self.batch.counts_B)
        offsets_B = torch.tensor(self.batch.starts_B) - torch.tensor(self.firsts[:-1])
        positions_T = torch.arange(self.firsts[-1]) + offsets_B.repeat_interleave(counts_B)
        return positions_T.to(self.tables_BP.device)

    @cached_property
    def places_T(self) -> torch.Tensor:
        counts_B, size = torch.tensor(self.batch.counts_B), self.pages.page_size
        sequence_T = torch.arange(len(counts_B)).repeat_interleave(counts_B).to(self.tables_BP.device)
        return self.tables_BP[sequence_T, self.positions_T // size].long() * size + self.positions_T % size

    def _make_forms(self, attention: DeepseekV3Attention) -> tuple[NewTokens | None, torch.Tensor | None, list[int]]:
        starts, counts = self.batch.starts_B, self.batch.counts_B
        sequences = range(len(counts))
        exact = self.pages.latent.dtype is torch.float32
        expanded = [
            i for i in sequences if not exact and not attention.is_absorbed_cheaper(counts[i], starts[i] + counts[i])
        ]
        if not expanded:
            return NewTokens(starts, counts, self.tables_BP), None, []
        absorbed = [i for i in sequences if i not in set(expanded)]
        if not absorbed:
            return None, None, expanded
        rows = torch.cat([torch.arange(self.firsts[i], self.firsts[i + 1]) for i in absorbed])
        tables = self.tables_BP[absorbed]
        tokens = NewTokens([starts[i] for i in absorbed], [counts[i] for i in absorbed], tables)
        return tokens, rows.to(tables.device), expanded

    def attend(
        self,
        attention: DeepseekV3Attention,
        q_nope_1HTN: torch.Tensor,
        q_rope_1HTP: torch.Tensor,
        latent_11TR: torch.Tensor,
        k_rope_11TP: torch.Tensor,
    ) -> torch.Tensor:
        tensors = q_nope_1HTN, q_rope_1HTP, latent_11TR, k_rope_11TP
        layer, output, rest = attention.layer_idx, None, list(range(len(self.batch.counts_B)))
        if self._forms is None:
            self._forms = self._make_forms(attention)
        tokens, rows, expanded = self._forms
        if tokens is not None and attention.absorbed_refusal() is None:
            given = tensors if rows is None else tuple(tensor.index_select(2, rows) for tensor in tensors)
            weight = attention.kv_b_proj.weight
            output = serve(PAGED, attention, *given, weight, attention.scaling, self.pool, layer, tokens)
            rest = rest if output is None else expanded
        if output is not None and not rest:
            return output
        for pool, new in zip(self.pool, (latent_11TR, k_rope_11TP)):
            pool[layer].flatten(0, 1).index_copy_(0, self.places_T, new[0, 0])
        shape = q_nope_1HTN.shape[2], q_nope_1HTN.shape[1], attention.v_head_dim
        outputs_1THV = q_nope_1HTN.new_empty(1, *shape)
        if output is not None:
            outputs_1THV.index_copy_(1, rows, output)
        for i in rest:
            first, count = self.firsts[i], self.batch.counts_B[i]
            length = self.batch.starts_B[i] + count
            table = self.tables_BP[i, : -(-length // self.pages.page_size)]
            latent_1SR, k_rope_1SP = (pool[layer, table].flatten(0, 1)[None, :length] for pool in self.pool)
            own = slice(first, first + count)
            queries = q_nope_1HTN[:, :, own], q_rope_1HTP[:, :, own]
            outputs_1THV[:, own] = attention.attend_causally(*queries, latent_1SR, k_rope_1SP)
        return outputs_1THV


@torch.no_grad()
def forward_pages(model: Any, pages: PagedLatents, batch: RaggedBatch) -> PagedOutput:
    """New tokens of several sequences through a model. Their latents are in the pages afterwards.

    Each sequence attends what it has in the pages and its own new tokens up to each, nothing else. Decoder, layers and
    what is in them are called as they are, but the hooks of the model and of its decoder themselves, which would see
    no padded batch here.

    Where the program of a step runs (plain modules on a CPU), what a token gives in fp32 is the same to the last bit
    whatever comes beside it and in whatever pieces its text comes. In bf16 this holds of decoding rows in batches that
    the program takes: up to 256 tokens, fewer where PyTorch alone uses matrix units of the processor (`most_tokens`).

    Args:
        model: a `DeepseekV3ForCausalLM` in evaluation mode.

    Raises:
        ValueError: naming the field, before anything is written.
    """
    decoder = model.model
    step = _begin(model, pages, batch)
    if (outputs := decoder.decoding.run_pages(model, step)) is not None:
        hidden_TD, logits_WV = outputs
        if logits_WV is None:
            logits_WV = linear(model.lm_head, hidden_TD[batch.wanted_W])
        return PagedOutput(logits_WV, hidden_TD)
    if (reason := paged_refusal(model)) is not None:
        raise ValueError(f"The model does not run over pages: {reason}.")
    hidden_1TD = batch.embeds(decoder.embed_tokens)[None]
    if hidden_1TD.dtype != pages.latent.dtype:
        raise ValueError(f"`pages` hold {pages.latent.dtype}, the activations are {hidden_1TD.dtype}")
    positions_1T = step.positions_T[None]
    angles = decoder.rotary_emb(hidden_1TD, positions_1T)
    for layer in decoder.layers[: model.config.num_hidden_layers]:
        hidden_1TD = layer(
            hidden_1TD,
            attention_mask=None,
            position_ids=positions_1T,
            past_key_values=step,
            use_cache=True,
            position_embeddings=angles,
        )
    hidden_TD = decoder.norm(hidden_1TD)[0]
    return PagedOutput(linear(model.lm_head, hidden_TD[batch.wanted_W]), hidden_TD)


def _begin(model: Any, pages: PagedLatents, batch: RaggedBatch) -> _PagedStep:
    """What stands for a cache.

    Raises:
        ValueError: naming the field.
    """
    if model.training:
        raise ValueError("`model` is in training mode: call `model.eval()`")
    starts, counts, device = batch.starts_B, batch.counts_B, pages.latent.device
    if not counts or len(starts) != len(counts) or len(batch.tables_BP) != len(counts):
        sizes = f"{len(starts)}, {len(counts)} and {len(batch.tables_BP)}"
        raise ValueError(
            f"`starts_B`, `counts_B` and `tables_BP` are of {sizes} sequences, not of as many, at least one"
        )
    if min(starts) < 0 or min(counts) < 1:
        raise ValueError(f"`starts_B` has {min(starts)} and `counts_B` {min(counts)}: at least 0 and 1 are needed")
    tokens = sum(counts)
    if batch.tokens_T.shape != (tokens,):
        raise ValueError(f"`tokens_T` is of shape {tuple(batch.tokens_T.shape)}, the counts are of {tokens} tokens")
    for name, numbers, below in (
        ("tokens_T", batch.tokens_T, getattr(model.model.embed_tokens, "num_embeddings", model.config.vocab_size)),
        ("wanted_W", batch.wanted_W, tokens),
        ("places_F", batch.tokens_T[:0] if batch.places_F is None else batch.places_F, tokens),
    ):
        if numbers.dim() != 1 or numbers.dtype != torch.int64:
            raise ValueError(
                f"`{name}` is {numbers.dtype} of shape {tuple(numbers.shape)}, not int64 in one dimension"
            )
        if numbers.numel():
            low, high = bounds(numbers)
            if low < 0 or high >= below:
                raise ValueError(f"`{name}` has {low if low < 0 else high}, which is not from 0 to {below - 1}")
    if batch.places_F is not None:
        _check_features(model, batch, pages.latent.dtype)
    ends = list(map(int.__add__, starts, counts))
    needed = [-(-end // pages.page_size) for end in ends]
    tables = batch.tables_BP
    if tables.dim() != 2 or tables.shape[1] < max(needed):
        raise ValueError(
            f"`tables_BP` is of shape {tuple(tables.shape)}, {max(ends)} tokens need {max(needed)} pages of "
            f"{pages.page_size}"
        )
    if tables.is_floating_point():
        raise ValueError(f"`tables_BP` is {tables.dtype}, not of whole numbers")
    used_BP = tables[:, : max(needed)]
    if min(needed) < max(needed):
        used_BP = used_BP[torch.arange(max(needed)) < torch.tensor(needed)[:, None]]
    low, high = bounds(used_BP)
    if low < 0 or high >= pages.pages:
        raise ValueError(f"`tables_BP` has page {low if low < 0 else high} of a pool of {pages.pages}")
    return _PagedStep(pages, batch, tables.to(device, torch.int32).contiguous())


def _check_features(model: Any, batch: RaggedBatch, dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: naming the field.
    """
    shape, features = (len(batch.places_F), model.config.hidden_size), batch.features_FD  # type: ignore[arg-type]
    if features is None or features.shape != shape or features.dtype is not dtype:
        found = "None" if features is None else f"{features.dtype} of shape {tuple(features.shape)}"
        raise ValueError(f"`features_FD` is {found}, not {dtype} of shape {shape}")
