"""Norms, rotary embedding and the write to the latent cache by Triton's programs, beside the plain modules in float64.

On a GPU where there is one; else Triton interprets the programs on the CPU.
"""

import copy
import math

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from transformers_dsv3.kernels import rows_triton, selection, triton_support
from transformers_dsv3.models.dsv3.attention_dsv3 import rotate
from transformers_dsv3.models.dsv3.cache_dsv3 import filled_positions, next_place
from transformers_dsv3.models.dsv3.norm_dsv3 import Dsv3RMSNorm


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter rounds bf16 toward zero
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")
if (why := triton_support.device_refusal(torch.empty(0, device=DEVICE))) is not None:
    pytest.skip(f"Triton {why}", allow_module_level=True)

OPS = torch.ops.transformers_dsv3
B, H, R, P, LAYER = 2, 3, 24, 12, 0


@pytest.fixture(autouse=True)
def chosen():
    with selection.use(attention="triton", linear="triton"), torch.no_grad():
        yield


def make_norm(width, dtype):
    norm = Dsv3RMSNorm(width, eps=1e-5).to(DEVICE, dtype).eval()
    norm.weight += 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return norm


def no_worse(result, exact, plain, floor):
    """Errors no larger than twice those of PyTorch's own operations, or than the dtype's rounding."""
    assert result.dtype == plain.dtype and result.shape == exact.shape
    error, its_error = ((x.double() - exact).abs().max() for x in (result, plain))
    assert error <= 2 * its_error + floor * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (2, 3, 100), (5, 1), (0, 8)])
def test_norms(dtype, shape):
    norm = make_norm(shape[-1], dtype)
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    assert rows_triton.rms_norm_refusal(x, norm.weight) is None
    result = norm(x)
    if not x.numel():
        assert result.shape == shape
        return
    exact = copy.deepcopy(norm).double()(x.double())  # is not for Triton
    with selection.use(linear="torch"):
        no_worse(result, exact, norm(x), torch.finfo(dtype).eps)
    # Every other row of a wider tensor, as a part of a projection
    wide = torch.cat([x, x.flip(0)], dim=-1)
    assert torch.equal(norm(wide[..., : shape[-1]]), result)


