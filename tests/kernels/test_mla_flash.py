"""FlashMLA and FlashAttention 3 on latents: what they are called with, on stand-ins that check what their sources do.

The stand-ins have the packages' own signatures and conditions (FlashMLA's csrc/api/dense_decode.h, FlashAttention's
hopper/flash_api.cpp) and compute in plain PyTorch. What the packages' own programs compute is not tested here.
"""

import importlib.util
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.fake_gpu import fake_gpu
from transformers_dsv3.kernels import mla_flash, public_kernels, selection
from transformers_dsv3.models.dsv3 import attention_dsv3


NAMES = tuple(mla_flash.PACKAGES)
PAGE = 64


def attend(q_BQHX, k_BSX, values, lengths_B, scale):
    """Rows that may attend to the first positions of their sequence only, in fp32 as both packages compute.

    Values behind are multiplied by 0, as the packages' tiles may: what is not a number there stays so.
    """
    scores = torch.einsum("bqhx,bsx->bhqs", q_BQHX.float(), k_BSX.float()) * scale
    behind = torch.arange(k_BSX.shape[1], device=k_BSX.device) >= lengths_B[:, None, None, None]
    weights = scores.masked_fill(behind, -torch.inf).softmax(-1)
    return torch.einsum("bhqs,bsr->bqhr", weights, values.float())


class FlashMLA(types.ModuleType):
    """`get_mla_metadata` and `flash_mla_with_kvcache`."""

    class Schedule:
        pass

    def __init__(self):
        super().__init__("flash_mla")
        self.calls = []

    def get_mla_metadata(self, *args, **kwargs):
        lengths, rows, heads_k = args  # the arguments that earlier releases need
        assert lengths.dtype == torch.int32 and isinstance(rows, int) and heads_k == 1
        return self.Schedule(), None

    def flash_mla_with_kvcache(
        self,
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
    ):
        assert isinstance(tile_scheduler_metadata, self.Schedule) and num_splits is None
        assert q.dtype == k_cache.dtype and q.dtype in (torch.bfloat16, torch.float16)
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        assert q.stride(-1) == k_cache.stride(-1) == block_table.stride(-1) == 1 and cache_seqlens.is_contiguous()
        batch, _, heads, width = q.shape
        assert width == 576 and head_dim_v == 512
        assert k_cache.shape[1:] == (PAGE, 1, width)
        assert cache_seqlens.shape == (batch,) and block_table.shape[0] == batch
        assert not causal
        self.calls.append((q.shape, k_cache.shape))
        pages_BMX = k_cache.squeeze(2)[block_table.long()].flatten(1, 2)
        out = attend(q, pages_BMX, pages_BMX[..., :head_dim_v], cache_seqlens, softmax_scale)
        return out.to(q.dtype), q.new_empty(batch, heads, q.shape[1], dtype=torch.float32)


class FlashAttention3(types.ModuleType):
    """`flash_attn_with_kvcache`, without the arguments that this package leaves alone."""

    def __init__(self):
        super().__init__("flash_attn_interface")
        self.calls = []

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, softmax_scale=None, causal=False
    ):
        assert q.dtype == k_cache.dtype == v_cache.dtype == qv.dtype and q.dtype in (torch.bfloat16, torch.float16)
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == qv.stride(-1) == 1
        batch, queries, heads, width = q.shape
        positions, rank = v_cache.shape[1], v_cache.shape[-1]
        assert width <= 64 and width % 8 == 0 and 256 <= rank <= 512 and rank % 8 == 0
        assert k_cache.shape == (batch, positions, 1, width) and v_cache.shape == (batch, positions, 1, rank)
        assert qv.shape == (batch, queries, heads, rank)
        if cache_seqlens is None:
            cache_seqlens = torch.full((batch,), positions, dtype=torch.int32, device=q.device)
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous() and cache_seqlens.shape == (batch,)
        assert not causal and k is None and v is None
        self.calls.append((q.shape, v_cache.data_ptr() if v_cache.device.type == "cpu" else None))
        keys = torch.cat([v_cache, k_cache], dim=-1).squeeze(2)
        out = attend(torch.cat([qv, q], dim=-1), keys, v_cache.squeeze(2), cache_seqlens, softmax_scale)
        return out.to(q.dtype)


STAND_INS = {"flash_mla": FlashMLA, "flash_attention_3_mla": FlashAttention3}


@pytest.fixture
def hopper(monkeypatch):
    """Every device passes for a Hopper GPU, and nothing that was loaded is remembered."""
    monkeypatch.setattr(mla_flash, "nvidia_refusal", lambda device: None)
    monkeypatch.setattr(mla_flash, "_capability", lambda index: (9, 0))
    mla_flash._loaded.cache_clear()
    yield
    mla_flash._loaded.cache_clear()


@pytest.fixture
def install(hopper, monkeypatch):
    """Function from a choice to its package's stand-in, which is importable from then on."""

    def install(name):
        package = STAND_INS[name]()
        package.__spec__ = types.SimpleNamespace()  # what find_spec asks for
        monkeypatch.setitem(sys.modules, package.__name__, package)
        return package

    return install


def inputs(B=2, H=3, Q=1, S=70, R=512, P=64, N=16, V=24, dtype=torch.bfloat16, device="cpu", seed=0):
    generator = None if device != "cpu" else torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    # Query and cache as the model hands them over: views of larger tensors
    query = normal(B, Q, H, N + P).transpose(1, 2)
    q_nope, q_rope = query.split([N, P], dim=-1)
    latent, k_rope = normal(B, 1, S, R), normal(B, 1, S, P)
    return q_nope, q_rope, latent.squeeze(1), k_rope.squeeze(1), normal(H * (N + V), R) / R**0.5


def reference(arguments, scaling, lengths=None):
    q_nope, q_rope, latent, k_rope, kv_b = (x.double() for x in arguments)
    mask = None
    if lengths is not None:
        mask = (torch.arange(latent.shape[1]) < lengths[:, None])[:, None, None]
    return attention_dsv3.absorbed_attention(q_nope, q_rope, latent, k_rope, kv_b, mask, scaling)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [{}, {"S": 64}, {"S": 1}, {"B": 1, "H": 1, "S": 129}, {"Q": 3, "H": 5}, {"dtype": torch.float16}]
)
def test_outputs_equal_the_reference(name, shape, install, poisoned):
    package = install(name)
    arguments = inputs(**shape)
    with selection.use(attention=name):
        assert mla_flash.absorbed_refusal(arguments[0], *arguments[2:], None) is None
        output = mla_flash.absorbed_attention(*arguments, None, 0.05)
    assert len(package.calls) == 1
    exact = reference(arguments, 0.05)
    plain = attention_dsv3.absorbed_attention(*arguments, None, 0.05)[0]
    assert output.shape == exact.shape and output.dtype == arguments[0].dtype
    error, its_error = ((x.double() - exact).abs().max() for x in (output, plain))
    assert error <= 2 * its_error + 1e-3 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("filled", [torch.tensor(65), torch.tensor([3, 70]), torch.tensor([64, 1], dtype=torch.int32)])
def test_positions_behind_the_filled_are_not_attended(name, filled, install, poisoned):
    """A static cache may hold any numbers there."""
    install(name)
    arguments = inputs()
    lengths = filled.expand(2)
    for row, length in enumerate(lengths.tolist()):
        arguments[2][row, length:] = -50
        arguments[3][row, length:] = 100
    with selection.use(attention=name):
        output = mla_flash.absorbed_attention(*arguments, None, 0.05, filled)
    torch.testing.assert_close(output.double(), reference(arguments, 0.05, lengths), rtol=0.05, atol=0.02)


def test_flash_attention_3_reads_the_cache_where_it_lies(install):
    package = install("flash_attention_3_mla")
    arguments = inputs()
    with selection.use(attention="flash_attention_3_mla"):
        mla_flash.absorbed_attention(*arguments, None, 0.05)
    assert package.calls[0][1] == arguments[2].data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_for_them_is_refused(name, install):
    install(name)
    q_nope, _, latent, k_rope, kv_b = inputs()
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)

    def refusal(q_nope=q_nope, latent=latent, k_rope=k_rope, kv_b=kv_b, mask=None):
        return mla_flash.absorbed_refusal(q_nope, latent, k_rope, kv_b, mask)

    assert "as chosen" in refusal()  # `auto` leaves them out
    with selection.use(attention=name):
        assert refusal() is None
        assert "takes no mask" in refusal(mask=mask)
        assert "not torch.float32" in refusal(q_nope.float(), latent.float(), k_rope.float(), kv_b.float())
        assert "takes latents of" in refusal(latent=latent[..., :128])
        assert "takes rotary keys of" in refusal(k_rope=k_rope[..., :20])
        assert "dtype" in refusal(latent=latent.half())
        assert "dtype" in refusal(kv_b=kv_b.to(torch.int8))
        assert "contiguous" in refusal(latent=latent.transpose(1, 2).contiguous().transpose(1, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast" in refusal()
        assert "has no gradients" in refusal(kv_b=torch.nn.Parameter(kv_b))
        with torch.no_grad():
            assert refusal(kv_b=torch.nn.Parameter(kv_b)) is None
    with selection.use(attention="torch"):
        assert "as chosen" in refusal()


@pytest.mark.parametrize("name", NAMES)
def test_other_devices_are_refused(name, monkeypatch):
    arguments = inputs()
    said = []
    monkeypatch.setattr(mla_flash.logger, "warning_once", said.append)
    with selection.use(attention=name):
        assert mla_flash.absorbed_refusal(arguments[0], *arguments[2:], None) == "needs a GPU"
    assert said == [f"attention={name} does not serve a call: it needs a GPU."]
    monkeypatch.setattr(mla_flash, "_capability", lambda index: (8, 0))
    cuda = torch.device("cuda", 0)
    assert "this one has 8.0" in mla_flash._device_refusal(cuda)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert mla_flash._device_refusal(cuda) == "is for NVIDIA's GPUs"


@pytest.mark.parametrize("name", NAMES)
def test_packages_that_are_missing_broken_or_too_old(name, hopper, monkeypatch):
    package = mla_flash.PACKAGES[name]
    monkeypatch.setattr(public_kernels, "is_kernels_available", lambda: False)
    missing = mla_flash._load_refusal(name)
    assert "is not installed (github.com/" in missing and 'pip install "kernels>=' in missing
    monkeypatch.setenv("USE_HUB_KERNELS", "NO")
    assert "USE_HUB_KERNELS" in mla_flash._package_refusal(name)

    broken = types.ModuleType(package.module)
    broken.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, package.module, broken)
    mla_flash._loaded.cache_clear()
    assert "could not be loaded (AttributeError" in mla_flash._load_refusal(name)
    setattr(broken, package.function, lambda q, k_cache, v_cache: None)
    mla_flash._loaded.cache_clear()
    assert "without multi-head latent attention" in mla_flash._load_refusal(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_is_asked_once_and_only_when_a_call_comes(name, hopper, monkeypatch):
    from transformers.integrations import hub_kernels

    asked = []

    def get_kernel(repository, version):
        asked.append((repository, version))
        return STAND_INS[name]()

    monkeypatch.setattr(public_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    assert mla_flash._package_refusal(name) is None and not asked
    arguments = inputs()
    mla_flash.absorbed_refusal(arguments[0], *arguments[2:], None)  # not what was chosen
    assert not asked
    with selection.use(attention=name):
        for _ in range(2):
            assert mla_flash.absorbed_refusal(arguments[0], *arguments[2:], None) is None
    assert asked == [(mla_flash.PACKAGES[name].repository, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_no_call_waits_for_the_gpu(name, install):
    """Whatever would read a value raises: CUDA graphs can hold the calls."""
    install(name)
    kernel = {"flash_mla": mla_flash._flash_mla, "flash_attention_3_mla": mla_flash._flash_attention_3_mla}[name]
    with fake_gpu(), torch.no_grad():
        arguments = inputs(device="cuda")
        filled = torch.ones((), dtype=torch.int64, device="cuda")
        with selection.use(attention=name):
            assert mla_flash.absorbed_refusal(arguments[0], *arguments[2:], None) is None
            assert mla_flash.absorbed_attention(*arguments, None, 0.05, filled).shape == (2, 1, 3, 24)
        _, q_rope, latent, k_rope, _ = arguments
        q_latent = torch.empty(2, 1, 3, 512, dtype=torch.bfloat16, device="cuda")
        for lengths in (None, torch.empty(2, dtype=torch.int32, device="cuda")):
            out = kernel(q_latent, q_rope.transpose(1, 2), latent, k_rope, lengths, 0.05)
            assert out.shape == (2, 1, 3, 512) and out.is_cuda
        with pytest.raises(DataDependentOutputException):
            filled.item()


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_well_formed(name, install):
    install(name)
    q_nope, q_rope, latent, k_rope, _ = inputs()
    q_latent = torch.randn(2, 1, 3, 512).bfloat16()
    operator = getattr(torch.ops.transformers_dsv3, name).default
    for lengths in (None, torch.tensor([70, 3], dtype=torch.int32)):
        torch.library.opcheck(operator, (q_latent, q_rope.transpose(1, 2), latent, k_rope, lengths, 0.05))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole(name, install):
    install(name)
    arguments = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*arguments):
        if mla_flash.absorbed_refusal(arguments[0], *arguments[2:], None) is not None:
            raise RuntimeError("refused")
        return mla_flash.absorbed_attention(*arguments, None, 0.05)

    with selection.use(attention=name), torch.no_grad():
        torch.testing.assert_close(step(*arguments), mla_flash.absorbed_attention(*arguments, None, 0.05))


@pytest.mark.parametrize("name", NAMES)
def test_models_decode_by_the_one_that_was_chosen(name, install, make_model, monkeypatch):
    package = install(name)
    model = make_model(kv_lora_rank=512, qk_rope_head_dim=64).to(torch.bfloat16)
    tokens = torch.arange(2, 26).view(2, 12)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    with selection.use(attention="torch"):
        plain = model.generate(tokens, **settings)
    assert not package.calls
    with selection.use(attention=name):
        chosen = model.generate(tokens, **settings)
    # The first token is of the prefill
    assert len(package.calls) == 3 * model.config.num_hidden_layers
    torch.testing.assert_close(chosen.logits[1], plain.logits[1], rtol=0.05, atol=0.05)

    # Prompts padded on the left need a mask: said once, served by others
    said = []
    monkeypatch.setattr(mla_flash.logger, "warning_once", said.append)
    package.calls.clear()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with selection.use(attention=name):
        padded = model.generate(tokens, attention_mask=mask, **settings)
    assert not package.calls and "takes no mask" in said[0]
    with selection.use(attention="torch"):
        wanted = model.generate(tokens, attention_mask=mask, **settings)
    torch.testing.assert_close(padded.logits[1], wanted.logits[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("filled", [None, torch.tensor([3, 1000])])
def test_the_package_itself(name, filled):
    """Where it is installed and the GPU is one of its own."""
    if not torch.cuda.is_available() or importlib.util.find_spec(mla_flash.PACKAGES[name].module) is None:
        pytest.skip(f"needs a GPU and {mla_flash.PACKAGES[name].source}")
    arguments = inputs(S=1000, H=16)
    given = [x.cuda() for x in arguments]
    with selection.use(attention=name):
        if (reason := mla_flash.absorbed_refusal(given[0], *given[2:], None)) is not None:
            pytest.skip(f"{name} {reason}")
        output = mla_flash.absorbed_attention(*given, None, 0.05, None if filled is None else filled.cuda())
    torch.testing.assert_close(output.double().cpu(), reference(arguments, 0.05, filled), rtol=0.05, atol=0.02)
