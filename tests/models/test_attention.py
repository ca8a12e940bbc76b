"""Multi-head latent attention: both ways to compute it against a plain float64 one, masks, implementations."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from transformers_dsv3 import Dsv3Config
from transformers_dsv3.models.dsv3.attention_dsv3 import (
    Dsv3Attention,
    absorbed_attention,
    dense_mask,
    eager_attention,
    softmax_scale,
)


SHAPES = {
    "B": st.integers(1, 3),
    "H": st.integers(1, 4),
    "Q": st.integers(1, 6),
    "past": st.integers(0, 9),
    "N": st.integers(1, 9),
    "P": st.integers(1, 4).map(lambda half: 2 * half),
    "V": st.integers(1, 20),
    "R": st.integers(1, 12),
    "seed": st.integers(0, 1000),
}


def naive_attention(q_nope, q_rope, latent, k_rope, kv_b_weight, allowed, scaling):
    """Attention in float64, one row, head and query at a time; `allowed` is boolean `(B, Q, S)`."""
    q_nope, q_rope, latent, k_rope, kv_b_weight = (x.double() for x in (q_nope, q_rope, latent, k_rope, kv_b_weight))
    B, H, Q, N = q_nope.shape
    per_head = kv_b_weight.chunk(H)
    rows = []
    for b in range(B):
        for q in range(Q):
            heads = []
            for h in range(H):
                keys = torch.cat([latent[b] @ per_head[h][:N].T, k_rope[b]], dim=1)[allowed[b, q]]
                values = (latent[b] @ per_head[h][N:].T)[allowed[b, q]]
                scores = keys @ torch.cat([q_nope[b, h, q], q_rope[b, h, q]]) * scaling
                heads.append(torch.exp(scores - torch.logsumexp(scores, 0)) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows).view(B, Q, H, -1)


def random_allowed(B, Q, S, generator):
    """Causal, and some of the past hidden, but never a query's own position."""
    allowed = torch.rand(B, 1, S, generator=generator).gt(0.3).expand(B, Q, S).tril(S - Q).clone()
    for q in range(Q):
        allowed[:, q, S - Q + q] = True
    return allowed


def close(ours, reference, tolerance=2e-5):
    assert ours.shape == reference.shape
    assert bool(torch.isfinite(ours).all())
    assert (ours.double() - reference).norm() <= tolerance * reference.norm() + 1e-12


@settings(deadline=None, max_examples=40, derandomize=True)
@given(**SHAPES)
def test_absorbed_and_expanded_equal_the_plain_computation(B, H, Q, past, N, P, V, R, seed):
    """Outputs, and gradients of every input, with a mask as booleans and as a sum."""
    generator = torch.Generator().manual_seed(seed)
    S = past + Q
    shapes = [(B, H, Q, N), (B, H, Q, P), (B, S, R), (B, S, P), (H * (N + V), R)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights_of_sum = torch.randn(B, Q, H, V, generator=generator)
    allowed = random_allowed(B, Q, S, generator)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    scaling = (N + P) ** -0.5

    def expanded(q_nope, q_rope, latent, k_rope, kv_b_weight):
        k_nope, value = (latent @ kv_b_weight.T).view(B, S, H, N + V).transpose(1, 2).split([N, V], dim=-1)
        key = torch.cat([k_nope, k_rope[:, None].expand(B, H, S, P)], dim=-1)
        return eager_attention(
            torch.nn.Module().eval(), torch.cat([q_nope, q_rope], -1), key, value, additive[:, None], scaling
        )

    reference = naive_attention(*inputs, allowed, scaling)
    gradients = torch.autograd.grad((reference * weights_of_sum).sum(), inputs)
    for compute in (
        lambda *x: absorbed_attention(*x, allowed[:, None], scaling),
        lambda *x: absorbed_attention(*x, additive[:, None], scaling),
        expanded,
    ):
        output, weights = compute(*inputs)
        close(output, reference)
        assert weights.shape == (B, H, Q, S)
        assert torch.allclose(weights.sum(-1), torch.ones(B, H, Q), atol=1e-5)
        assert bool((weights[~allowed[:, None].expand_as(weights)] == 0).all())
        ours = torch.autograd.grad((output * weights_of_sum).sum(), inputs)
        scale = max(float(g.norm()) for g in gradients)
        for gradient, expected in zip(ours, gradients):
            assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * scale


def test_rows_that_may_attend_nothing_give_no_nan():
    """Padding on the left leaves such rows; what they give is dropped, but it must not spread."""
    q_nope, q_rope = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 2)
    latent, k_rope, weight = torch.randn(1, 3, 5), torch.randn(1, 3, 2), torch.randn(2 * 7, 5)
    allowed = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1]]).bool()[None, None]
    output, _ = absorbed_attention(q_nope, q_rope, latent, k_rope, weight, allowed, 0.4)
    assert bool(torch.isfinite(output).all())
    close(
        output[:, 1:],
        naive_attention(q_nope[:, :, 1:], q_rope[:, :, 1:], latent, k_rope, weight, allowed[0, :, 1:], 0.4),
    )


