"""The table of backends: what is decided once, when it is decided anew, and what happens when a backend fails."""

import copy
import ctypes
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import transformers_dsv3
from tests.kernels import decode_step_calls
from transformers_dsv3.kernels import backends, dispatch, explain, selection
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu import linear as cpu_linear
from transformers_dsv3.kernels.cpu.step import STRUCTURES
from transformers_dsv3.models.dsv3 import decoding_dsv3


TOKENS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
OPERATIONS = [value for value in vars(backends).values() if isinstance(value, dispatch.Operation)]


def step(model):
    """Logits of a prefill and of a step of decoding."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [
            model(TOKENS[:, :-1], past_key_values=cache).logits,
            model(TOKENS[:, -1:], past_key_values=cache).logits,
        ]
    return torch.cat(logits, dim=1)


def trained(model):
    model.train()
    model.zero_grad()
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    model.eval()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def model(make_model, monkeypatch):
    monkeypatch.setattr(cpu_linear, "FEWEST_BYTES", 0)  # small models' layers as well
    return make_model(attn_implementation="sdpa", num_nextn_predict_layers=0)


@pytest.fixture
def plain(model):
    """What PyTorch's own operators compute, decoding and gradients."""
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    with selection.use(linear="torch", attention="torch"):
        return step(twin), trained(twin)


BACKENDS = [(o, b) for o in OPERATIONS for b in o.backends if b.function is not None]


@pytest.mark.parametrize("operation, backend", BACKENDS, ids=[f"{o.name}: {b.name}" for o, b in BACKENDS])
def test_a_backend_that_fails_at_first_is_left_out(operation, backend, model, plain, monkeypatch):
    """Whatever it raises is its refusal, said once, and the next one or the plain path serves."""
    said, launched = [], []
    monkeypatch.setattr(dispatch.logger, "warning_once", said.append)
    monkeypatch.setattr(selection, "epoch", selection.epoch)  # grows, and is put back
    for name, value in (("is_proven", False), ("failure", None)):
        monkeypatch.setattr(backend, name, value)

    def fails(*arguments):
        launched.append(1)
        raise OSError("no such instruction")

    monkeypatch.setattr(backend, "function", fails)
    if backend.undispatched is not None:
        monkeypatch.setattr(backend, "undispatched", fails)
    torch.testing.assert_close(step(model), plain[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trained(model), plain[1], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(step(model), plain[0], rtol=1e-3, atol=1e-3)
    assert len(launched) <= 1
    told = [message for message in said if "first launched" in message]
    assert len(told) == len(launched)
    if launched:
        assert backend.name in told[0] and "OSError: no such instruction" in told[0]
        assert "no such instruction" in explain.refusal_of(backend, model)


def test_backends_of_this_processor_are_among_those_tried(model, monkeypatch):
    """Otherwise the test above shows nothing."""
    for _, backend in BACKENDS:
        monkeypatch.setattr(backend, "is_proven", False)
    step(model)
    monkeypatch.setattr(decoding_dsv3, "MOST_TOKENS", 0)  # a program of a step asks no row but its own
    step(model)
    trained(model)
    proven = {f"{o.name}: {b.name}" for o, b in BACKENDS if b.is_proven}
    assert "experts: grouped_cpu" in proven
    if library.unavailable is None:
        assert {"norms: cpu", "attention, absorbed: cpu", "router: cpu", "projections of attention: cpu"} <= proven
        assert "decoding step: program" in proven


def test_gradients_in_evaluation_are_those_of_the_plain_path(model, plain):
    """A row that gives none is not asked there, whatever its own refusal forgets."""
    gave = dispatch.Backend("forgetful", "detaches", function=lambda x, weight, eps: x.detach())
    rows = backends.NORM.backends
    backends.NORM.backends = (gave, *rows)
    try:
        model.eval()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    finally:
        backends.NORM.backends = rows
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients, plain[1], rtol=1e-2, atol=1e-4)
    assert not gave.is_proven


def test_a_row_that_is_asked_is_in_use(model):
    """What serves calls is starred by `explain`, without a list of names beside the table."""
    new = dispatch.Backend("mine", "as torch's own", function=lambda x, weight, eps: x)
    rows = backends.NORM.backends
    backends.NORM.backends = (new, *rows)
    try:
        page = transformers_dsv3.explain(model)
    finally:
        backends.NORM.backends = rows
    assert "  * mine " in page


def test_memory_that_is_lacking_says_nothing_of_a_backend(model, monkeypatch):
    if library.unavailable is not None:
        pytest.skip("needs the compiled CPU backend")
    backend = backends.NORM["cpu"]
    monkeypatch.setattr(backend, "is_proven", False)

    def fails(*arguments):
        raise MemoryError("none left")

    monkeypatch.setattr(backend, "undispatched", fails)
    monkeypatch.setattr(selection, "epoch", selection.epoch + 1)
    with pytest.raises(MemoryError):
        step(model)
    assert backend.failure is None


def test_decisions_are_made_once(model, monkeypatch):
    step(model)
    monkeypatch.setattr(dispatch, "_decide", lambda *a: pytest.fail("decided again"))
    step(model)


CHANGES = {
    "a hook": lambda layer: layer.register_forward_hook(lambda module, args, output: output * 1.5),
    "a forward": lambda layer: setattr(layer, "forward", lambda x: nn.functional.linear(x, layer.weight) * 1.5),
    "the weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 1.5)),
    "the weight's data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 1.5),
    "its strides": lambda layer: setattr(layer.weight, "data", layer.weight.data.t().contiguous().t() * 1.5),
    "its class": lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {"forward": other_forward})),
    "a bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(layer.out_features))),
    "its dtype": lambda layer: (
        setattr(layer, "forward", nn.Linear.forward.__get__(layer)) or layer.weight.data.mul_(1.5)
    ),
}