class Case:
    """What `project` made of some tokens, and the angles of their positions."""

    def __init__(self, dtype=torch.float32, tokens=1, rotated=P, one_angle=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.norm = make_norm(R, dtype)
        self.kv_a = random(B, tokens, R + rotated)
        self.q_rope = random(B, tokens, H, 5 + rotated).transpose(1, 2)[..., 5:]
        angles = torch.randn(1 if one_angle else B, tokens, rotated // 2, generator=generator).to(DEVICE)
        self.cos, self.sin = (torch.cat([part, part], dim=-1).to(dtype) for part in (angles.cos(), angles.sin()))
        self.tokens, self.rotated, self.dtype = tokens, rotated, dtype

    def run(self, latent, k_rope, position, start, interleave=True):
        norm = self.norm
        assert rows_triton.latent_rows_refusal(self.kv_a, norm, self.q_rope, self.cos, self.sin) is None
        arguments = (self.kv_a, norm.weight, norm.variance_epsilon, self.q_rope, self.cos, self.sin, interleave)
        return OPS.latent_rows(*arguments, latent, k_rope, position, start)

    def plain(self, dtype, interleave=True):
        """Queries, latents and rotary keys by PyTorch's operations."""
        with selection.use(attention="torch", linear="torch"):
            latent, k_rope = self.kv_a.to(dtype).split([R, self.rotated], dim=-1)
            cos, sin = self.cos.to(dtype), self.sin.to(dtype)
            return (
                rotate(self.q_rope.to(dtype), cos, sin, interleave),
                copy.deepcopy(self.norm).to(dtype)(latent).unsqueeze(1),
                rotate(k_rope.unsqueeze(1), cos, sin, interleave),
            )


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", [{}, {"tokens": 3}, {"tokens": 2, "rotated": 2, "one_angle": True}], ids=str)
def test_rows_are_normalised_rotated_and_written(shape, dtype, interleave):
    """At a place that the host knows and at one that the device knows, and nothing beside it."""
    case = Case(dtype, **shape)
    exact, plain = case.plain(torch.float64, interleave), case.plain(dtype, interleave)
    for position, start in ((None, 4), (torch.tensor(4, device=DEVICE), 0), (torch.tensor(1, device=DEVICE), 3)):
        caches = [torch.full((B, 1, 10, width), math.nan, device=DEVICE, dtype=dtype) for width in (R, case.rotated)]
        q_rope = case.run(*caches, position, start, interleave)
        results = (q_rope, *(cache[:, :, 4 : 4 + case.tokens] for cache in caches))
        for result, true, its in zip(results, exact, plain):
            no_worse(result, true, its, torch.finfo(dtype).eps)
        for cache in caches:
            assert cache[:, :, :4].isnan().all() and cache[:, :, 4 + case.tokens :].isnan().all()


def test_nothing_is_written_behind_a_cache():
    case = Case(tokens=3)
    memory = [torch.zeros(B, 1, 10, width, device=DEVICE) for width in (R, P)]
    case.run(*(m[:, :, :6] for m in memory), torch.tensor(5, device=DEVICE), 0)
    for m in memory:
        assert m[:, :, 5].any() and not m[:, :, 6:].any()
    with pytest.raises(ValueError, match="do not fit"):
        case.run(*(m[:, :, :6] for m in memory), None, 4)


def test_places_in_caches(tiny_config):
    """Those of Transformers' own layers, kept count of as it does; none in other classes."""
    config = tiny_config()
    latent, k_rope = torch.randn(B, 1, 5, R, device=DEVICE), torch.randn(B, 1, 5, P, device=DEVICE)
    token = torch.zeros(B, 1, R + P, device=DEVICE)
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        assert next_place(cache, token, LAYER) is None  # is not initialised
        cache.update(latent, k_rope, LAYER)
        assert next_place(cache, token.double(), LAYER) is None
        place = next_place(cache, token, LAYER)
        assert int(place.start + (0 if place.position is None else place.position)) == 5
        place.keys[:, :, 5], place.values[:, :, 5] = 1.0, 2.0
        keys, values = place.take(1)
        assert int(cache.get_seq_length()) == 6
        assert torch.equal(keys[:, :, :5], latent) and (keys[:, :, 5] == 1).all() and (values[:, :, 5] == 2).all()
        assert keys.shape[2] == (8 if place.position is not None else 6)
        # Transformers goes on where the kernel left off
        keys, _ = cache.update(latent[:, :, :1], k_rope[:, :, :1], LAYER)
        assert torch.equal(keys[:, :, 6], latent[:, :, 0]) and int(cache.get_seq_length()) == 7
    assert next_place(None, token, LAYER) is None

    class OwnCache(StaticCache):
        """May keep its tensors elsewhere."""

    class OwnLayer(StaticLayer):
        pass

    own, with_own_layer = OwnCache(config=config, max_cache_len=8), StaticCache(config=config, max_cache_len=8)
    with_own_layer.layers[LAYER] = OwnLayer(max_cache_len=8)
    for cache in (own, with_own_layer):
        cache.update(latent, k_rope, LAYER)
        assert next_place(cache, token, LAYER) is None and filled_positions(cache, LAYER) is None


def test_what_is_not_for_it_is_refused(make_model):
    case = Case()
    arguments = (case.kv_a, case.q_rope, case.cos, case.sin)
    assert "plain norms" in rows_triton.latent_rows_refusal(arguments[0], torch.nn.LayerNorm(R), *arguments[1:])
    hooked = copy.deepcopy(case.norm)
    hooked.register_forward_hook(lambda *a: None)
    assert "hooks" in rows_triton.latent_rows_refusal(arguments[0], hooked, *arguments[1:])
    assert "dtype" in rows_triton.latent_rows_refusal(arguments[0], case.norm, arguments[1], case.cos.half(), case.sin)
    with torch.enable_grad():
        assert "has no gradients" in rows_triton.latent_rows_refusal(arguments[0], case.norm, *arguments[1:])
        assert "has no gradients" in rows_triton.rms_norm_refusal(case.kv_a[..., :R], case.norm.weight)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert "autocast" in rows_triton.latent_rows_refusal(arguments[0], case.norm, *arguments[1:])
        assert "autocast" in rows_triton.rms_norm_refusal(case.kv_a, case.norm.weight)
    assert "rows of 16384" in rows_triton.rms_norm_refusal(torch.zeros(1, 20000, device=DEVICE), case.norm.weight)
    with selection.use(attention="torch", linear="torch"):
        assert "as chosen" in rows_triton.latent_rows_refusal(arguments[0], case.norm, *arguments[1:])
        assert "as chosen" in rows_triton.rms_norm_refusal(case.kv_a, case.norm.weight)


def test_operators_are_well_formed():
    case = Case()
    torch.library.opcheck(OPS.rms_norm_triton.default, (case.kv_a[..., :R], case.norm.weight, 1e-5))
    caches = [torch.zeros(B, 1, 6, width, device=DEVICE) for width in (R, P)]
    arguments = (case.kv_a, case.norm.weight, 1e-5, case.q_rope, case.cos, case.sin, True, *caches)
    torch.library.opcheck(OPS.latent_rows.default, (*arguments, None, 2))
    torch.library.opcheck(OPS.latent_rows.default, (*arguments, torch.tensor(2, device=DEVICE), 0))


def test_errors_of_shape_are_told():
    case = Case()
    caches = [torch.zeros(B, 1, 6, width, device=DEVICE) for width in (R, P)]
    arguments = [case.kv_a, case.norm.weight, 1e-5, case.q_rope, case.cos, case.sin, True, *caches, None, 2]
    for place, wrong in ((0, case.kv_a[:1]), (1, case.kv_a[0, 0]), (3, case.q_rope.half()), (8, caches[0])):
        with pytest.raises(ValueError, match="dense rows"):
            OPS.latent_rows(*(wrong if i == place else argument for i, argument in enumerate(arguments)))