def rotated_by_complex_numbers(x, positions, theta, interleave):
    """RoPE as its definition: pair i, as a complex number, times e^(i · position · theta^(-2i/P))."""
    x = x.double()
    P = x.shape[-1]
    pairs = x.unflatten(-1, (P // 2, 2)) if interleave else torch.stack(x.chunk(2, dim=-1), dim=-1)
    angles = positions.double()[:, None] * theta ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def naive_module(module, hidden, positions):
    """The whole of a `Dsv3Attention` in float64 from its weights."""
    config = module.config

    def project(linear, x):
        return x @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())

    def normed(norm, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()

    hidden = hidden.double()
    if config.q_lora_rank is None:
        query = project(module.q_proj, hidden)
    else:
        query = project(module.q_b_proj, normed(module.q_a_layernorm, project(module.q_a_proj, hidden)))
    query = query.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
    latent, k_rope = project(module.kv_a_proj_with_mqa, hidden).split(
        [config.kv_lora_rank, config.qk_rope_head_dim], -1
    )

    def rotated(x):
        theta = config.rope_parameters["rope_theta"]
        return rotated_by_complex_numbers(x, positions, theta, config.rope_interleave)

    length = hidden.shape[1]
    allowed = torch.ones(hidden.shape[0], length, length, dtype=torch.bool).tril()
    output = naive_attention(
        query[..., : config.qk_nope_head_dim],
        rotated(query[..., config.qk_nope_head_dim :]),
        normed(module.kv_a_layernorm, latent),
        rotated(k_rope),
        module.kv_b_proj.weight,
        allowed,
        (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5,
    )
    return project(module.o_proj, output.flatten(2))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    N=st.integers(1, 9),
    half=st.integers(1, 4),
    V=st.integers(1, 20),
    R=st.integers(1, 24),
    length=st.integers(1, 12),
    cut=st.integers(0, 11),
    q_lora=st.sampled_from([None, 6]),
    interleave=st.booleans(),
    bias=st.booleans(),
)
def test_module_equals_the_plain_computation(implementation, N, half, V, R, length, cut, q_lora, interleave, bias):
    """Values narrower and wider than keys, ranks for which absorbing pays even at prefill; in one call and in two."""
    config = Dsv3Config(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        qk_nope_head_dim=N,
        qk_rope_head_dim=2 * half,
        v_head_dim=V,
        kv_lora_rank=R,
        q_lora_rank=q_lora,
        rope_interleave=interleave,
        attention_bias=bias,
    )
    config._attn_implementation = implementation
    torch.manual_seed(length)
    module = Dsv3Attention(config, layer_idx=0).eval()
    torch.nn.init.normal_(module.kv_a_layernorm.weight)
    hidden = torch.randn(2, length, 16)
    positions = torch.arange(length)
    rotary = DeepseekV3RotaryEmbedding(config)
    reference = naive_module(module, hidden, positions)

    cache = DynamicCache()
    outputs = []
    cut = min(cut, length - 1)
    for start, end in ((0, cut), (cut, length)):
        if start == end:
            continue
        mask = None
        if end - start > 1:
            mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)[None, None]
            if implementation == "eager":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.no_grad():
            embeddings = rotary(hidden, positions[None, start:end])
            outputs.append(module(hidden[:, start:end], embeddings, attention_mask=mask, past_key_values=cache)[0])
    close(torch.cat(outputs, dim=1), reference)
    assert cache.layers[0].keys.shape == (2, 1, length, R)
    assert cache.layers[0].values.shape == (2, 1, length, 2 * half)


def test_yarn_scale_is_the_published_one():
    """DeepSeek-V3: 192 wide keys, factor 40, mscale_all_dim 1."""
    yarn = {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4}
    config = Dsv3Config(
        max_position_embeddings=163840, rope_parameters={**yarn, "original_max_position_embeddings": 4096}
    )
    assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert softmax_scale(Dsv3Config()) == pytest.approx(192**-0.5)


class TestDenseMask:
    Q, S = 3, 7
    PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]])

    def expected(self, padding=None):
        """Which positions a query may attend, one by one."""
        rows = 1 if padding is None else len(padding)
        return torch.tensor(
            [
                [
                    [s <= self.S - self.Q + q and (padding is None or bool(padding[b, s])) for s in range(self.S)]
                    for q in range(self.Q)
                ]
                for b in range(rows)
            ]
        )[:, None]

    def dense(self, mask):
        return dense_mask(mask, self.Q, self.S, torch.device("cpu"), self.S - self.Q)

    def test_none_is_causal(self):
        assert torch.equal(self.dense(None), self.expected())
        assert dense_mask(None, 1, self.S, torch.device("cpu"), self.S - 1) is None

    def test_none_with_room_behind_the_queries(self):
        """A static cache, all of its length from the first query on."""
        mask = dense_mask(None, self.Q, self.S, torch.device("cpu"), 0)
        assert mask[0, 0].tolist() == [[s <= q for s in range(self.S)] for q in range(self.Q)]

    def test_padding_alone(self):
        assert torch.equal(self.dense(self.PADDING), self.expected(self.PADDING))
        one = dense_mask(self.PADDING, 1, self.S, torch.device("cpu"), self.S - 1)
        assert torch.equal(one[:, 0, 0], self.PADDING.bool())

    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_four_dimensions_are_cut_to_the_cache(self, kind):
        expected = self.expected(self.PADDING)
        given_mask = torch.cat([expected, torch.zeros(3, 1, self.Q, 4, dtype=torch.bool)], dim=-1)
        if kind == "additive":
            expected = torch.zeros(expected.shape).masked_fill(~expected, -1e9)
            given_mask = torch.zeros(given_mask.shape).masked_fill(~given_mask, -1e9)
        assert torch.equal(self.dense(given_mask), expected)

    def test_block_mask(self):
        padding, offset = self.PADDING.bool(), self.S - self.Q

        def allowed(b, h, q, s):
            return (s <= q + offset) & padding[b, s]

        block_mask = create_block_mask(allowed, 3, None, self.Q, self.S, device="cpu")
        mask = self.dense(block_mask)
        assert torch.equal(mask.expand(3, 1, self.Q, self.S), self.expected(self.PADDING))


