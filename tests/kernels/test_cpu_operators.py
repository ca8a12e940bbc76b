"""What PyTorch asks of every compiled operator: its schema, shapes without data, gradients, tracing.

None of it depends on the instruction set, so that these run on the best one alone.
"""

import pytest
import torch

from tests.kernels import test_cpu_attention, test_cpu_mixture
from transformers_dsv3.kernels.cpu import dequantize


pytestmark = pytest.mark.usefixtures("compiled", "poisoned")

ops = torch.ops.transformers_dsv3


def opcheck(operator, *arguments):
    torch.library.opcheck(operator.default if hasattr(operator, "default") else operator, arguments)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_linear(quantize, bits):
    weight, scale = quantize(torch.randn(6, 32), bits) if bits else (torch.randn(6, 32), None)
    opcheck(ops.linear, torch.randn(2, 3, 32), weight, scale, torch.randn(6), False)


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize(quantize, bits):
    opcheck(dequantize.operator, *quantize(torch.randn(5, 64), bits), torch.bfloat16)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention(mask):
    case = test_cpu_attention.Case().make_mask(mask)
    queries = case.q_nope, case.q_rope
    opcheck(ops.attention_absorbed, *queries, case.latent, case.k_rope, case.w, case.mask, case.scaling)
    opcheck(ops.attention_expanded, *queries, case.kv, case.k_rope, case.mask, 0, case.scaling)


@pytest.mark.parametrize("kind", ["fp32", "q8 rounded", "q4 rounded"])
def test_mixture(quantize, stands_for, kind):
    made = test_cpu_mixture.Case(quantize, stands_for, kind, torch.float32)
    w = made.weights.get
    opcheck(
        ops.mixture,
        *(made.x, w("gate_up"), w("gate_up_scale"), w("down"), w("down_scale"), made.expert, made.weight),
        *(w("shared_gate"), w("shared_gate_scale"), w("shared_up"), w("shared_up_scale")),
        *(w("shared_down"), w("shared_down_scale"), True),
    )


def test_route():
    opcheck(ops.route, torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), 2, 1, 2, True, 1.5)


def test_rms_norm_and_rotate():
    opcheck(ops.rms_norm, torch.randn(1, 3, 8), torch.randn(8), 1e-6)
    angles = torch.randn(1, 4, 8)
    opcheck(ops.rotate, torch.randn(2, 3, 4, 8), angles, angles, True)
