"""A step of decoding as one program: when there is one, what it rests on, and when it runs.

The program (`kernels/cpu/step.py`) is made from the modules when decoding starts. It holds addresses, so before every
step all that it was made from is compared with what it was: modules and their classes, hooks, settings, weights and
where they lie. When anything has changed, it is made anew, or, where a module asks for its own call (adapters, hooks,
other dtypes), the layers run one by one.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ...kernels import selection
from ...kernels.backends import ABSORBED, MIXTURE, MLP, NORM, PROJECTIONS, ROUTER, STEP
from ...kernels.cpu.cached import NewTokens, pool_refusal
from ...kernels.cpu.linear import MOST_ROWS
from ...kernels.cpu.step import Program
from ...kernels.dispatch import Operation, launch, refusal_of_call, standing_refusal
from ...kernels.experts_auto import GROUPED_MM
from ...kernels.selection import cpu_refusal, is_undisturbed, plain_refusal
from .attention_dsv3 import DeepseekV3Attention, is_known_attention
from .cache_dsv3 import shared_room
from .decoder_dsv3 import DeepseekV3DecoderLayer
from .inputs_dsv3 import bounds, check_inputs
from .moe_dsv3 import DeepseekV3MoE, DeepseekV3TopkRouter
from .mtp_dsv3 import Dsv3MtpHead, Dsv3MtpLayer


# More tokens at once are better served layer by layer
MOST_QUERIES, MOST_TOKENS = 8, 64
# Over pages: in fp32 all of them, so that what a token gives does not depend on how many come with it
MOST_PAGED_TOKENS = {torch.float32: 2**31, torch.bfloat16: 256}
# Where matrix units multiply a dtype faster (`MOST_ROWS`), products of tokens and dense weights of a layer that pay
MOST_PRODUCTS = 4 * 10**8
# Angles are kept for at least so many positions
FEWEST_ANGLES = 512

# The classes whose modules a program stands for, with the `forward` that they and native's have
_FORWARDS = tuple(
    (kind, kind.forward)
    for ours in (DeepseekV3DecoderLayer, DeepseekV3Attention, DeepseekV3MoE, DeepseekV3TopkRouter)
    for kind in (ours, ours.__base__)
) + tuple((kind, kind.forward) for kind in (native.DeepseekV3RotaryEmbedding, Dsv3MtpLayer))
# Modules without settings of their own. What another library has put around a layer has some, such as whether PEFT's
# adapters are switched off
_WITHOUT_SETTINGS = frozenset(
    (nn.Linear, nn.ModuleList, nn.SiLU, SiLUActivation, DeepseekV3DecoderLayer, DeepseekV3MoE)
)
# Those that run where there are no gradients
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Angles of these follow the longest position of a call
ROPE_BY_LENGTH = ("dynamic", "longrope")


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that tells when a list in it has changed."""
    return {name: list(value) if type(value) is list else value for name, value in state.items()}


class _Grounds:
    """What a program rests on, to be compared with what is there at the next step.

    Most of it is compared in C: lists of dictionaries with copies of them, where the very same object is equal.

    Args:
        roots: the modules that it was made from, and those in them; None for one that is not there.
        config: what they were made by. changed: tensors whose values it depends on, beside where they lie.
    """

    def __init__(self, roots: tuple[Any, ...], config: Any, changed: tuple[torch.Tensor, ...] = ()):
        self.roots, self.changed = roots, changed
        modules = [module for root in roots if root is not None for module in root.modules()]
        states = [module.__dict__ for module in modules]
        self.epoch = selection.epoch
        plain = (selection.PLAIN_CLASSES.get(kind, ("", ()))[1] for kind in set(map(type, modules)))
        forwards = [*_FORWARDS, *(pair for pairs in plain for pair in pairs)]
        self.classes, self.forwards = map(list, zip(*forwards))
        self.modules, self.states = modules, states
        self.hooks = [state[name] for state in states for name in _HOOKS]
        # Nothing that is put into the empty ones of a plain layer is called or read
        held = (state[name] for state in states for name in ("_modules", "_parameters", "_buffers"))
        self.held = [each for each in held if each]
        self.settings = [state for module, state in zip(modules, states) if type(module) not in _WITHOUT_SETTINGS]
        self.settings.append(config.__dict__)
        places = [state[name] for state in states for name in ("_parameters", "_buffers")]
        self.tensors = [tensor for place in places for tensor in place.values() if tensor is not None]
        self.were: tuple = (list(map(dict, self.held)), list(map(_copied, self.settings)), *self._rest())

    def _rest(self) -> tuple:
        tensors = self.tensors
        return (
            list(map(type, self.modules)),
            list(map(len, self.states)),  # which grow where a `forward` is put into a module
            list(map(torch.Tensor.data_ptr, tensors)),
            list(map(torch.Tensor.numel, tensors)),
            list(map(torch.Tensor.is_contiguous, tensors)),
            [tensor.dtype for tensor in tensors],
            [tensor._version for tensor in self.changed],
        )

    def hold(self, roots: tuple[Any, ...]) -> bool:
        """Whether all of it is as it was, where these are the modules now."""
        if roots != self.roots or self.epoch != selection.epoch:
            return False
        if any(self.hooks) or [kind.forward for kind in self.classes] != self.forwards:
            return False
        try:
            return (self.held, self.settings, *self._rest()) == self.were
        except RuntimeError:
            return False  # another tensor is somewhere: whether tensors are equal has no one answer


