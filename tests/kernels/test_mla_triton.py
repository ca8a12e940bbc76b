"""Absorbed attention by Triton's programs, beside the plain reference in float64.

On a GPU where there is one, in bf16; else Triton interprets the programs on the CPU, where products of bf16 are not
what they are on a GPU, so that fp32 and fp16 are taken.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.kernels import mla_triton, selection, triton_support
from transformers_dsv3.models.dsv3.attention_dsv3 import absorbed_attention


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")
if (why := triton_support.device_refusal(torch.empty(0, device=DEVICE))) is not None:
    pytest.skip(f"Triton {why}", allow_module_level=True)


@pytest.fixture(autouse=True)
def chosen():
    with selection.use(attention="triton"), torch.no_grad():
        yield


class Case:
    """Queries and a latent cache, as the model hands them over: parts of larger tensors.

    Args:
        room: positions behind the S that the cache has, which hold NaN, as a growing cache's may.
    """

    def __init__(self, dtype=torch.float32, B=2, H=3, Q=1, S=40, N=12, P=8, R=16, V=10, room=3, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        query = random(B, Q, H, N + P).transpose(1, 2)
        self.q_nope, self.q_rope = query.split([N, P], dim=-1)
        self.latent, self.k_rope = (random(B, 1, S + room, width).squeeze(1) for width in (R, P))
        self.latent[:, S:] = self.k_rope[:, S:] = math.nan
        self.latent, self.k_rope = self.latent[:, :S], self.k_rope[:, :S]
        self.kv_b = (random(H * (N + V), R) / R**0.5).contiguous()
        self.scaling = (N + P) ** -0.5
        self.mask = self.filled = None
        self.B, self.H, self.Q, self.S, self.generator = B, H, Q, S, generator

    def tensors(self):
        return self.q_nope, self.q_rope, self.latent, self.k_rope, self.kv_b

    def make_mask(self, kind, dead_rows=False):
        """A mask of one kind, or of causal queries; positions that no query may attend hold NaN then."""
        B, Q, S = self.B, self.Q, self.S
        allowed = torch.rand(B, 1, Q, S, generator=self.generator) < 0.6
        if kind == "causal":
            allowed = torch.ones(B, 1, Q, S, dtype=torch.bool).tril(S - Q)
        allowed[..., 0] = True
        if dead_rows:
            allowed[0, :, -1] = False
        if kind == "one for all":
            allowed = allowed[:1, :, :1]
        allowed = allowed.to(DEVICE)
        added = torch.randn(allowed.shape, generator=self.generator).to(DEVICE, self.q_nope.dtype)
        self.mask = {
            "none": None,
            "additive": torch.where(allowed, added, -math.inf),
            "lowest": torch.where(allowed, added, torch.finfo(added.dtype).min),
        }.get(kind, allowed)
        if kind != "none":
            unseen = ~allowed.expand(B, 1, Q, S).any(2)[:, 0]
            self.latent[unseen], self.k_rope[unseen] = math.nan, math.inf
        return self

    def fill(self, *lengths):
        """Only the first positions hold something."""
        self.filled = torch.tensor(lengths, device=DEVICE)
        for row, length in enumerate(self.filled.expand(self.B).tolist()):
            self.latent[row, length:] = self.k_rope[row, length:] = math.nan
        return self

    def run(self):
        arguments = (*self.tensors()[2:], self.mask)
        assert mla_triton.absorbed_refusal(self.q_nope, *arguments) is None
        return mla_triton.absorbed_attention(self.q_nope, self.q_rope, *arguments, self.scaling, self.filled)

    def exact(self, dtype=torch.float64):
        """The plain reference; 0 where a query may attend nothing."""
        allowed = torch.ones(self.B, 1, self.Q, self.S, dtype=torch.bool, device=DEVICE)
        added = torch.zeros(1, dtype=dtype, device=DEVICE)
        if self.mask is not None and self.mask.dtype == torch.bool:
            allowed &= self.mask
        elif self.mask is not None:
            allowed &= self.mask > torch.finfo(self.mask.dtype).min
            added = self.mask.to(dtype)
        if self.filled is not None:
            behind = torch.arange(self.S, device=DEVICE) >= self.filled.expand(self.B)[:, None]
            allowed &= ~behind[:, None, None]
        tensors = [x.to(dtype).nan_to_num(0.0, 0.0, 0.0) for x in self.tensors()]
        mask = torch.where(allowed, added, torch.finfo(dtype).min)
        output = absorbed_attention(*tensors, mask, self.scaling)[0]
        return output.masked_fill(~allowed.any(-1).transpose(1, 2).unsqueeze(-1), 0.0)


def assert_close(result, exact):
    """Errors as a share of the largest output: of fp32's sums, or of roundings to 16 bits on the way."""
    assert result.dtype != torch.float64 and result.shape == exact.shape
    share = 1e-5 if result.dtype == torch.float32 else 0.01 if result.dtype == torch.float16 else 0.025
    error = (result.double() - exact).abs().max().item() if exact.numel() else 0.0
    size = max(exact.abs().max().item(), 0.05) if exact.numel() else 1.0
    assert error <= share * size, f"{error / size:.1e} of the largest output"