def padded(side, length=14):
    tokens = torch.randint(96, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    for row, hidden in ((1, 2), (2, 5)):
        if side == "left":
            mask[row, :hidden] = 0
        elif side == "right":
            mask[row, -hidden:] = 0
    return tokens, mask


# Flex attention is compiled for each kind of mask
COMPILED = [
    pytest.param("flex_attention", side, marks=[pytest.mark.slow] if side != "left" else [])
    for side in ("none", "left", "right")
]


@pytest.mark.parametrize(
    "implementation, side",
    [(implementation, side) for implementation in ("eager", "sdpa") for side in ("none", "left", "right")] + COMPILED,
)
def test_implementations_equal_native(implementation, side, make_model, native_twin):
    """Prefill, then one token on its cache."""
    # The plain reference for all is eager; widths that are powers of two compile fastest
    ours = make_model(qk_nope_head_dim=8, v_head_dim=16)
    native = native_twin(ours)
    native.set_attn_implementation("eager")
    ours.set_attn_implementation(implementation)
    assert ours.config._attn_implementation == implementation
    tokens, mask = padded(side)
    longer = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    following = tokens[:, :1]
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for model in (ours, native)]
        prefill = [m(tokens, attention_mask=mask, past_key_values=c).logits for m, c in zip((ours, native), caches)]
        step = [m(following, attention_mask=longer, past_key_values=c).logits for m, c in zip((ours, native), caches)]
    real = mask.bool()
    close(prefill[0][real], prefill[1][real].double())
    close(*[step[0], step[1].double()])