def _layer_refusal(layer: Any, x: torch.Tensor, cos: torch.Tensor, kind: Any = DeepseekV3DecoderLayer) -> str | None:
    """Why a decoder layer, or some part of it, has to be called, or None where a program may stand for it."""
    if type(layer) is not kind:
        return f"is a {type(layer).__name__}"
    attention, network = layer.self_attn, layer.mlp
    if type(attention) is not DeepseekV3Attention:
        return f"has a {type(attention).__name__}"
    for name, module in layer.named_modules():
        if (reason := selection.bypass_refusal(name or "layer", module)) is not None:
            return reason
    if (reason := attention.absorbed_refusal() or plain_refusal("o_proj", attention.o_proj, "linear")) is not None:
        return reason
    if attention.is_head_parallel or not attention.o_proj.weight.is_contiguous():
        return "takes whole and contiguous weights, o_proj's is not"
    query = x.new_empty(1, attention.num_heads, 1, attention.qk_nope_head_dim)
    latent, k_rope = x.new_empty(1, 1, attention.kv_lora_rank), x.new_empty(1, 1, attention.qk_rope_head_dim)
    rope = query.new_empty(*query.shape[:3], attention.qk_rope_head_dim)
    absorbed = (rope, latent, k_rope, attention.kv_b_proj.weight, None, attention.scaling)
    asked: list[tuple] = [
        (PROJECTIONS, attention, x, attention, cos, cos, attention.config.rope_interleave),
        (ABSORBED, attention, query, *absorbed),
    ]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if (reason := plain_refusal("a norm", norm, "norm")) is not None:
            return reason
        asked.append((NORM, norm, x, norm.weight, norm.variance_epsilon))
    flat = x[0]
    if type(network) is DeepseekV3MoE:
        router, experts = network.gate, network.experts
        if type(router) is not DeepseekV3TopkRouter or type(experts) not in selection.PLAIN_CLASSES:
            return f"has a {type(router).__name__} or {type(experts).__name__}"
        if experts.config._experts_implementation not in ("auto", "cpu"):
            return f"experts are served by {experts.config._experts_implementation!r}, as chosen"
        if not getattr(network.shared_experts, "intermediate_size", 1):
            return "takes mixtures with shared experts"
        index = torch.zeros(1, router.top_k, dtype=torch.int64, device="cpu")
        asked.append((MIXTURE, network, flat, experts, index, index.float(), network.shared_experts))
        groups, factor = (router.num_group, router.topk_group, router.top_k), router.routed_scaling_factor
        settings = (*groups, router.norm_topk_prob, factor)
        asked.append((ROUTER, router, flat, router.weight, router.e_score_correction_bias, *settings))
    else:
        asked.append((MLP, network, x, network))
    return next((reason for call in asked if (reason := _refusal_of_compiled(*call)) is not None), None)


def _refusal_of_compiled(operation: Operation, module: Any, x: torch.Tensor, *arguments: Any) -> str | None:
    """Why it is not the compiled CPU backend that serves a call, or None where it is."""
    for backend in operation.backends:
        if backend.name == "cpu":
            return refusal_of_call(operation, backend, module, x, *arguments)
        if standing_refusal(operation, backend, module, x, *arguments) is None:
            return f"{operation.name} may be served by {backend.name!r}"
    return f"{operation.name} is not compiled"


