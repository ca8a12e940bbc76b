"""A tensor whose storage was freed or cut, as FSDP1 does with parameters, is an error of Python, not of memory."""

import pytest
import torch
from transformers import DynamicCache

from transformers_dsv3.kernels.cpu import attention, dequantize, linear, mixture, project, router, rows
from transformers_dsv3.kernels.cpu.operators import GROUP


pytestmark = pytest.mark.usefixtures("compiled")

D, E, K, S, L, R, P, N, V, H, B, Q = 32, 4, 2, 16, 24, 16, 8, 16, 16, 2, 1, 3


def _dense(*shape):
    return torch.randn(*shape)


def _rows_of_wider(*shape):
    """Rows that are the first part of longer ones: not contiguous."""
    return torch.randn(*shape[:-1], shape[-1] + 8)[..., : shape[-1]]


def _int8(*shape):
    return torch.randint(-127, 127, shape, dtype=torch.int8)


def _scales(*shape):
    return torch.rand(*shape[:-1], shape[-1] // GROUP).half()


def _project(*tensors):
    *before, cos, sin = tensors
    x, q_a, q_a_bias, q_norm, q_b, kv_a, kv_a_bias, kv_norm = before
    return (
        *(x, q_a, None, q_a_bias, q_norm, 1e-6, q_b, None, kv_a, None, kv_a_bias, kv_norm, 1e-6),
        *(cos, sin, True, H, False),
    )


def _mixture(x, gate_up, down, expert, weight, gate, up, shared_down):
    return x, gate_up, None, down, None, expert, weight, gate, None, up, None, shared_down, None, False


def _quantised(x, *tensors):
    gate_up, gate_up_scale, down, down_scale, expert, weight = tensors
    return x, gate_up, gate_up_scale, down, down_scale, expert, weight, *[None] * 6, False


EXPERTS = (lambda: torch.randint(0, E, (Q, K)), lambda: torch.rand(Q, K))
# Name: operator, what it calls without PyTorch's dispatcher, its tensors, and how they are its arguments
OPERATORS = {
    "linear": (
        linear.operator,
        linear.linear,
        [lambda: _rows_of_wider(Q, D), lambda: _dense(S, D), lambda: _dense(S)],
        lambda x, weight, bias: (x, weight, None, bias, False),
    ),
    "linear of int8": (
        linear.operator,
        linear.linear,
        [lambda: _dense(Q, D), lambda: _int8(S, D), lambda: _scales(S, D)],
        lambda x, weight, scale: (x, weight, scale, None, False),
    ),
    "dequantize": (
        dequantize.operator,
        dequantize._dequantize,
        [lambda: _int8(S, D), lambda: _scales(S, D)],
        lambda values, scale: (values, scale, torch.bfloat16),
    ),
    "mixture": (
        mixture.operator,
        mixture._mixture,
        [
            *(lambda: _dense(Q, D), lambda: _dense(E, 2 * S, D), lambda: _dense(E, D, S), *EXPERTS),
            *(lambda: _dense(L, D), lambda: _dense(L, D), lambda: _dense(D, L)),
        ],
        _mixture,
    ),
    "mixture of int8": (
        mixture.operator,
        mixture._mixture,
        [
            *(lambda: _dense(Q, D), lambda: _int8(E, 2 * GROUP, D), lambda: _scales(E, 2 * GROUP, D)),
            *(lambda: _int8(E, D, GROUP), lambda: _scales(E, D, GROUP), *EXPERTS),
        ],
        _quantised,
    ),
    "project": (
        project.operator,
        project._project,
        [
            *(lambda: _dense(B, Q, D), lambda: _dense(L, D), lambda: _dense(L), lambda: _dense(L)),
            *(lambda: _dense(H * (N + P), L), lambda: _dense(R + P, D), lambda: _dense(R + P), lambda: _dense(R)),
            *(lambda: _dense(1, Q, P), lambda: _dense(1, Q, P)),
        ],
        _project,
    ),
    "route": (
        router.operator,
        router.route,
        [lambda: _rows_of_wider(Q, D), lambda: _dense(E, D), lambda: _dense(E)],
        lambda x, weight, bias: (x, weight, bias, 1, 1, K, True, 1.0),
    ),
    "rms_norm": (
        rows.rms_norm_operator,
        rows.rms_norm,
        [lambda: _rows_of_wider(B, Q, D), lambda: _dense(D)],
        lambda x, weight: (x, weight, 1e-6),
    ),
    "rotate": (
        rows.rotate_operator,
        rows.rotate,
        [lambda: _dense(B, Q, H, P).transpose(1, 2), lambda: _dense(B, Q, P), lambda: _dense(B, Q, P)],
        lambda x, cos, sin: (x, cos, sin, True),
    ),
    "attention_absorbed": (
        attention.absorbed_operator,
        attention.absorbed_attention,
        [
            *(lambda: _dense(B, Q, H, N).transpose(1, 2), lambda: _dense(B, Q, H, P).transpose(1, 2)),
            *(lambda: _rows_of_wider(B, S, R), lambda: _rows_of_wider(B, S, P)),
            *(lambda: _dense(H * (N + V), R), lambda: torch.ones(B, 1, Q, S, dtype=torch.bool)),
        ],
        lambda *tensors: (*tensors, 1.0),
    ),
    "attention_expanded": (
        attention.expanded_operator,
        attention._expanded,
        [
            *(lambda: _dense(B, Q, H, N).transpose(1, 2), lambda: _dense(B, Q, H, P).transpose(1, 2)),
            *(lambda: _rows_of_wider(B, S, H, N + V), lambda: _dense(B, S, P), lambda: _dense(B, 1, Q, S)),
        ],
        lambda *tensors: (*tensors, -1, 1.0),
    ),
}


@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_freed_or_cut_storage_is_refused(name, dispatched):
    operator, function, makers, arguments = OPERATORS[name]
    call = operator if dispatched else function
    call(*arguments(*[make() for make in makers]))  # as it is meant
    for place in range(len(makers)):
        for is_cut in (False, True):
            tensors = [make() for make in makers]
            tensor = tensors[place]
            last = tensor[tuple(n - 1 for n in tensor.shape)]
            end = (last.storage_offset() + 1) * tensor.itemsize
            tensor.untyped_storage().resize_(end - 1 if is_cut else 0)
            with pytest.raises(ValueError, match="freed"):
                call(*arguments(*tensors))


def test_views_that_use_all_of_their_storage_are_taken():
    weight = torch.randn(3, 4, D)
    x = torch.randn(2, D)[1:].expand(5, D)
    result = linear.linear(x, weight[2])
    torch.testing.assert_close(result, (x.double() @ weight[2].double().T).float())
    assert linear.linear(torch.randn(4, D)[4:], weight[2]).shape == (0, 4)


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize("freed", ["self_attn.o_proj.weight", "mlp.experts.down_proj", "input_layernorm.weight", None])
def test_a_step_of_decoding_refuses_what_was_freed_before_or_since_it_was_planned(make_model, freed, is_planned):
    model = make_model()
    layer, token = model.model.layers[-1], torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
        if is_planned or freed is None:
            model(token, past_key_values=cache)
        tensor = cache.layers[-1].keys if freed is None else layer.get_parameter(freed)
        tensor.untyped_storage().resize_(0)
        with pytest.raises((ValueError, RuntimeError)):
            model(token, past_key_values=cache)
