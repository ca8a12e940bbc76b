"""A step of decoding by the compiled CPU backend: all layers of a model in one call, on threads that stay awake.

A `Program` is the flat description of a model that the compiled code walks through (`csrc/step.c`): addresses, shapes
and settings. It owns nothing: whoever keeps one makes sure that what it was made from is still there, unchanged.
"""

import copy
import ctypes
import threading
from typing import Any

import torch
from torch import nn

from . import library
from .cached import Batch, Cache, NewTokens
from .operators import TYPES, out_of_memory, require_storage


_pointer, _integer, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("scale", _pointer), ("bias", _pointer), ("type", _integer)]


_MATRICES = ("q_a", "q_b", "kv_a", "o", "gate_up", "down", "shared_gate", "shared_up", "shared_down")
_ADDRESSES = ("input_norm", "q_norm", "kv_norm", "post_norm", "kv_b", "router", "router_bias")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in _MATRICES),
        *((name, _pointer) for name in _ADDRESSES),
        *((name, _integer) for name in ("L", "E", "I", "S", "K", "groups", "top_groups", "normalize")),
        *((name, _real) for name in ("input_eps", "q_eps", "kv_eps", "post_eps", "softmax_scale", "router_factor")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("embedding", "head", "pair")),
        *((name, _pointer) for name in ("layer", "embedding_norm", "hidden_norm", "norm", "cos", "sin")),
        *((name, _integer) for name in ("layers", "type", "D", "H", "N", "P", "R", "V", "words", "interleave")),
        *((name, _integer) for name in ("activations", "head_activations")),
        *((name, _real) for name in ("embedding_eps", "hidden_eps", "eps")),
    ]


# As `csrc/dsv3.h` declares them, which a test compares
STRUCTURES = {
    "dsv3_matrix": _Matrix,
    "dsv3_layer": _Layer,
    "dsv3_model": _Model,
    "dsv3_cache": Cache,
    "dsv3_batch": Batch,
}


def _matrix(layer: Any, name: str = "weight") -> _Matrix:
    """The weight of a linear layer, or of the routed experts by its name, with its scale and bias."""
    weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale", None)
    bias = getattr(layer, "bias", None) if name == "weight" else None
    addresses = (None if each is None else each.data_ptr() for each in (weight, scale, bias))
    return _Matrix(*addresses, TYPES[weight.dtype])


def _describe(layer: Any) -> _Layer:
    require_storage(**dict(layer.named_parameters()), **dict(layer.named_buffers()))
    attention, network = layer.self_attn, layer.mlp
    described = _Layer(
        input_norm=layer.input_layernorm.weight.data_ptr(),
        input_eps=layer.input_layernorm.variance_epsilon,
        post_norm=layer.post_attention_layernorm.weight.data_ptr(),
        post_eps=layer.post_attention_layernorm.variance_epsilon,
        kv_a=_matrix(attention.kv_a_proj_with_mqa),
        kv_norm=attention.kv_a_layernorm.weight.data_ptr(),
        kv_eps=attention.kv_a_layernorm.variance_epsilon,
        kv_b=attention.kv_b_proj.weight.data_ptr(),
        o=_matrix(attention.o_proj),
        softmax_scale=attention.scaling,
    )
    if attention.q_lora_rank is None:
        described.q_b = _matrix(attention.q_proj)
    else:
        described.L = attention.q_lora_rank
        described.q_a, described.q_b = _matrix(attention.q_a_proj), _matrix(attention.q_b_proj)
        described.q_norm = attention.q_a_layernorm.weight.data_ptr()
        described.q_eps = attention.q_a_layernorm.variance_epsilon
    dense = network
    if hasattr(network, "experts"):
        router, experts, dense = network.gate, network.experts, network.shared_experts
        described.gate_up, described.down = _matrix(experts, "gate_up_proj"), _matrix(experts, "down_proj")
        described.router = router.weight.data_ptr()
        described.router_bias = router.e_score_correction_bias.data_ptr()
        described.E, described.I = experts.num_experts, experts.gate_up_proj.shape[1] // 2
        described.K, described.groups, described.top_groups = router.top_k, router.num_group, router.topk_group
        described.normalize, described.router_factor = router.norm_topk_prob, router.routed_scaling_factor
    described.S = dense.gate_proj.weight.shape[0]
    described.shared_gate, described.shared_up, described.shared_down = (
        _matrix(part) for part in (dense.gate_proj, dense.up_proj, dense.down_proj)
    )
    return described