def decoding_refusal(model: Any, dtype: torch.dtype | None = None) -> str | None:
    """Why steps of a `DeepseekV3Model` run layer by layer whatever their tokens, or None where a program may run them.

    Args:
        dtype: of its activations, that of its last norm unless given.
    """
    config = model.config
    implementation = config._attn_implementation
    if implementation != "sdpa" or not is_known_attention("sdpa"):
        return f"takes attention by 'sdpa', not {implementation!r}"
    if config.output_attentions or config.output_hidden_states or getattr(config, "output_router_logits", False):
        return "gives what is within no layer, which the config asks for"
    if ALL_EXPERTS_FUNCTIONS["grouped_mm"] is not GROUPED_MM:
        return "the function 'grouped_mm' for experts was replaced"
    if any(kind.forward is not forward for kind, forward in _FORWARDS):
        return "the forward of a class was replaced"
    rotary = model.rotary_emb
    if type(rotary) is not native.DeepseekV3RotaryEmbedding:
        return f"takes native's rotary embedding, not a {type(rotary).__name__}"
    if rotary.rope_type in ROPE_BY_LENGTH:
        return f"rotary embeddings of type {rotary.rope_type!r} follow the longest position of a call"
    for name, module in (("layers", model.layers), ("rotary_emb", rotary)):
        if (reason := selection.bypass_refusal(name, module)) is not None:
            return reason
    if (reason := plain_refusal("the last norm", model.norm, "norm")) is not None:
        return reason
    layers = model.layers[: config.num_hidden_layers]
    if not len(layers) or model.training:
        return "is for decoding by a model with layers, in evaluation mode"
    with torch.no_grad():
        x = torch.empty(1, 1, config.hidden_size, dtype=dtype or model.norm.weight.dtype, device="cpu")
        cos = x.new_empty(1, 1, config.qk_rope_head_dim)
        if (reason := _refusal_of_compiled(NORM, model.norm, x, model.norm.weight, 0.0)) is not None:
            return reason
        for index, layer in enumerate(layers):
            if getattr(getattr(layer, "self_attn", None), "layer_idx", None) != index:
                return f"layer {index}'s place in the cache is another"
            if reason := _layer_refusal(layer, x, cos) or cpu_refusal("linear", x, layer.self_attn.o_proj.weight):
                return f"layer {index}: {reason}"
    return None


def _mtp_refusal(model: Any, dtype: torch.dtype) -> str | None:
    """Why drafts of a `DeepseekV3Model` whose layers a program runs are left to the MTP layers, or None."""
    if (reason := selection.bypass_refusal("mtp", model.mtp)) is not None:
        return reason
    with torch.no_grad():
        x = torch.empty(1, 1, model.config.hidden_size, dtype=dtype, device="cpu")
        cos = x.new_empty(1, 1, model.config.qk_rope_head_dim)
        for depth, layer in enumerate(model.mtp):
            if type(layer) is not Dsv3MtpLayer or layer.self_attn.layer_idx != depth:
                return f"MTP layer {depth} is a {type(layer).__name__}, or its place in the cache is another"
            if type(layer.shared_head) is not Dsv3MtpHead or layer.training:
                return f"MTP layer {depth} is trained, or its head is a {type(layer.shared_head).__name__}"
            for norm in (layer.embed_layernorm, layer.hidden_layernorm, layer.shared_head.norm):
                if reason := plain_refusal("a norm", norm, "norm") or cpu_refusal("linear", x, norm.weight):
                    return f"MTP layer {depth}: {reason}"
            reason = _linear_refusal("eh_proj", layer.eh_proj, dtype) or _layer_refusal(layer, x, cos, Dsv3MtpLayer)
            if reason is not None:
                return f"MTP layer {depth}: {reason}"
    return None


def _refusal_of_weight(weight: Any, dtype: torch.dtype) -> str | None:
    """Why a plain tensor is not what the program may read, or None."""
    if weight.dtype is not dtype and weight.dtype not in selection.QUANTIZED:
        return f"takes weights of {dtype} or of few bits, not {weight.dtype}"
    if not weight.is_contiguous():
        return "takes contiguous weights"
    return cpu_refusal("linear", torch.empty(0, dtype=dtype), weight)


def _linear_refusal(name: str, layer: Any, dtype: torch.dtype) -> str | None:
    """Why a linear layer outside of the decoder layers is not part of the program, or None."""
    if (reason := plain_refusal(name, layer, "linear")) is not None:
        return reason
    bias = layer.bias
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        return f"takes a contiguous bias of {dtype}"
    return _refusal_of_weight(layer.weight, dtype)


def _embedding_refusal(embedding: Any, dtype: torch.dtype) -> str | None:
    """Why the embedding is not part of the program, or None."""
    if (reason := plain_refusal("embed_tokens", embedding, "embedding")) is not None:
        return reason
    if getattr(embedding, "max_norm", None) is not None:
        return "takes embeddings as they are stored, not of a largest norm"
    if getattr(embedding, "row_dtype", dtype) is not dtype:
        return f"takes embeddings that give {dtype}"
    return _refusal_of_weight(embedding.weight, dtype)