@pytest.mark.parametrize("use_cache", [False, None])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences_equal_separate_ones(implementation, use_cache, make_model):
    model = make_model(attn_implementation=implementation)
    tokens = torch.randint(96, (1, 20))
    lengths = [7, 1, 12]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=use_cache).logits
        separate = [model(part, use_cache=False).logits for part in tokens.split(lengths, dim=1)]
        run_on = model(tokens, use_cache=False).logits
    close(packed, torch.cat(separate, dim=1).double())
    assert not torch.allclose(packed, run_on, atol=1e-3)


class TestWhyNotAbsorbed:
    """Where the weight cannot be folded the expanded path serves, with the same result."""

    def test_none_where_it_can(self, make_model):
        assert make_model().model.layers[0].self_attn.absorbed_refusal() is None

    def decode(self, model, tokens):
        with torch.no_grad():
            cache = model(tokens[:, :-1], use_cache=True).past_key_values
            return model(tokens[:, -1:], past_key_values=cache).logits

    def test_lora_on_kv_b_proj(self, make_model):
        model = make_model()
        tokens = torch.randint(96, (2, 9))
        wrapped = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
        )
        wrapped.eval()
        attention = wrapped.base_model.model.model.layers[0].self_attn
        assert "kv_b_proj" in attention.absorbed_refusal()
        decoded = self.decode(wrapped, tokens)
        # The adapter acts, and as it does once it is merged and can be folded again
        assert not torch.allclose(decoded, self.decode(model, tokens), atol=1e-3)
        merged = wrapped.merge_and_unload()
        assert merged.model.layers[0].self_attn.absorbed_refusal() is None
        close(self.decode(merged, tokens), decoded.double())

    def test_offloaded_weight(self, make_model):
        attention = make_model().model.layers[0].self_attn
        attention.kv_b_proj.to("meta")
        assert "offloaded" in attention.absorbed_refusal()

    def test_dropout(self, make_model):
        attention = make_model(attention_dropout=0.5).model.layers[0].self_attn
        assert attention.absorbed_refusal() is None
        assert "dropout" in attention.train().absorbed_refusal()

    def test_caches_that_are_not_addressed_by_position(self, make_model):
        model = make_model()
        attention = model.model.layers[0].self_attn
        static = StaticCache(config=model.config, max_cache_len=8)
        assert attention.absorbed_refusal(static) is None
        model.config._attn_implementation_internal = "flash_attention_2"
        assert "static cache" in attention.absorbed_refusal(static)
        assert attention.absorbed_refusal(DynamicCache()) is None
        model.config._attn_implementation_internal = "paged|sdpa"
        assert "paged" in attention.absorbed_refusal()


def test_dropout_acts_while_training_only(make_model):
    model = make_model(attention_dropout=0.5, attn_implementation="eager")
    tokens = torch.randint(96, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        model.train()
        assert not torch.equal(model(tokens).logits, model(tokens).logits)
