"""`torch.ops.transformers_dsv3.mixture` beside float64: routed and shared experts, loads of every kind."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st


pytestmark = pytest.mark.usefixtures("isa", "poisoned")

# Quantised weights meet activations that are whole, or rounded to 8 bits
KINDS = ("fp32", "bf16", "q8", "q8 rounded", "q4", "q4 rounded")


@pytest.fixture(scope="session")
def case(quantize, stands_for):
    return partial(Case, quantize, stands_for)


def to_groups(n):
    return -(-n // 32) * 32


class Case:
    """Arguments of one call: x `(T, D)`, experts' weights, their choice, and the shared network's weights."""

    def __init__(self, quantize, stands_for, kind, dtype, T=5, D=20, E=6, I=12, K=3, S=10, expert=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.quantize, self.stands_for, self.generator, self.kind = quantize, stands_for, generator, kind
        self.bits = {"q8": 8, "q4": 4}.get(kind[:2])
        if self.bits:
            D, I, S = to_groups(D), to_groups(I), to_groups(S)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(kind, dtype)
        self.x = torch.randn(T, D, generator=generator).to(self.dtype)
        self.weights = {}
        if E:
            self.add("gate_up", E, 2 * I, D)
            self.add("down", E, D, I)
        if S:
            for name, shape in (("shared_gate", (S, D)), ("shared_up", (S, D)), ("shared_down", (D, S))):
                self.add(name, *shape)
        if expert is None and E:
            expert = torch.randint(0, E, (T, K), generator=generator)
        self.expert = expert
        self.weight = torch.rand(expert.shape, generator=generator) if expert is not None else None
        self.int8_activations = kind.endswith("rounded")

    def add(self, name, *shape):
        weight = torch.randn(*shape, generator=self.generator) / math.sqrt(max(1, shape[-1]))
        if self.bits:
            self.weights[name], self.weights[name + "_scale"] = self.quantize(weight, self.bits)
        else:
            self.weights[name] = weight.to(self.dtype)

    def run(self, rows=slice(None)):
        names = ("gate_up", "down"), ("shared_gate", "shared_up", "shared_down")
        routed, shared = ([self.weights.get(n + end) for n in group for end in ("", "_scale")] for group in names)
        expert = None if self.expert is None else self.expert[rows]
        weight = None if self.weight is None else self.weight[rows]
        return torch.ops.transformers_dsv3.mixture(
            self.x[rows], *routed, expert, weight, *shared, self.int8_activations
        )

    def exact(self, name):
        scale = self.weights.get(name + "_scale")
        weight = self.weights[name]
        return weight.double() if scale is None else self.stands_for(weight, scale)

    def network(self, x, gate, up, down):
        """Output and a bound of its error, both in float64, for rows `x`."""
        eps = 2.0**-24
        is_bf16 = self.dtype == torch.bfloat16 and not self.int8_activations
        kept = 2.0**-8 if is_bf16 else 0  # of intermediate results
        rounded = 2.0**-8 if is_bf16 and self.bits else 0  # of weights

        def product(x, error, w):
            sums = error @ w.abs().T + rounded * ((x.abs() + error) @ w.abs().T)
            if self.int8_activations:
                step = (x.abs() + error).unflatten(-1, (-1, 32)).amax(-1) * (0.5001 / 127)
                sums = sums + step @ w.abs().unflatten(-1, (-1, 32)).sum(-1).T
            return x @ w.T, sums + eps * (w.shape[-1] / 8 + 20) * (x.abs() @ w.abs().T)

        zero = torch.zeros_like(x)
        (g, dg), (u, du) = product(x, zero, gate), product(x, zero, up)
        h = F.silu(g) * u
        # The slope of silu is 1.1 at most
        dh = 1.1 * dg * (u.abs() + du) + F.silu(g).abs() * du + 8 * eps * h.abs()
        dh = dh + kept * (h.abs() + dh)
        return product(h, dh, down)

    def reference(self):
        x = self.x.double()
        out, bound = torch.zeros_like(x), torch.zeros_like(x)
        if self.expert is not None and "gate_up" in self.weights:
            gate_up, down = self.exact("gate_up"), self.exact("down")
            for e in range(gate_up.shape[0]):
                tokens, k = torch.where(self.expert == e)
                if len(tokens):
                    y, error = self.network(x[tokens], *gate_up[e].chunk(2), down[e])
                    weight = self.weight[tokens, k, None].double()
                    out.index_add_(0, tokens, weight * y)
                    bound.index_add_(0, tokens, weight.abs() * (error + 2.0**-20 * y.abs()))
        if "shared_gate" in self.weights:
            y, error = self.network(x, *(self.exact(f"shared_{n}") for n in ("gate", "up", "down")))
            out, bound = out + y, bound + error + 2.0**-20 * y.abs()
        last = 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-24
        return out, bound + 1.01 * last * (out.abs() + bound) + 1e-30

    def check(self):
        result = self.run()
        assert result.shape == self.x.shape and result.dtype == self.dtype
        out, bound = self.reference()
        error = (result.double() - out).abs()
        assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"
        return result


@settings(max_examples=50)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    T=st.one_of(st.integers(0, 9), st.integers(10, 120)),
    D=st.integers(1, 150),
    E=st.integers(0, 9),
    I=st.integers(1, 90),
    K=st.integers(1, 4),
    S=st.integers(0, 90),
    loads=st.sampled_from(["even", "one expert", "uneven", "some are nobody's"]),
    seed=st.integers(0, 2**16),
)
def test_error_is_bounded(case, kind, dtype, T, D, E, I, K, S, loads, seed):
    if E == 0 and S == 0:
        S = 5
    generator = torch.Generator().manual_seed(seed)
    expert = None
    if E:
        expert = torch.randint(0, E, (T, K), generator=generator)
        if loads == "one expert":
            expert[:] = E - 1
        elif loads == "uneven":
            expert = (torch.rand(T, K, generator=generator) ** 4 * E).long()
        elif loads == "some are nobody's":
            # Under expert parallelism index E marks another rank's expert
            expert = torch.randint(-1, E + 2, (T, K), generator=generator)
    case(kind, dtype, T, D, E, I, K, S, expert, seed).check()


@pytest.mark.parametrize("kind", KINDS)
def test_no_expert_is_here(case, kind):
    made = case(kind, torch.bfloat16, S=0, expert=torch.full((5, 3), 6))
    assert (made.run() == 0).all()
    made = case(kind, torch.float32, expert=torch.full((5, 3), -1))
    made.check()


def test_experts_that_nobody_chose_are_not_read(case):
    made = case("fp32", None, expert=torch.tensor([[0, 2, 0]] * 5))
    expected = made.check()
    for e in (1, 3, 4, 5):
        made.weights["gate_up"][e] = math.nan
        made.weights["down"][e] = math.nan
    assert torch.equal(made.run(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_are_taken_at_a_time(case, kind):
    case(kind, torch.float32, T=4200, D=6, E=5, I=4, K=2, S=3).check()


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(case, kind):
    case(kind, torch.bfloat16, T=3, D=2100, E=2, I=9, K=2, S=11).check()
    case(kind, torch.bfloat16, T=3, D=11, E=2, I=2070, K=2, S=4100).check()


def test_bf16_is_no_worse_than_torchs(case, rms_error):
    for T in (1, 8, 100):
        made = case("bf16", None, T=T, D=130, E=8, I=70, K=4, S=60)
        w = made.weights

        def network(x, gate, up, down):
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        theirs = network(made.x, w["shared_gate"], w["shared_up"], w["shared_down"])
        for e in range(8):
            tokens, k = torch.where(made.expert == e)
            y = network(made.x[tokens], *w["gate_up"][e].chunk(2), w["down"][e])
            theirs = theirs.index_add(0, tokens, (y * made.weight[tokens, k, None]).bfloat16())
        exact = made.reference()[0]
        assert rms_error(made.run(), exact) <= rms_error(theirs, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros(case, kind):
    made = case(kind, torch.float32)
    made.x[2] = 0
    assert (made.check()[2] == 0).all()
    for name in ("down", "shared_down"):
        made.weights[name].fill_(0x88 if made.bits == 4 else 0)
    assert (made.check() == 0).all()
    made = case(kind, torch.float32, S=0)
    made.weight[1] = 0
    assert (made.check()[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_in_its_row(case, kind, bad):
    made = case(kind, torch.bfloat16, D=70)
    good = made.run()
    made.x[3, 50] = bad
    result = made.run()
    assert not result[3].isfinite().any()
    others = [0, 1, 2, 4]
    assert torch.equal(result[others], good[others])


def test_large_gates(case):
    made = case("fp32", None)
    made.x *= 1e4
    result = made.check()
    assert result.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_results_depend_neither_on_threads_nor_on_other_rows(case, threads, kind):
    made = case(kind, torch.bfloat16, T=105, D=140, E=7, I=75, K=3, S=66)
    whole = made.run()
    for count in (2, 4):
        with threads(count):
            assert torch.equal(made.run(), whole)
    for rows in (slice(0, 1), slice(50, 52), slice(3, 19), slice(-18, None)):
        assert torch.equal(made.run(rows), whole[rows])


def test_wrong_arguments_are_named(case):
    def message(change, kind="fp32"):
        made = case(kind, torch.float32)
        change(made)
        with pytest.raises(ValueError) as error:
            made.run()
        return str(error.value)

    def change(name, function):
        return lambda made: made.weights.update({name: function(made.weights[name])})

    assert "x is torch.float64" in message(lambda made: setattr(made, "x", made.x.double()))
    assert "x has 3 dimensions" in message(lambda made: setattr(made, "x", made.x[None]))
    assert "down is of shape (6, 20, 11)" in message(change("down", lambda w: w[..., :-1]))
    assert "gate_up is torch.bfloat16" in message(change("gate_up", lambda w: w.bfloat16()))
    assert "gate_up is not contiguous" in message(change("gate_up", lambda w: w.mT.contiguous().mT))
    assert "shared_up is of shape (9, 20)" in message(change("shared_up", lambda w: w[:-1]))
    assert "down is quantised without a scale" in message(lambda made: made.weights.pop("down_scale"), "q8 rounded")
    assert "scale of shared_gate" in message(change("shared_gate_scale", lambda s: s.double()), "q8 rounded")
    assert "expert is not int64" in message(lambda made: setattr(made, "expert", made.expert.int()))
    assert "expert is not int64 of (T, K)" in message(lambda made: setattr(made, "expert", made.expert[:3]))
    assert "weight is of shape (5, 2)" in message(lambda made: setattr(made, "weight", made.weight[:, :2]))
    assert "several dtypes, or there are none" in message(lambda made: made.weights.clear())
    assert "several dtypes" in message(lambda made: made.weights.update(case("q4", torch.float32, E=0).weights), "q8")
    for missing in ("down", "shared_up", "shared_down"):
        assert missing in message(lambda made, missing=missing: made.weights.pop(missing))