def most_tokens(program: Program) -> int:
    """How many tokens at once a program pays for, on this processor: its layers' products are of vectors."""
    faster = (
        program.dtype is torch.bfloat16 and program.weights_dtype in MOST_ROWS and MOST_ROWS[program.weights_dtype]
    )
    if not faster or program.weights_dtype in selection.QUANTIZED:
        return 2**31
    return max(faster.dense, MOST_PRODUCTS // program.dense_weights)


class Ends(NamedTuple):
    """A program of layers, the same with what is before and behind them, and which of that it does."""

    layers: Program
    program: Program
    grounds: _Grounds
    has_embedding: bool
    has_head: bool


class Decoding:
    """The program of one [`DeepseekV3Model`]: made when first needed, and again when what it rests on has changed."""

    def __init__(self) -> None:
        # In one, since several threads may decode with one model
        self._made: tuple[Program, _Grounds, torch.dtype] | None = None
        self._ends: Ends | None = None
        self._drafts: tuple[Ends, list[Program], _Grounds] | None = None
        self._asked: tuple[Callable, Any] = (lambda: None, None)  # the cache and more that a refusal was found for

    def __deepcopy__(self, memo: dict) -> "Decoding":
        return Decoding()  # a copy of the model has weights of its own

    def __reduce__(self) -> tuple:
        return Decoding, ()

    refusal = staticmethod(decoding_refusal)  # for `explain`, which knows models by their attributes

    def run(
        self,
        model: Any,
        input_ids: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Cache,
        inputs_embeds: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """A step by the program, or None where the layers are to run.

        Arguments are those of [`DeepseekV3Model.forward`].

        Returns:
            The last hidden states `(B, Q, D)`. The cache then holds the new tokens.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None) or tokens.dim() < 2:
            return None
        B, Q = tokens.shape[:2]
        if not tokens.is_cpu or not 0 < Q <= MOST_QUERIES or B * Q > MOST_TOKENS or type(cache) is not DynamicCache:
            return None
        if "is_causal" in kwargs or any(value is not None and value is not False for value in kwargs.values()):
            return None
        if model.training or not is_undisturbed(tokens):
            return None
        length, dtype = cache.get_seq_length(), getattr(getattr(model.norm, "weight", None), "dtype", None)
        program = self.program_for(model, dtype, cache) if length and dtype is not None else None
        if program is None or not model.layers[0].self_attn.is_absorbed_cheaper(Q, length + Q):
            return None
        if B * Q > most_tokens(program):
            return None
        mask = None
        if attention_mask is not None:
            if type(attention_mask) is not torch.Tensor or attention_mask.shape != (B, length + Q):
                return None
            mask = attention_mask.bool()
            mask = None if mask.all() else mask.contiguous()
        if position_ids is not None and (
            position_ids.dim() != 2 or position_ids.shape[1] != Q or position_ids.dtype is not torch.int64
        ):
            return None
        embedding = getattr(model, "embed_tokens", None)
        check_inputs(model.config, embedding, input_ids, inputs_embeds, attention_mask, position_ids, length)
        first, last = (length, length + Q - 1) if position_ids is None else bounds(position_ids)
        if first < 0:
            return None
        room = shared_room(cache, program.layers, torch.empty(B, Q, 0, dtype=dtype, device="cpu"))
        if room is None:
            return None
        x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if type(x) is not torch.Tensor or x.shape[:2] != (B, Q) or x.dtype is not dtype:
            return None
        self.reach(model, program, last)
        places = None if position_ids is None else position_ids.expand(B, Q).contiguous()
        batch = NewTokens([length] * B, [Q] * B, None, places, mask)
        outputs = launch(STEP["program"], program.run, x.contiguous(), batch, room.latent, room.k_rope)
        if outputs is None:
            return None
        room.filled = length + Q
        return outputs[0]

    def run_pages(self, model: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """New tokens of several sequences over a pool of pages by the program, or None where the layers are to run.

        Args:
            model: a `DeepseekV3ForCausalLM`. step: a pass over pages, as `paged_dsv3` begins it.

        Returns:
            The last hidden states `(T, D)`, and logits `(W, vocabulary)` or None where the head is to be called. The
            pages then hold the new tokens.
        """
        given, (latent, k_rope) = step.batch, step.pool
        tokens, dtype = given.tokens_T, latent.dtype
        if not tokens.is_cpu or not is_undisturbed(tokens) or pool_refusal(dtype, latent, k_rope) is not None:
            return None
        if len(tokens) > MOST_PAGED_TOKENS.get(dtype, 0):
            return None
        program = self.program_for(model.model, dtype, step.pages)
        if program is None or len(tokens) > most_tokens(program):
            return None
        ends, x = self.ends_for(model, program), None
        if not ends.has_embedding or given.places_F is not None:
            x = given.embeds(model.model.embed_tokens)
            if type(x) is not torch.Tensor or x.shape[:-1] != tokens.shape or x.dtype is not dtype:
                return None
            x = x.contiguous()
        batch = NewTokens(
            given.starts_B,
            given.counts_B,
            step.tables_BP,
            tokens=tokens.contiguous() if x is None else None,
            wanted=given.wanted_W.contiguous(),
        )
        self.reach(model.model, ends.program, batch.longest - 1)
        return launch(STEP["program"], ends.program.run, x, batch, latent, k_rope, ends.has_head)

    @staticmethod
    def reach(model: Any, program: Program, last: int) -> None:
        """Gives a program the angles of all positions up to one."""
        if last >= program.positions:
            positions = torch.arange(max(FEWEST_ANGLES, last + last // 2), device="cpu")[None]
            like = torch.empty(0, dtype=program.dtype, device="cpu")
            cos, sin = model.rotary_emb(like, positions)
            program.set_angles(cos[0].contiguous(), sin[0].contiguous())

    def program_for(self, model: Any, dtype: torch.dtype, cache: Any) -> Program | None:
        """The program for what the model is now, if it can have one."""
        if self._made is not None:
            program, grounds, made_for = self._made
            parts = model._modules
            if made_for is dtype and grounds.hold((parts["layers"], parts["norm"], parts["rotary_emb"])):
                is_native = ALL_EXPERTS_FUNCTIONS["grouped_mm"] is GROUPED_MM and is_known_attention("sdpa")
                return program if is_native else None
        # What refuses it stays for a text, mostly: it is not asked again at each of its steps
        asked_for, asked_at = self._asked
        if self._made is None and asked_for() is cache and asked_at == (dtype, selection.epoch):
            return None
        self._asked = (weakref.ref(cache), (dtype, selection.epoch))
        self._made = None
        if STEP["program"].failure is not None or decoding_refusal(model, dtype) is not None:
            return None
        layers = list(model.layers[: model.config.num_hidden_layers])
        program = Program(layers, model.norm, dtype, layers[0].self_attn.config.rope_interleave)
        # Angles are computed from the buffers of the rotary embedding
        changed = tuple(model.rotary_emb.buffers())
        grounds = _Grounds((model.layers, model.norm, model.rotary_emb), model.config, changed)
        self._made = (program, grounds, dtype)
        return program

    def ends_for(self, model: Any, program: Program) -> Ends:
        """What of a `DeepseekV3ForCausalLM` the program does besides the layers."""
        roots = (model.model._modules.get("embed_tokens"), model._modules.get("lm_head"))
        ends = self._ends
        if ends is not None and ends.layers is program and ends.grounds.hold(roots):
            return ends
        embedding, head = roots
        has_embedding = embedding is not None and _embedding_refusal(embedding, program.dtype) is None
        has_head = head is not None and _linear_refusal("lm_head", head, program.dtype) is None
        whole = program.with_ends(embedding if has_embedding else None, head if has_head else None)
        self._ends = ends = Ends(program, whole, _Grounds(roots, model.config), has_embedding, has_head)
        return ends

    def drafts_for(self, model: Any, ends: Ends) -> list[Program] | None:
        """The programs of the MTP layers of a `DeepseekV3ForCausalLM`, by depth, each from token ids to logits.

        Args:
            ends: of the same model, with embedding and head. None where the layers are to be called.
        """
        decoder = model.model
        roots = (decoder._modules.get("mtp"), decoder._modules["rotary_emb"])
        if self._drafts is not None:
            made_with, programs, grounds = self._drafts
            if made_with is ends and grounds.hold(roots):
                return programs or None
        dtype = ends.program.dtype
        programs = []
        if roots[0] is not None and _mtp_refusal(decoder, dtype) is None:
            embedding, head = decoder.embed_tokens, model.lm_head
            for layer in decoder.mtp:
                program = Program.of_mtp_layer(layer, dtype, layer.self_attn.config.rope_interleave)
                programs.append(program.with_ends(embedding, head))
        self._drafts = (ends, programs, _Grounds(roots, model.config, tuple(decoder.rotary_emb.buffers())))
        return programs or None