# Blocks of the interpreter's programs are of 16 positions, and 4 programs count as what runs at a time
SHAPES = {
    "several parts, the last one not full": {"B": 1, "S": 150},
    "one part": {"B": 3, "H": 20, "S": 17},
    "one position": {"S": 1},
    "block's end": {"S": 32, "room": 0},
    "heads of two blocks": {"H": 70, "S": 20},
    "two queries": {"Q": 2, "S": 50},
    "eight queries": {"B": 1, "Q": 8, "H": 5, "S": 33},
    "widths that are no powers of two": {"R": 40, "P": 12, "S": 50},
    "DeepSeek-V3's widths": {"B": 1, "H": 16, "S": 36, "N": 128, "P": 64, "R": 512, "V": 128},
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_equal_the_reference(shape, dtype):
    case = Case(dtype, **shape)
    assert_close(case.run(), case.exact())


@pytest.mark.parametrize("kind", ["bool", "additive", "lowest", "one for all", "causal"])
@pytest.mark.parametrize("Q", [1, 2])
def test_masks_of_all_kinds(kind, Q):
    """What no query may attend holds NaN; the last query of the first sequence may attend nothing."""
    case = Case(Q=Q, S=70).make_mask(kind, dead_rows=kind != "one for all")
    result = case.run()
    assert_close(result, case.exact())
    assert kind == "one for all" or (result[0, -1] == 0).all()


@pytest.mark.parametrize("lengths", [(0,), (1,), (37,), (0, 40), (16, 1), (40, 33), (99, 5)])
def test_lengths_of_each_sequence(lengths):
    """Of one part and of several; none, one position, a block's end, all, and more than there is room for."""
    for S in (40, 150):
        case = Case(S=S).fill(*lengths)
        assert_close(case.run(), case.exact())


def test_a_static_cache_is_filled_and_masked():
    """As Transformers gives it: left padding, two new queries that are causal, room that holds anything."""
    case = Case(Q=2, S=100)
    case.mask = torch.ones(2, 1, 2, 100, dtype=torch.bool, device=DEVICE).tril(60)
    case.mask[0, ..., :21] = False
    case.latent[0, :21] = math.nan
    assert_close(case.fill(62).run(), case.exact())


class Paged(Case):
    """The same latents in pages that lie in any order among others, which hold NaN."""

    def __init__(self, size, lengths, **shape):
        super().__init__(S=max(*lengths, 1), **shape)
        self.fill(*lengths)
        each = -(-self.S // size) + 1
        order = torch.randperm(each * self.B + 2, generator=self.generator)[: each * self.B].view(self.B, each)
        self.pools = []
        for source in (self.latent, self.k_rope):
            pool = source.new_full((each * self.B + 2, size, source.shape[-1]), math.nan)
            for row, length in enumerate(lengths):
                for position in range(length):
                    pool[order[row, position // size], position % size] = source[row, position]
            self.pools.append(pool)
        self.pages = order.to(DEVICE, torch.int32)
        for row, length in enumerate(lengths):
            self.pages[row, -(-length // size) :] = 2**30  # is not looked at
        # The last queries, each up to itself
        allowed = torch.arange(self.S) <= torch.tensor(lengths)[:, None, None] - self.Q + torch.arange(self.Q)[:, None]
        self.mask = allowed[:, None].to(DEVICE)

    def run(self):
        assert mla_triton.paged_refusal(self.q_nope, *self.pools, self.kv_b) is None
        arguments = (self.kv_b, self.pages, self.filled, self.scaling)
        return mla_triton.paged_attention(self.q_nope, self.q_rope, *self.pools, *arguments)


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("Q", [1, 2])
def test_pages(size, Q):
    """Contexts that end at a page's end, before and behind it, and those of one position and of none."""
    for lengths in ((64, 63, 65), (1, 0, 8), (130, 2, 16)):
        case = Paged(size, lengths, B=3, Q=Q)
        assert_close(case.run(), case.exact())


def test_pages_of_wide_caches_lie_apart():
    """Views of one pool that holds latents and rotary keys side by side, behind other layers' pages."""
    case = Paged(16, (40, 7))
    joined = torch.full((2, *case.pools[0].shape[:2], 30), math.nan, device=DEVICE)
    for pool, place in zip(case.pools, (slice(0, 16), slice(20, 28))):
        joined[1, ..., place] = pool
    case.pools = [joined[1, ..., :16], joined[1, ..., 20:28]]
    assert_close(case.run(), case.exact())


@settings(max_examples=12)
@given(
    shape=st.fixed_dictionaries(
        {
            "B": st.integers(1, 3),
            "H": st.integers(1, 20),
            "Q": st.integers(1, 4),
            "S": st.one_of(st.integers(1, 20), st.integers(60, 90)),
            "N": st.integers(1, 20),
            "P": st.integers(1, 10).map(lambda n: 2 * n),
            "R": st.integers(1, 40),
            "V": st.integers(1, 20),
            "seed": st.integers(0, 2**16),
        }
    ),
    kind=st.sampled_from(["none", "bool", "additive", "lowest", "one for all", "causal"]),
    dead_rows=st.booleans(),
    filled=st.one_of(st.none(), st.integers(0, 95)),
)
def test_any_shape(shape, kind, dead_rows, filled):
    case = Case(**shape).make_mask(kind, dead_rows)
    if filled is not None:
        case.fill(filled)
    assert_close(case.run(), case.exact())


def test_the_same_twice_and_whatever_the_others_are():
    """Bit for bit, in a batch of the same size."""
    case = Case(B=3, S=90).fill(90, 41, 7)
    first = case.run()
    assert torch.equal(case.run(), first)
    case.latent[[0, 2], :7] *= 2
    case.filled = torch.tensor([30, 41, 5], device=DEVICE)
    other = case.run()
    assert torch.equal(other[1], first[1]) and not torch.equal(other[0], first[0])


def test_what_is_not_finite_stays_so_in_its_row():
    for bad in (math.nan, math.inf):
        case = Case(S=60)
        before = case.run()
        case.q_rope[1, 2, 0, 0] = bad
        result = case.run()
        assert not result[1, 0, 2].isfinite().any()
        result[1, 0, 2] = before[1, 0, 2]
        assert torch.equal(result, before)
        case.latent[0, 50] = bad
        assert not case.run()[0].isfinite().any()


def test_large_scores_do_not_overflow():
    case = Case(S=60)
    case.q_nope.mul_(1e4), case.q_rope.mul_(1e4)
    assert_close(case.run(), case.exact())


def test_nothing_to_attend_and_nobody_to():
    assert (Case(S=0, room=0).run() == 0).all()
    assert Case(B=0).run().shape == (0, 1, 3, 10) and Case(Q=0).run().shape == (2, 0, 3, 10)


@pytest.mark.parametrize("programs, blocks, places", [(1, 16, 264), (1, 256, 264), (64, 256, 264), (100, 128, 132)])
def test_contexts_are_divided_so_that_all_processors_work(programs, blocks, places):
    """At least three quarters of the places, over all rounds, or two blocks a part at the most."""
    mla_decode = pytest.importorskip("transformers_dsv3.kernels.triton_src.mla_decode")
    count = mla_decode.parts(programs, blocks, places)
    assert 1 <= count <= min(blocks, mla_decode.MOST_PARTS)
    rounds = -(-programs * count // places)
    assert programs * count >= 0.75 * rounds * places or -(-blocks // count) <= 2
    assert mla_decode.parts(2 * places, blocks, places) <= 2
    assert mla_decode.parts(1, 1, places) == 1


def test_what_is_not_for_it_is_refused():
    case = Case(S=40)

    def refusal(q_nope=case.q_nope, latent=case.latent, k_rope=case.k_rope, kv_b=case.kv_b, mask=None):
        return mla_triton.absorbed_refusal(q_nope, latent, k_rope, kv_b, mask)

    assert refusal() is None
    assert "8 queries" in refusal(q_nope=case.q_nope.expand(-1, -1, 9, -1))
    assert "latents of 512" in refusal(latent=case.latent.repeat(1, 1, 40))
    assert "rotary keys of 128" in refusal(k_rope=case.k_rope.repeat(1, 1, 20))
    assert "contiguous" in refusal(latent=case.latent.transpose(1, 2).contiguous().transpose(1, 2))
    assert "contiguous kv_b_proj" in refusal(kv_b=case.kv_b.T.contiguous().T)
    assert "activations' dtype" in refusal(kv_b=case.kv_b.to(torch.int8))
    assert "activations' dtype" in refusal(latent=case.latent.half())
    assert "masks of" in refusal(mask=torch.ones(2, 40, device=DEVICE))
    assert "not torch.int64" in refusal(mask=torch.ones(2, 1, 1, 40, device=DEVICE, dtype=torch.int64))
    doubles = [x.double() for x in (case.q_nope, case.latent, case.k_rope, case.kv_b)]
    assert "not torch.float64" in refusal(*doubles)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert "autocast" in refusal()
    with torch.enable_grad():
        assert "has no gradients" in refusal(kv_b=torch.nn.Parameter(case.kv_b))
    assert refusal(kv_b=torch.nn.Parameter(case.kv_b)) is None
    assert "power of two" in mla_triton.paged_refusal(case.q_nope, case.latent, case.k_rope, case.kv_b)
    assert torch.func.vmap(lambda x: torch.tensor("torch.func" in refusal(q_nope=x)))(case.q_nope[None]).all()
    if DEVICE == "cpu":
        with selection.use(attention="auto"):
            assert "asked for by name" in refusal()
    with selection.use(attention="torch"):
        assert "as chosen" in refusal()


def test_the_operator_checks_what_the_programs_trust():
    case = Case(S=32)
    q_latent = torch.zeros(3, 2, 1, 16, device=DEVICE)
    pages = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)

    def call(q_latent=q_latent, q_rope=case.q_rope, k_rope=case.k_rope, mask=None, lengths=None, pages=None):
        arguments = (q_latent, q_rope, case.latent, k_rope, mask, lengths, pages, False, 1.0)
        return torch.ops.transformers_dsv3.mla_decode(*arguments)

    assert call().shape == q_latent.shape
    for wrong in (
        {"q_rope": case.q_rope[:, :2]},
        {"q_rope": case.q_rope.half()},
        {"k_rope": case.k_rope[:, :-1]},
        {"q_latent": q_latent[:, :1]},
        {"mask": torch.ones(2, 1, 1, 31, dtype=torch.bool, device=DEVICE)},
        {"pages": pages},
        {"pages": pages.long(), "lengths": pages[:, 0]},
    ):
        with pytest.raises(ValueError):
            call(**wrong)


def test_operators_are_well_formed():
    case = Case(S=32)
    mask = torch.ones(2, 1, 1, 32, dtype=torch.bool, device=DEVICE)
    arguments = (torch.zeros(3, 2, 1, 16, device=DEVICE), case.q_rope, case.latent, case.k_rope)
    for rest in ((None, None, None), (mask, torch.tensor(5, device=DEVICE), None)):
        operator = torch.ops.transformers_dsv3.mla_decode.default
        torch.library.opcheck(operator, (*arguments, *rest, False, 0.5))


def test_errors_are_no_larger_than_those_of_torch(measured):
    """In 16 bits, beside float64 on the same rounded inputs."""
    case = Case(HALF, H=16, S=90, N=128, P=64, R=512, V=128, room=0)
    exact = case.exact()
    ours, torchs = (
        ((result.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
        for result in (case.run(), absorbed_attention(*case.tensors(), None, case.scaling)[0])
    )
    measured[f"Triton's absorbed attention, {HALF}: error over torch's own"] = ours / torchs
    assert ours <= 1.05 * torchs


def test_tf32_as_asked_for_by_the_newer_setting():
    """PyTorch raises where the older one is read after the newer was set."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert triton_support.precision() == ("ieee" if torch.version.hip else "tf32")
        assert Case(S=40).run().isfinite().all()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert triton_support.precision() == "ieee"
