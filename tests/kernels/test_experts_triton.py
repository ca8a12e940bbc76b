"""Triton's programs for experts, on a GPU where there is one and interpreted elsewhere, against float64."""

import pytest
import torch

from tests.kernels.test_experts_grouped import choose, error, exact, inputs_for, make_experts
from transformers_dsv3.kernels import experts_auto, experts_triton


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter takes the bits of bf16 for whole numbers when it multiplies
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def served(experts, hidden, index, weights):
    assert experts_triton.experts_refusal(experts, hidden, weights) is None
    return experts_triton.triton_experts(experts, hidden, index, weights)


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (HALF, 5e-3 if DEVICE == "cuda" else 1e-3)])
@pytest.mark.parametrize("tokens, num_experts, top_k, among, dims", [
    (1, 8, 3, range(8), (80, 72)),
    (40, 5, 2, [0, 1, 3, 4, 5], (33, 17)),  # expert 2 idle, index 5 of another rank
    (50, 4, 1, [2], (40, 24)),
    (200, 4, 3, range(4), (64, 32)),
])  # fmt: skip
def test_outputs(tokens, num_experts, top_k, among, dims, dtype, allowed, poisoned):
    experts = make_experts(num_experts, *dims, dtype)
    hidden, weights = inputs_for(experts, tokens, top_k, dtype, weights_dtype=torch.float32)
    index = choose(tokens, top_k, list(among), power=1.0)
    expected = exact(experts, hidden, index, weights)[0]
    with torch.no_grad():
        output = served(experts.to(DEVICE), hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))
    assert output.dtype == dtype and error(output.cpu(), expected) <= allowed


def test_chosen_by_name_for_a_whole_model(make_model, monkeypatch):
    model = make_model().to(DEVICE)
    tokens = torch.arange(1, 8, device=DEVICE)[None]
    calls = []
    original = experts_triton.triton_experts
    monkeypatch.setattr(experts_auto.experts_triton, "triton_experts", lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(tokens).logits
        assert not calls
        model.set_experts_implementation("triton")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls
