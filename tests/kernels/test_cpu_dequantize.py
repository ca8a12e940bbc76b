"""Quantised weights turned to bf16 for many rows: values beside float64, results beside the others', when it serves.

Processors without matrix units leave it out by themselves; here it is asked for on every one.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3 import quantize as quantize_model
from transformers_dsv3.kernels import backends, dispatch
from transformers_dsv3.kernels.cpu import dequantize, library, linear
from transformers_dsv3.kernels.cpu.linear import Rows


pytestmark = pytest.mark.usefixtures("compiled")


@settings(max_examples=40)
@given(
    bits=st.sampled_from([8, 4]),
    N=st.integers(1, 70),
    groups=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_values_are_what_the_weights_stand_for(isa, poisoned, quantize, stands_for, bits, N, groups, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, 32 * groups, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (N, 1), generator=generator
    )
    values, scale = quantize(weight, bits)
    exact = stands_for(values, scale)
    assert torch.equal(dequantize.operator(values, scale, dtype), exact.to(torch.float32).to(dtype))


def test_wrong_arguments_are_named(quantize):
    values, scale = quantize(torch.randn(4, 64), 8)
    for wrong, said in (
        ((values.float(), scale), "values is torch.float32"),
        ((values[:, :32], scale), "values is of shape"),
        ((values.t().contiguous().t(), scale), "values is not contiguous"),
        ((values, scale.float()), "the scale of values is torch.float32"),
    ):
        with pytest.raises(ValueError, match=said):
            dequantize.operator(*wrong, torch.bfloat16)


@pytest.fixture
def on_matrix_units(monkeypatch):
    """As where bf16 products are fast from the third row of a matrix, and second of an expert, on."""
    for dtype in (torch.int8, torch.uint8):
        monkeypatch.setitem(linear.MOST_ROWS, dtype, Rows(2, 1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tiles", [True, False])
def test_many_rows_meet_bf16_weights(make_model, on_matrix_units, monkeypatch, bits, tiles):
    library.instruction_set()
    if tiles and not library.has_tiles():
        pytest.skip("has no products on matrix units here")
    if not tiles:
        monkeypatch.setattr(library, "in_use", "portable")  # as where PyTorch alone has such products
    fields = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32}
    model = make_model(**fields, kv_lora_rank=32, num_attention_heads=4, v_head_dim=8).bfloat16().eval()
    quantize_model(model, bits=bits, activations="16")
    served = []
    expected = (backends.LINEAR, backends.MLP, backends.MIXTURE) if tiles else (backends.LINEAR, backends.EXPERTS)
    for operation in (backends.LINEAR, backends.MLP, backends.MIXTURE, backends.EXPERTS):
        backend = operation["cpu_bf16"]
        function = backend.function
        spy = lambda *a, f=function, name=operation.name: served.append(name) or f(*a)  # noqa: E731
        monkeypatch.setattr(backend, "function", spy)
    ids = torch.randint(5, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        widened = model(ids).logits
        assert {operation.name for operation in expected} == set(served)
        served.clear()
        for dtype in (torch.int8, torch.uint8):
            monkeypatch.delitem(linear.MOST_ROWS, dtype)
        compiled = model(ids).logits
    assert not served
    torch.testing.assert_close(widened, compiled, rtol=0.05, atol=0.05 * compiled.abs().max().item())


def test_few_rows_and_fp32_are_left_to_others(quantize, on_matrix_units):
    values, scale = quantize(torch.randn(8, 64), 4)
    layer = torch.nn.Identity().eval()
    with torch.no_grad():
        asked = lambda x: [  # noqa: E731
            dispatch.refusal_of_call(backends.LINEAR, backends.LINEAR[name], layer, x, values, scale, None, True)
            for name in ("cpu", "cpu_bf16")
        ]
        few, many = asked(torch.randn(2, 64).bfloat16()), asked(torch.randn(3, 64).bfloat16())
        assert few[0] is None and "pays up to 2 rows" in many[0] and many[1] is None
        of_fp32 = asked(torch.randn(3, 64))
        assert of_fp32[0] is None and "not for torch.float32" in of_fp32[1]