class Program:
    """A model's layers as the compiled code takes them.

    Args:
        layers: decoder layers, of plain modules with contiguous weights.
        norm: the last one.
        dtype: of the activations, bf16 or fp32.
        interleave: whether rotary pairs are neighbours.

    Attributes:
        layers: how many. positions: how many there are angles of. dtype: as given.
        dense_weights, weights_dtype: of the last layer, those that every token meets.

    Raises:
        ValueError: a weight whose storage was freed.
    """

    def __init__(self, layers: list[nn.Module], norm: nn.Module, dtype: torch.dtype, interleave: bool):
        require_storage(**{f"the last norm's {name}": weight for name, weight in norm.named_parameters()})
        attention: Any = layers[0].self_attn
        self._layers = (_Layer * len(layers))(*(_describe(layer) for layer in layers))
        self._model = _Model(
            layer=ctypes.addressof(self._layers),
            layers=len(layers),
            norm=norm.weight.data_ptr(),
            eps=norm.variance_epsilon,
            type=TYPES[dtype],
            D=attention.hidden_size,
            H=attention.num_heads,
            N=attention.qk_nope_head_dim,
            P=attention.qk_rope_head_dim,
            R=attention.kv_lora_rank,
            V=attention.v_head_dim,
            interleave=interleave,
            activations=any(
                dtype in getattr(part, "rounded_dtypes", ()) for layer in layers for part in layer.modules()
            ),
        )
        self._model_address = ctypes.addressof(self._model)
        self.layers, self.positions, self.dtype = len(layers), 0, dtype
        matrices = [module.weight for module in layers[-1].modules() if isinstance(module, nn.Linear)]
        self.weights_dtype: torch.dtype = matrices[-1].dtype if matrices else dtype
        self.dense_weights = max(1, sum(matrix.numel() for matrix in matrices))
        self._angles: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lock = threading.Lock()

    @classmethod
    def of_mtp_layer(cls, layer: Any, dtype: torch.dtype, interleave: bool) -> "Program":
        """An MTP layer, which a call gives embeddings, or ids, and hidden states beside them."""
        program = cls([layer], layer.shared_head.norm, dtype, interleave)
        model, embedding_norm, hidden_norm = program._model, layer.embed_layernorm, layer.hidden_layernorm
        model.pair = _matrix(layer.eh_proj)
        model.embedding_norm, model.embedding_eps = embedding_norm.weight.data_ptr(), embedding_norm.variance_epsilon
        model.hidden_norm, model.hidden_eps = hidden_norm.weight.data_ptr(), hidden_norm.variance_epsilon
        return program

    def with_ends(self, embedding: Any, head: Any) -> "Program":
        """The same layers with what is before and behind them.

        Args:
            embedding: the module, with a contiguous weight `(words, D)`; None where embeddings are always given.
            head: the linear layer, with a contiguous weight, that gives logits; None where none are asked for.

        Raises:
            ValueError: a weight whose storage was freed.
        """
        program = copy.copy(self)
        program._model, program._lock = _Model.from_buffer_copy(self._model), threading.Lock()
        program._model_address, program._angles = ctypes.addressof(program._model), list(self._angles)
        if embedding is not None:
            require_storage(embedding=embedding.weight, scale=getattr(embedding, "weight_scale", None))
            program._model.embedding = _matrix(embedding)
        if head is not None:
            require_storage(**{f"the head's {name}": weight for name, weight in head.named_parameters()})
            program._model.head, program._model.words = _matrix(head), head.weight.shape[0]
            program._model.head_activations = self.dtype in getattr(head, "rounded_dtypes", ())
        return program

    def set_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Takes the rotary angles of all positions from now on, `(positions, P)` each, contiguous; never fewer."""
        with self._lock:
            if len(cos) <= self.positions:
                return  # another thread has brought more, and may be reading the last of them
            self._angles.append((cos, sin))  # which other threads may be reading goes on to be there
            self._model.cos, self._model.sin = cos.data_ptr(), sin.data_ptr()
            self.positions = len(cos)

    def run(
        self,
        x: torch.Tensor | None,
        batch: NewTokens,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        with_logits: bool = False,
        previous: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step.

        Args:
            x: embeddings `(..., D)` of the batch's tokens, contiguous; None for those of its ids, which are in range.
            batch: positions within the angles.
            latent: `(layers, pages or rows, ..., page size or room, R)`, k_rope: likewise, with P.
            with_logits: whether the head runs too.
            previous: for an MTP layer, hidden states `(T, D)` of the layer before, contiguous.

        Returns:
            `(..., D)` or `(T, D)`, after the last norm, and logits `(W, words)` or None, in the activations' dtype.

        Raises:
            ValueError: a cache whose storage was freed.
        """
        hidden = latent.new_empty(batch.count, self._model.D) if x is None else torch.empty_like(x)
        logits = hidden.new_empty(batch.wanted_count, self._model.words) if with_logits else None
        cache = Cache.of(latent, k_rope)
        if library.loaded.dsv3_step(
            self._model_address,
            ctypes.addressof(cache),
            ctypes.addressof(batch.structure),
            None if x is None else x.data_ptr(),
            None if previous is None else previous.data_ptr(),
            hidden.data_ptr(),
            None if logits is None else logits.data_ptr(),
            torch.get_num_threads(),
        ):
            out_of_memory()
        return hidden, logits
