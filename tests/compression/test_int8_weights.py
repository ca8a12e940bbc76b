"""INT8 weights against the exact product with the weights that they stand for."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.compression.int8_weights import Int8Experts, Int8Linear, quantize_int8, quantize_rows
from transformers_dsv3.kernels import selection


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), exponent=st.integers(-20, 20), seed=st.integers(0, 99))
def test_rows_are_rounded_to_the_nearest_of_their_scale(rows, columns, exponent, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 2.0**exponent
    quantized, scale = quantize_rows(weight)
    assert quantized.dtype == torch.int8 and int(quantized.min()) >= -127
    error = (quantized * scale[:, None].double() - weight.double()).abs()
    assert bool((error <= scale[:, None].double() * (0.5 + 1e-4)).all())
    assert bool((quantized.abs().amax(-1) == 127).all())


def test_a_row_of_zeros():
    quantized, scale = quantize_rows(torch.zeros(2, 3))
    assert not quantized.any() and bool((scale == 1).all())
    assert quantize_rows(torch.zeros(2, 0))[1].shape == (2,)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("activations, tolerance", [("bf16", 2e-4), ("int8", 3e-2)])
def test_model_is_that_of_the_rounded_weights(make_model, backend, activations, tolerance):
    """fp32: what is left is the rounding of activations."""
    model = make_model(num_nextn_predict_layers=1).eval()
    exact = copy.deepcopy(model)
    quantize_int8(model, activations)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Int8Experts) > 0 and kinds.count(Int8Linear) > 0
    assert type(model.model.layers[0].self_attn.kv_b_proj) is type(exact.model.layers[0].self_attn.kv_b_proj)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (Int8Linear, Int8Experts)):
                original = exact.get_submodule(name)
                for weight in ("weight", "gate_up_proj", "down_proj"):
                    if hasattr(module, weight):
                        stands_for = getattr(module, weight) * getattr(module, f"{weight}_scale")[..., None]
                        getattr(original, weight).copy_(stands_for)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad(), selection.use(linear=backend, attention=backend):
        if backend == "torch":
            model.set_experts_implementation("eager")
        cache = model(ids, use_cache=True).past_key_values
        ours = model(ids).logits
        step = model(ids[:, :1], past_key_values=cache).logits
        native = exact(ids).logits
    assert torch.isfinite(step).all()
    error = (ours - native).norm() / native.norm()
    assert error <= (1e-5 if backend == "torch" else tolerance)


def test_scales_stay_exact_through_dtype_changes(make_model):
    model = quantize_int8(make_model())
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("_scale")}
    model.to(torch.bfloat16)
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], scale) for name, scale in before.items())
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(2, 9)[None]).logits).all()


def test_generates(make_model):
    model = quantize_int8(make_model(num_nextn_predict_layers=1))
    ids = torch.arange(2, 9)[None]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    drafted = model.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=True)
    assert torch.equal(plain, drafted)


def test_tied_heads_stay(make_model):
    model = quantize_int8(make_model(tie_word_embeddings=True))
    assert model.lm_head.weight.dtype == torch.float32


def test_is_refused_where_it_cannot_work(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="activations is 'bf16' or 'int8', not 'int4'"):
        quantize_int8(model, "int4")
    quantize_int8(model)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_int8(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.safetensors"))
