"""Multi-head latent attention (MLA), DeepSeek-V2 (arXiv 2405.04434), section 2.1, unchanged in DeepSeek-V3.

One set of weights, two ways to compute the same function:

- expanded: keys and values of every head are made from the latents, then any attention of Transformers runs on them.
  Cheapest where many queries share the expansion: prefill and training.
- absorbed: the key half of `kv_b_proj` is folded into the query and its value half into the output, so attention runs
  on the cached latents themselves. Cheapest for few queries on a long context: decoding.

Shape suffixes: B batch, Q queries, S cached and new positions, H heads, N no-position dims of a head, P rotary dims of
a head, V value dims of a head, R rank of the latent (`kv_lora_rank`), D hidden size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native
from transformers.utils import logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...kernels import selection
from ...kernels.backends import ABSORBED, EXPANDED, LATENT_ROWS, PROJECTIONS, ROTATION
from ...kernels.dispatch import serve
from ...kernels.selection import bypass_refusal, call_refusal, switched_off
from .cache_dsv3 import extend, filled_positions, next_place
from .configuration_dsv3 import DeepseekV3Config
from .linear_dsv3 import linear
from .norm_dsv3 import DeepseekV3RMSNorm


logger = logging.get_logger(__name__)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864, section 3.4) of the last dimension.

    Args:
        x: `(B, H, S, P)`.
        cos, sin: `(B or 1, S, P)`, the angles' values stated twice as Transformers' rotary embeddings give them.
        interleave: whether pairs are neighbours (2i, 2i+1), as DeepSeek stores them, or halves (i, i + P/2).

    Returns:
        `(B, H, S, P)` with pairs as halves in both cases: queries and keys are permuted alike, so their products, the
        only use made of them, are unchanged.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax_scale(config: DeepseekV3Config) -> float:
    """1/√(key dim), times the square of YaRN's attention factor (arXiv 2309.00071, section 3.4) where YaRN is used."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim", 0) and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scale


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by plain matrix products, with the signature of Transformers' attention functions.

    Args:
        query, key: `(B, H, Q, N + P)` and `(B, H, S, N + P)`. value: `(B, H, S, V)`.
        attention_mask: additive, broadcastable to `(B, H, Q, S)`, or None for no mask at all.

    Returns:
        The output `(B, Q, H, V)` and the attention weights `(B, H, Q, S)`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def absorbed_attention(
    q_nope_BHQN: torch.Tensor,
    q_rope_BHQP: torch.Tensor,
    latent_BSR: torch.Tensor,
    k_rope_BSP: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over cached latents, without keys or values of single heads.

    With W_UK and W_UV the halves of `kv_b_proj`, qᵀ(W_UK c) = (W_UKᵀ q)ᵀ c and Σ p (W_UV c) = W_UV (Σ p c), so both
    projections move to the side of the queries (arXiv 2405.04434, section 2.1.2).

    Args:
        latent_BSR: normalised latents; k_rope_BSP: rotated keys shared by all heads.
        kv_b_weight: `(H * (N + V), R)`.
        attention_mask: boolean (True: may attend) or additive, broadcastable to `(B, 1, Q, S)`; None allows all.

    Returns:
        The output `(B, Q, H, V)` and the attention weights `(B, H, Q, S)`.
    """
    B, H, Q, N = q_nope_BHQN.shape
    R = latent_BSR.shape[-1]
    w_uk_HNR, w_uv_HVR = kv_b_weight.view(H, -1, R).split([N, kv_b_weight.shape[0] // H - N], dim=1)

    q_latent_BHQR = torch.matmul(q_nope_BHQN, w_uk_HNR)
    # Heads become rows of one product with the latents, so that these are read once for all heads. Sum and scale are
    # part of the product: in bf16, scores are rounded once instead of three times.
    scores_BHQS = torch.baddbmm(
        torch.bmm(q_rope_BHQP.reshape(B, H * Q, -1), k_rope_BSP.transpose(1, 2)),
        q_latent_BHQR.reshape(B, H * Q, R),
        latent_BSR.transpose(1, 2),
        beta=scaling,
        alpha=scaling,
    ).view(B, H, Q, -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            # The lowest finite value, as Transformers masks: a row that may attend nothing (padding) gets no NaN
            scores_BHQS = scores_BHQS.masked_fill(~attention_mask, torch.finfo(scores_BHQS.dtype).min)
        else:
            scores_BHQS = scores_BHQS + attention_mask
    weights_BHQS = F.softmax(scores_BHQS, dim=-1, dtype=torch.float32).to(latent_BSR.dtype)
    out_BHQR = torch.matmul(weights_BHQS.view(B, H * Q, -1), latent_BSR).view(B, H, Q, R)
    out_BHQV = torch.matmul(out_BHQR, w_uv_HVR.transpose(1, 2))
    return out_BHQV.transpose(1, 2), weights_BHQS


# What computes softmax attention as the model's own paths do. Whatever else is registered under a name, be it one of
# these functions', has to be called.
_KNOWN_ATTENTION = (eager_attention, sdpa_attention_forward, flash_attention_forward, flex_attention_forward)


def is_known_attention(name: str) -> bool:
    """Whether the attention function of a name is one that the paths beside it compute the same as."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    return getattr(function, "func", function) in _KNOWN_ATTENTION  # kernels of the Hub come as partial functions


def dense_mask(
    attention_mask: Any,
    q_len: int,
    kv_len: int,
    device: torch.device,
    first_query: int = 0,
    is_causal: bool = True,
) -> torch.Tensor | None:
    """Brings the mask of any attention implementation to the form that `absorbed_attention` takes.

    Args:
        attention_mask: None (causal), `(B, S)` with 0 for padding (causal too, flash attention), `(B, 1, Q, S)`
            boolean or additive (sdpa, eager), or flex attention's block mask.
        first_query: position of the first query, for the causal ones. Transformers leaves sdpa's mask out where
            queries start at 0, also with room behind them in a static cache; flash attention's queries are the last.
        is_causal: False where queries attend what comes behind them too, unless the mask says otherwise.

    Returns:
        None where every query may attend everything, else a tensor broadcastable to `(B, 1, Q, S)`.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        return attention_mask[..., :kv_len]
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(attention_mask.mask_mod, attention_mask.shape[0], 1, q_len, kv_len, device=str(device))
    mask = None
    if q_len > 1 and is_causal:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(first_query)[None, None]
    if attention_mask is not None:
        padding = attention_mask[:, None, None, :kv_len].bool()
        mask = padding if mask is None else mask & padding
    return mask


NATIVE_FORWARD, LINEAR_FORWARD = native.DeepseekV3Attention.forward, nn.Linear.forward
# Keyword arguments that change nothing of attention here, as in Transformers' functions for it. Others are for those
# functions to look at: biases of positions, caps, outputs
HARMLESS = frozenset(
    ("position_ids", "use_cache", "is_causal", "cache_position", "output_hidden_states", "output_router_logits")
    + ("return_dict", "num_items_in_batch", "labels", "shift_labels", "ignore_index", "seq_idx")
    + ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
)


def changes_attention(implementation: str, kwargs: dict[str, Any]) -> bool:
    """Whether keyword arguments ask Transformers' attention function for something that the paths beside it lack."""
    given = {name for name in kwargs.keys() - HARMLESS if kwargs[name] is not None and kwargs[name] is not False}
    return bool(given - {"output_attentions"} if implementation == "eager" else given)


class AttendingCache:
    """What is given to attention in the place of a cache, and attends what it holds itself."""

    def attend(
        self,
        attention: "DeepseekV3Attention",
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            attention: the module, whose layer these are of.
            q_nope, q_rope: `(B, H, Q, N)` and `(B, H, Q, P)`, rotated.
            latent, k_rope: new ones to be held, `(B, 1, Q, R)` and `(B, 1, Q, P)`.

        Returns:
            `(B, Q, H, V)`.
        """
        raise NotImplementedError

    def update(self, *arguments: object) -> None:
        raise RuntimeError(f"{type(self).__name__} is attended by the plugin's own attention alone")


class DeepseekV3Attention(native.DeepseekV3Attention):
    """Multi-head latent attention over a cache of latents.

    The cache holds, for each layer and token, the normalised latent as its "key" `(B, 1, S, R)` and the rotated shared
    key as its "value" `(B, 1, S, P)`, so every cache class of Transformers stores, crops, reorders and moves them.

    Args:
        layer_idx: position in the cache.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int):
        nn.Module.__init__(self)  # not the parent's, which makes native's modules
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # read by Transformers' attention functions: each head has its own key
        self.is_causal = True
        self.q_lora_rank = config.q_lora_rank
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.rope_interleave = config.rope_interleave
        self.scaling = softmax_scale(config)

        hidden_size, bias = config.hidden_size, config.attention_bias
        # Those of the two ways to make queries that are not taken are None, as in native's
        self.q_proj: Any = None
        self.q_a_proj: Any = None
        self.q_a_layernorm: Any = None
        self.q_b_proj: Any = None
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, self.num_heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, self.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekV3RMSNorm(self.q_lora_rank)
            self.q_b_proj = nn.Linear(self.q_lora_rank, self.num_heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekV3RMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, hidden_size, bias=bias)

    @property
    def is_head_parallel(self) -> bool:
        """Whether Transformers' tensor parallelism gave this process some of the heads (`base_model_tp_plan`).

        Not so for weights that FSDP shards: those are whole while a layer runs, unless they are units of their own.
        """
        kv_b_proj: Any = self.kv_b_proj
        if not kv_b_proj.__dict__.get("_is_hooked", False):
            return False
        placements: Any = getattr(getattr(kv_b_proj, "weight", None), "placements", ())
        return len(placements) == 1 and placements[0].is_shard(0)

    def absorbed_refusal(self, past_key_values: Cache | None = None) -> str | None:
        """The reason why the absorbed path cannot serve this module and cache, or None where it can."""
        kv_b_proj = self.kv_b_proj
        if type(kv_b_proj) is not nn.Linear:
            kv_b_proj = switched_off(kv_b_proj)
        if (kind := type(kv_b_proj)) is not nn.Linear:
            return f"kv_b_proj is a {kind.__module__}.{kind.__name__}, whose weight cannot be folded"
        if kv_b_proj.bias is not None:
            return "kv_b_proj has a bias, which cannot be folded"
        if F.linear is not selection.LINEAR or F.scaled_dot_product_attention is not selection.ATTENTION:
            return "functions of PyTorch were replaced, which only calls of the layers run"
        if nn.Linear.forward is not LINEAR_FORWARD or nn.Module.__call__ is not selection.CALL:
            return "what calls a layer was replaced"
        weight = kv_b_proj.weight
        if (
            "_is_hooked" not in kv_b_proj.__dict__ or not self.is_head_parallel
        ):  # whose hooks move what is sharded otherwise
            if type(weight) not in (nn.Parameter, torch.Tensor, FakeTensor):
                return f"kv_b_proj's weight is a {type(weight).__name__}, not a plain tensor"
            if (reason := bypass_refusal("kv_b_proj", kv_b_proj)) is not None:
                return reason
        if weight.is_meta:
            return "kv_b_proj is offloaded, its weight is not in memory outside its own call"
        if self.training and self.attention_dropout > 0:
            return "attention dropout is on"
        implementation = self.config._attn_implementation or "eager"
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        if function not in _KNOWN_ATTENTION and not is_known_attention(implementation):
            return f"{implementation!r} is an attention function that computes something of its own"
        if "paged" in implementation:
            return f"the cache of {implementation!r} is not addressed by position"
        if "flash" in implementation and past_key_values is not None and past_key_values.is_compileable:
            return f"the mask of {implementation!r} does not tell which positions of a static cache are filled"
        return None

    def is_absorbed_cheaper(self, q_len: int, kv_len: int) -> bool:
        """Compares the multiplications a head does: expansion pays once a position, absorption for every query."""
        N, P, V, R = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank
        expanded = kv_len * R * (N + V) + q_len * kv_len * (N + P + V)
        absorbed = q_len * R * (N + V) + q_len * kv_len * (2 * R + P)
        return absorbed < expanded

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rotated = serve(ROTATION, self, x, cos, sin, self.config.rope_interleave)
        return rotate(x, cos, sin, self.config.rope_interleave) if rotated is None else rotated

    def _is_plain_sdpa(self) -> bool:
        """Whether softmax attention is asked for by `"sdpa"`: others may compute it from the parts of keys."""
        return (
            self.config._attn_implementation == "sdpa"
            and self.is_causal
            and is_known_attention("sdpa")
            and not (self.training and self.attention_dropout > 0)
        )

    def _expand(self, kv: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, S, H, N + V)`, shared keys `(B, 1, S, P)` to keys `(B, H, S, N + P)`, values `(B, H, S, V)`."""
        k_nope, value = kv.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1), value

    def _expanded_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention by the implementation of Transformers that was chosen: `(B, Q, H, V)`, and weights or None."""
        # PyTorch's fused CPU attention takes equal widths only; without it a prefill of 2,048 tokens takes three
        # times as long. FlashAttention 2 refuses unequal widths altogether.
        implementation = self.config._attn_implementation or "eager"
        pad = self.qk_head_dim - self.v_head_dim
        is_slow = implementation == "sdpa" and value.device.type == "cpu"
        # A counter of operations knows native's, not the fused ones
        padded = pad > 0 and is_known_attention(implementation)
        padded = padded and ("flash" in implementation or (is_slow and call_refusal() is None))
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            F.pad(value, [0, pad]) if padded else value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.v_head_dim] if padded else output, weights

    def attend_causally(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor
    ) -> torch.Tensor:
        """Attention of a sequence's last tokens to those before and to themselves, by the cheaper of the two ways.

        Args:
            q_nope, q_rope: `(1, H, Q, N)` and `(1, H, Q, P)`, rotated.
            latent, k_rope: of all its tokens, `(1, S, R)` and `(1, S, P)`.

        Returns:
            `(1, Q, H, V)`.
        """
        q_len, kv_len = q_nope.shape[2], latent.shape[1]
        mask = None
        if q_len > 1:
            mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=latent.device).tril(kv_len - q_len)[None, None]
        if self.is_absorbed_cheaper(q_len, kv_len) and self.absorbed_refusal() is None:
            arguments = (q_nope, q_rope, latent, k_rope, self.kv_b_proj.weight, mask, self.scaling)
            output = serve(ABSORBED, self, *arguments, None)
            return absorbed_attention(*arguments)[0] if output is None else output
        kv = linear(self.kv_b_proj, latent).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        output = serve(EXPANDED, self, q_nope, q_rope, kv, k_rope, mask, self.scaling)
        if output is None:
            key, value = self._expand(kv, k_rope.unsqueeze(1))
            query = torch.cat([q_nope, q_rope], dim=-1)
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
            output = output.transpose(1, 2)
        return output

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | AttendingCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `(B, Q, D)`.
            position_embeddings: cos and sin, `(B or 1, Q, P)` each.
            attention_mask: as Transformers' mask functions make it for `config._attn_implementation`. Not for an
                `AttendingCache`, which knows what each query may attend.
            past_key_values: the cache, extended in place by the new latents.

        Returns:
            The output `(B, Q, D)`, and the attention weights `(B, H, Q, S)` where the implementation gives them. Under
            tensor parallelism each process computes and returns those of its own heads only.
        """
        if native.DeepseekV3Attention.forward is not NATIVE_FORWARD:  # what somebody has put there
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        batch_size, q_len = hidden_states.shape[:2]
        cos, sin = position_embeddings
        dims = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        written = None
        projected = serve(PROJECTIONS, self, hidden_states, self, cos, sin, self.config.rope_interleave)
        if projected is not None:
            query, latent, k_rope = projected
            q_nope, q_rope = query.split(dims, dim=-1)
        else:
            if self.q_lora_rank is None:
                query = linear(self.q_proj, hidden_states)
            else:
                query = linear(self.q_b_proj, self.q_a_layernorm(linear(self.q_a_proj, hidden_states)))
            q_nope, q_rope = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2).split(dims, dim=-1)
            kv_a = linear(self.kv_a_proj_with_mqa, hidden_states)
            if past_key_values is not None and not isinstance(past_key_values, AttendingCache):
                place = partial(next_place, past_key_values, kv_a, self.layer_idx)
                rows = (kv_a, self.kv_a_layernorm, q_rope, cos, sin, self.config.rope_interleave, place)
                written = serve(LATENT_ROWS, self, *rows)
            if written is None:
                latent, k_rope = kv_a.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
                latent = self.kv_a_layernorm(latent).unsqueeze(1)
                q_rope = self._rotate(q_rope, cos, sin)
                k_rope = self._rotate(k_rope.unsqueeze(1), cos, sin)

        if isinstance(past_key_values, AttendingCache):
            output = past_key_values.attend(self, q_nope, q_rope, latent, k_rope)
            return linear(self.o_proj, output.reshape(batch_size, q_len, -1)), None
        if written is not None:
            q_rope, latent, k_rope = written
        elif past_key_values is not None:
            latent, k_rope = extend(past_key_values, latent, k_rope, self.layer_idx)

        kv_len = latent.shape[2]
        implementation = self.config._attn_implementation or "eager"
        is_plain_call = kwargs.keys() <= HARMLESS or not changes_attention(implementation, kwargs)
        absorb = past_key_values is not None and is_plain_call and self.is_absorbed_cheaper(q_len, kv_len)
        is_head_parallel = absorb and "_is_hooked" in self.kv_b_proj.__dict__ and self.is_head_parallel
        if is_head_parallel and torch.is_grad_enabled():
            absorb = False  # only kv_b_proj's own call sums the latents' gradients over the processes
        if absorb and (reason := self.absorbed_refusal(past_key_values)) is not None:
            absorb = False
            if not is_torchdynamo_compiling():
                logger.warning_once(f"Every step expands the whole context, slow where it is long: {reason}.")
        weights = None
        if absorb:
            first_query = kv_len - q_len if "flash" in implementation else 0
            latent, k_rope, kv_b_weight = latent.squeeze(1), k_rope.squeeze(1), self.kv_b_proj.weight
            if is_head_parallel:
                kv_b_weight = kv_b_weight.to_local()
            is_causal = kwargs.get("is_causal")
            is_causal = self.is_causal if is_causal is None else is_causal
            mask = None
            if attention_mask is not None or q_len > 1:
                mask = dense_mask(attention_mask, q_len, kv_len, hidden_states.device, first_query, is_causal)
                if implementation == "eager" and mask is not None and isinstance(attention_mask, torch.Tensor):
                    mask = mask.to(q_nope.dtype) if mask.dtype == torch.bool else mask  # `eager` adds what it is given
            arguments = (q_nope, q_rope, latent, k_rope, kv_b_weight, mask, self.scaling)
            output = None
            if implementation != "eager":
                filled = None
                if type(past_key_values) is not DynamicCache:
                    filled = filled_positions(past_key_values, self.layer_idx)
                output = serve(ABSORBED, self, *arguments, filled)
            if output is None:
                output, weights = absorbed_attention(*arguments)
                weights = weights if implementation == "eager" else None
        else:
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
                attention_mask = attention_mask[..., :kv_len]  # of a mask that reaches past the keys
            kv = linear(self.kv_b_proj, latent.squeeze(1)).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
            output = None
            if "is_causal" not in kwargs and is_plain_call and self._is_plain_sdpa():
                output = serve(EXPANDED, self, q_nope, q_rope, kv, k_rope.squeeze(1), attention_mask, self.scaling)
            if output is None:
                output, weights = self._expanded_attention(
                    torch.cat([q_nope, q_rope], dim=-1), *self._expand(kv, k_rope), attention_mask, **kwargs
                )
        return linear(self.o_proj, output.reshape(batch_size, q_len, -1)), weights


Dsv3Attention = DeepseekV3Attention  # its name before