def other_forward(self, x):
    return nn.functional.linear(x, self.weight) * 1.5


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["self_attn.kv_a_proj_with_mqa", "self_attn.o_proj", "mlp.shared_experts.up_proj"])
def test_decisions_lapse_with_what_they_rest_on(model, name, change):
    """As on a copy that is changed before anything was decided."""
    fresh = copy.deepcopy(model)
    before = step(model)
    for each in (model, fresh):
        CHANGES[change](each.model.layers[1].get_submodule(name))
    changed = step(model)
    with selection.use(linear="torch", attention="torch"):
        fresh.set_experts_implementation("eager")
        torch.testing.assert_close(changed, step(fresh), rtol=1e-3, atol=1e-3)
    assert (changed - before).abs().max() > 1e-3


def test_decisions_keep_no_model_alive(make_model):
    model = make_model(num_nextn_predict_layers=0)
    model.model.layers[0].self_attn.o_proj.weight.register_hook(lambda grad, model=model: grad)
    step(model)
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None


def test_models_are_pickled_without_decisions(make_model):
    model = make_model(num_nextn_predict_layers=0)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    step(model)
    assert names == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.skipif(library.unavailable is not None, reason="needs the compiled CPU backend")
def test_calls_of_a_decoding_step():
    """Python's own cost: what is decided once is not asked at every step."""
    assert decode_step_calls.count().total() <= 50


HEADER = Path(transformers_dsv3.__path__[0], "kernels", "csrc", "dsv3.h")
C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "ptrdiff_t": ctypes.c_int64, "float": ctypes.c_float}


@pytest.mark.skipif(not HEADER.exists(), reason="needs the source tree")
def test_prototypes_are_what_ctypes_is_told():
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.S)
    prototypes = dict(re.findall(r"(dsv3_\w+)\(([^)]*)\);", text))
    declared = {name for name, arguments in prototypes.items() if arguments.strip() != "void"}
    assert declared == set(library.SIGNATURES)
    for name, types in library.SIGNATURES.items():
        expected = []
        for argument in prototypes[name].split(","):
            if "char *" in argument:
                expected.append(ctypes.c_char_p)
            elif "*" in argument:
                expected.append(ctypes.c_void_p)
            else:
                expected.append(C_TYPES[argument.split()[-2]])
        assert types == expected, name


@pytest.mark.skipif(not HEADER.exists(), reason="needs the source tree")
@pytest.mark.skipif(library.unavailable is not None, reason="needs the compiled CPU backend")
def test_structures_are_what_ctypes_is_told():
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.S)
    declared = {name: body for body, name in re.findall(r"typedef struct \{([^}]*)\} (\w+);", text)}
    assert declared.keys() == STRUCTURES.keys()
    for name, structure in STRUCTURES.items():
        expected = []
        for line in declared[name].split(";"):
            kind, _, fields = line.strip().removeprefix("const ").partition(" ")
            expected += [
                (field.strip(" *").partition("[")[0], "*" in field, kind) for field in fields.split(",") if field
            ]
        assert [field for field, *_ in structure._fields_] == [field for field, *_ in expected]
        for (_, is_pointer, kind), (field, given) in zip(expected, structure._fields_):
            given = getattr(given, "_type_", given) if isinstance(given, type(ctypes.c_int64 * 3)) else given
            assert given == (ctypes.c_void_p if is_pointer else STRUCTURES.get(kind) or C_TYPES[kind]), (name, field)
        assert library.loaded.dsv3_size_of(name.encode()) == ctypes.sizeof(structure)
