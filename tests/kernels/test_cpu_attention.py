"""`attention_absorbed` and `attention_expanded` of `torch.ops.transformers_dsv3` beside float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.models.dsv3.attention_dsv3 import absorbed_attention, eager_attention


pytestmark = pytest.mark.usefixtures("isa", "poisoned")

FP32, BF16 = torch.float32, torch.bfloat16


class Case:
    """Queries, latents and rotary keys of one call; `(B, H, Q, S)`, widths N, P, R, V."""

    def __init__(self, dtype=FP32, B=2, H=3, Q=4, S=20, N=12, P=8, R=16, V=10, strided=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            if not strided:
                return torch.randn(*shape, generator=generator).to(dtype)
            # Part of larger rows, as queries are of their projection and a static cache is filled up to S
            wider = torch.randn(*(n + 1 for n in shape[:-1]), shape[-1] + 3, generator=generator).to(dtype)
            return wider[tuple(slice(1, None) for _ in shape[:-1])][..., 2:-1]

        self.N, self.scaling = N, 1 / math.sqrt(N + P)
        self.q_nope, self.q_rope = random(B, H, Q, N), random(B, H, Q, P)
        self.latent, self.k_rope = random(B, S, R), random(B, S, P)
        self.w = (torch.randn(H * (N + V), R, generator=generator) / math.sqrt(R)).to(dtype)
        self.kv = random(B, S, H, N + V)
        self.mask, self.first_query, self.generator = None, -1, generator
        self.shape = B, H, Q, S

    def make_mask(self, kind, dead_rows=False):
        B, H, Q, S = self.shape
        if kind == "none":
            return self
        allowed = torch.rand(B, 1, Q, S, generator=self.generator) < 0.6
        allowed[:, :, :, 0] = True
        if dead_rows:
            allowed[0, :, -1] = False
        if kind == "one for all":
            allowed = allowed[:1, :, :1]
        self.mask = allowed if kind == "bool" else torch.where(allowed, 0.0, -math.inf)
        if kind in ("additive", "one for all"):
            self.mask = self.mask + torch.randn(self.mask.shape, generator=self.generator)
        if kind == "lowest":
            self.mask = self.mask.clamp_min(torch.finfo(self.q_nope.dtype).min).to(self.q_nope.dtype)
        return self

    def absorbed(self):
        return torch.ops.transformers_dsv3.attention_absorbed(
            self.q_nope, self.q_rope, self.latent, self.k_rope, self.w, self.mask, self.scaling
        )

    def expanded(self):
        return torch.ops.transformers_dsv3.attention_expanded(
            self.q_nope, self.q_rope, self.kv, self.k_rope, self.mask, self.first_query, self.scaling
        )

    def exact(self, kv):
        """`(B, Q, H, V)` in float64; 0 where a query may attend nothing. kv: `(B, S, H, N + V)`."""
        B, H, Q, S = self.shape
        k, v = kv.double().permute(0, 2, 1, 3).split([self.N, kv.shape[-1] - self.N], dim=-1)
        scores = self.q_nope.double() @ k.mT + self.q_rope.double() @ self.k_rope.double().mT[:, None]
        scores = scores * self.scaling
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -math.inf)
        elif self.mask is not None:
            added = self.mask.double()
            scores = scores + added.masked_fill(added <= torch.finfo(self.mask.dtype).min, -math.inf)
        if self.first_query >= 0:
            scores = scores.masked_fill(~torch.ones(Q, S, dtype=torch.bool).tril(self.first_query), -math.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        return (weights @ v).transpose(1, 2)

    def exact_expanded(self):
        return self.exact(self.kv)

    def exact_absorbed(self):
        B, H, Q, S = self.shape
        return self.exact((self.latent.double() @ self.w.double().T).view(B, S, H, -1))


def assert_close(result, exact, dtype):
    """Errors as a share of the largest output: sums of fp32, or several roundings to bf16 on the way."""
    assert result.dtype == dtype and result.shape == exact.shape
    share = 1e-5 if dtype == FP32 else 2.5e-2
    error = (result.double() - exact).abs().max().item() if exact.numel() else 0.0
    # A few outputs, of which there may be one, may all cancel; what is summed in them is about 1
    size = max(exact.abs().max().item(), 0.2) if exact.numel() else 0.0
    assert error <= share * size + 1e-30, f"{error / size:.1e} of the largest output"


shapes = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([FP32, BF16]),
        "B": st.integers(1, 3),
        "H": st.integers(1, 9),
        "Q": st.one_of(st.just(1), st.integers(1, 7)),
        "S": st.one_of(st.integers(1, 20), st.integers(120, 300)),
        "N": st.integers(1, 40),
        "P": st.integers(1, 20),
        "R": st.integers(1, 80),
        "V": st.integers(1, 40),
        "strided": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)
masks = st.sampled_from(["none", "bool", "additive", "lowest", "one for all"])


@settings(max_examples=50)
@given(shape=shapes, mask=masks, dead_rows=st.booleans())
def test_absorbed(shape, mask, dead_rows):
    case = Case(**shape).make_mask(mask, dead_rows)
    assert_close(case.absorbed(), case.exact_absorbed(), shape["dtype"])


@settings(max_examples=50)
@given(shape=shapes, mask=masks, dead_rows=st.booleans(), first_query=st.one_of(st.just(-1), st.integers(0, 40)))
def test_expanded(shape, mask, dead_rows, first_query):
    case = Case(**shape).make_mask(mask, dead_rows)
    case.first_query = first_query
    assert_close(case.expanded(), case.exact_expanded(), shape["dtype"])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_long_contexts_and_many_queries(dtype):
    case = Case(dtype, B=1, H=2, Q=1, S=5000)
    assert_close(case.absorbed(), case.exact_absorbed(), dtype)
    case = Case(dtype, B=1, H=2, Q=150, S=150)
    case.first_query = 0
    assert_close(case.expanded(), case.exact_expanded(), dtype)
    case = Case(dtype, B=1, H=130, Q=2, S=140)
    assert_close(case.absorbed(), case.exact_absorbed(), dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_widths_as_long_as_can_be(dtype):
    case = Case(dtype, B=1, H=1, Q=2, S=140, N=2048, P=2048, V=3)
    assert_close(case.expanded(), case.exact_expanded(), dtype)
    case = Case(dtype, B=1, H=1, Q=2, S=140, N=300, R=2048, P=2048, V=300)
    assert_close(case.absorbed(), case.exact_absorbed(), dtype)


def test_no_keys_and_no_queries():
    case = Case(S=0)
    assert (case.absorbed() == 0).all() and (case.expanded() == 0).all()
    assert Case(Q=0).absorbed().shape == (2, 0, 3, 10) and Case(Q=0).expanded().shape == (2, 0, 3, 10)
    assert Case(B=0).absorbed().shape == (0, 4, 3, 10) and Case(B=0).expanded().shape == (0, 4, 3, 10)


@pytest.mark.parametrize("mask", ["bool", "lowest"])
def test_a_query_that_may_attend_nothing_gives_0(mask):
    case = Case(S=200).make_mask(mask, dead_rows=True)
    for result in (case.absorbed(), case.expanded()):
        assert (result[0, -1] == 0).all() and result[1].all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_large_scores_do_not_overflow(dtype):
    case = Case(dtype, Q=6, S=150)
    case.q_nope, case.q_rope = case.q_nope * 1e4, case.q_rope * 1e4
    for result in (case.absorbed(), case.expanded()):
        assert result.isfinite().all() and result.abs().max() < 20
    case.scaling = 1e30
    assert case.expanded().isfinite().all()


def test_masked_positions_count_nothing_however_large():
    """Left padding, and positions of a static cache that are not filled yet."""
    case = Case(S=300)
    case.mask = torch.ones(2, 1, 4, 300, dtype=torch.bool)
    case.mask[..., 250:] = case.mask[0, ..., :140] = False
    expected = case.absorbed(), case.expanded()
    case.latent[:, 250:] = case.kv[:, 250:] = case.k_rope[:, 250:] = 1e20
    case.latent[0, :140] = case.kv[0, :140] = 1e20
    for result, before in zip((case.absorbed(), case.expanded()), expected):
        torch.testing.assert_close(result, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_in_its_row(dtype, bad):
    for operation in ("absorbed", "expanded"):
        case = Case(dtype, S=150)
        before = getattr(case, operation)()
        case.q_rope[1, 2, 3, 0] = bad
        result = getattr(case, operation)()
        assert not result[1, 3, 2].isfinite().any()
        result[1, 3, 2] = before[1, 3, 2]
        assert torch.equal(result, before)
        case.latent[0, 140, :] = case.kv[0, 140, ...] = bad
        assert not getattr(case, operation)()[0].isfinite().any()


def test_bf16_is_no_worse_than_torchs(rms_error):
    for shape in ({"Q": 1, "S": 500}, {"Q": 3, "S": 40}, {"Q": 1, "S": 130, "R": 512, "N": 128, "P": 64, "V": 128}):
        case = Case(BF16, **shape)
        theirs = absorbed_attention(
            case.q_nope, case.q_rope, case.latent, case.k_rope, case.w, case.mask, case.scaling
        )[0]
        exact = case.exact_absorbed()
        assert rms_error(case.absorbed(), exact) <= 1.1 * rms_error(theirs, exact)

        k, v = case.kv.transpose(1, 2).split([case.N, case.kv.shape[-1] - case.N], dim=-1)
        k = torch.cat([k, case.k_rope[:, None].expand(-1, k.shape[1], -1, -1)], dim=-1)
        query = torch.cat([case.q_nope, case.q_rope], dim=-1)
        theirs = eager_attention(torch.nn.Identity(), query, k, v, None, case.scaling)[0]
        exact = case.exact_expanded()
        assert rms_error(case.expanded(), exact) <= 1.1 * rms_error(theirs, exact)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_results_depend_neither_on_threads_nor_on_other_rows(threads, dtype, mask):
    for S in (90, 700):
        case = Case(dtype, B=3, H=5, Q=7, S=S, R=72, V=36).make_mask(mask)
        for operation in ("absorbed", "expanded"):
            whole = getattr(case, operation)()
            for count in (2, 4):
                with threads(count):
                    assert torch.equal(getattr(case, operation)(), whole)
            for b, q in ((0, 0), (2, 6), (1, 3)):
                alone = Case(dtype, B=1, H=5, Q=1, S=S, R=72, V=36)
                alone.w, alone.scaling = case.w, case.scaling
                for name in ("q_nope", "q_rope"):
                    setattr(alone, name, getattr(case, name)[b : b + 1, :, q : q + 1])
                for name in ("latent", "k_rope", "kv"):
                    setattr(alone, name, getattr(case, name)[b : b + 1])
                if case.mask is not None:
                    alone.mask = case.mask[b : b + 1, :, q : q + 1]
                assert torch.equal(getattr(alone, operation)()[0, 0], whole[b, q])


def test_a_causal_query_alone_is_the_same_as_among_others():
    case = Case(BF16, B=1, H=2, Q=150, S=150)
    case.first_query = 0
    whole = case.expanded()
    for q in (0, 47, 48, 149):
        alone = Case(BF16, B=1, H=2, Q=150, S=150)
        alone.q_nope, alone.q_rope = case.q_nope[:, :, q : q + 1], case.q_rope[:, :, q : q + 1]
        alone.first_query = q
        assert torch.equal(alone.expanded()[0, 0], whole[0, q])


def test_wrong_arguments_are_named():
    def message(operation, **changes):
        case = Case()
        for name, change in changes.items():
            setattr(case, name, change(getattr(case, name)))
        with pytest.raises(ValueError) as error:
            getattr(case, operation)()
        return str(error.value)

    for operation, cached in (("absorbed", "latent"), ("expanded", "kv")):
        assert "q_nope is torch.float64" in message(operation, q_nope=torch.Tensor.double)
        assert "q_rope is of shape (2, 3, 3, 8)" in message(operation, q_rope=lambda t: t[:, :, 1:])
        assert f"{cached} is of shape (1, 20" in message(operation, **{cached: lambda t: t[:1]})
        assert "k_rope is of shape (2, 19, 8)" in message(operation, k_rope=lambda t: t[:, 1:])
        assert "dtypes" in message(operation, **{cached: torch.Tensor.bfloat16})
        assert "mask is of shape (2, 20)" in message(operation, mask=lambda _: torch.ones(2, 20))
        assert "mask is of shape (2, 1, 4, 21)" in message(operation, mask=lambda _: torch.ones(2, 1, 4, 21))
        assert "mask is of shape (2, 3, 4, 20)" in message(operation, mask=lambda _: torch.ones(2, 3, 4, 20))
    assert "kv_b_weight is of shape (66, 15)" in message("absorbed", w=lambda t: t[:, :-1].contiguous())
    assert "kv_b_weight is not contiguous" in message("absorbed", w=lambda t: t.T.contiguous().T)
    assert "kv_b_weight is torch.bfloat16" in message("absorbed", w=torch.Tensor.bfloat16)
    for operation in ("absorbed", "expanded"):
        case = Case(P=2049)
        with pytest.raises(ValueError, match="longer than 2048"):
            getattr(case, operation)()
