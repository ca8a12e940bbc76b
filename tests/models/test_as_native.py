"""What libraries do to a model: hooks, replaced parts, modes and transforms give what they give with native's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native_modeling

import transformers_dsv3


TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
STEPS = 3  # the last tokens, decoded one by one


@pytest.fixture(scope="module")
def pair(make_model, native_twin):
    """Function to the plugin's model without MTP layers and native's of the same weights, new ones each time."""
    model = make_model(num_nextn_predict_layers=0, attn_implementation="sdpa")
    native = native_twin(model)

    def make():
        ours, theirs = copy.deepcopy(model), copy.deepcopy(native)
        with torch.no_grad():
            # So that which backend serves what was decided before anything is done to the model
            cache = ours(TOKENS).past_key_values
            ours(TOKENS[:, :1], past_key_values=cache)
        return ours, theirs

    return make


def module_names():
    with torch.device("meta"):
        config = transformers_dsv3.Dsv3Config(**{**SMALL, "num_hidden_layers": 2})
        return [name for name, _ in native_modeling.DeepseekV3ForCausalLM(config).named_modules() if name]


SMALL = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 8, "intermediate_size": 8, "n_routed_experts": 8}
SMALL |= {"moe_intermediate_size": 4, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
SMALL |= {"q_lora_rank": 4, "kv_lora_rank": 4, "first_k_dense_replace": 1}
NAMES = [name for name in module_names() if name != "model.layers"]  # a list is not called
LINEAR = [name for name in NAMES if name.endswith("_proj") or name == "lm_head"]


def everything(model):
    """Logits of a prefill and of steps of decoding over its cache, then gradients of a loss in training mode."""
    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [model(TOKENS[:, :-STEPS], past_key_values=cache).logits]
        for step in range(STEPS, 0, -1):
            tokens = TOKENS[:, -step:][:, :1]
            logits.append(model(tokens, past_key_values=cache).logits)
    model.train()
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logits, dim=1), loss.detach(), gradients


def assert_same(ours, native):
    (logits, loss, gradients), (native_logits, native_loss, native_gradients) = everything(ours), everything(native)
    torch.testing.assert_close(logits, native_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss, native_loss, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == native_gradients.keys()
    for name, gradient in gradients.items():
        scale = native_gradients[name].abs().max().clamp(min=1e-3)
        assert (gradient - native_gradients[name]).abs().max() < 1e-3 * scale, name


def scaled(output):
    """An output, changed: floating tensors by a tenth, also within a tuple."""
    if isinstance(output, tuple):
        return tuple(scaled(each) for each in output)
    return output * 1.1 if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def test_modules_are_those_of_native(pair):
    ours, native = pair()
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in native.named_modules()]
    for (name, module), (_, other) in zip(ours.named_modules(), native.named_modules()):
        assert type(module).__name__ == type(other).__name__, name
        assert isinstance(module, type(other)), name
        if type(other).__module__.startswith("torch."):
            assert type(module) is type(other), name
        lacking = {key for key in vars(other) if not key.startswith("_")} - set(vars(module))
        lacking = {key for key in lacking if not hasattr(module, key)}
        assert not lacking, f"{name}: {lacking}"
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in native.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in native.named_buffers()]


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks(pair, name):
    """A hook that changes a module's output acts, prefill, decoding and training, and is called as often."""
    models, calls = pair(), ([], [])
    for model, seen in zip(models, calls):

        def hook(module, args, output, seen=seen):
            seen.append(1)
            return scaled(output)

        model.get_submodule(name).register_forward_hook(hook)
    assert_same(*models)
    assert len(calls[0]) == len(calls[1]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_forward_pre_hooks(pair, name):
    """Modules are called with native's arguments, by native's names."""
    models, calls = pair(), ([], [])
    for model, seen in zip(models, calls):

        def hook(module, args, kwargs, seen=seen):
            # Releases of Transformers differ in how they give positions to rotary embeddings
            seen.append(len(args) + len(kwargs) if name.endswith("rotary_emb") else (len(args), sorted(kwargs)))

        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    assert_same(*models)
    assert calls[0] == calls[1] and calls[0]


@pytest.mark.parametrize("name", [name for name in NAMES if "rotary" not in name])
def test_backward_hooks(pair, name):
    models, calls = pair(), ([], [])
    for model, seen in zip(models, calls):

        def hook(module, grad_input, grad_output, seen=seen):
            seen.append(1)
            return tuple(None if grad is None else 2 * grad for grad in grad_input)

        model.get_submodule(name).register_full_backward_hook(hook)
    assert_same(*models)
    assert len(calls[0]) == len(calls[1])


@pytest.mark.parametrize("name", NAMES)
def test_replaced_forwards(pair, name):
    """As accelerate's hooks, kernels' and Liger's replacements do."""
    models = pair()
    for model in models:
        module = model.get_submodule(name)
        original = module.forward
        module.forward = lambda *args, original=original, **kwargs: scaled(original(*args, **kwargs))
    assert_same(*models)


class Wrapped(nn.Module):
    """Something without the attributes of what it stands for, as adapters and quantisers put in a module's place."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "model"])
def test_replaced_modules(pair, name):
    models = pair()
    for model in models:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Wrapped(model.get_submodule(name)))
    assert_same(*models)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", [*LINEAR, "model.layers.1.mlp.experts", "model.layers.1.mlp.gate"])
def test_parametrisations(pair, name):
    models = pair()
    for model in models:
        module = model.get_submodule(name)
        for parameter in [n for n, _ in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, parameter, Doubled())
    assert_same(*models)


def test_hooks_on_every_module(pair):
    """`register_module_forward_hook`, of which profilers and trackers are made."""
    ours, native = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        calls = []
        for model in (ours, native):
            everything(model)
            calls.append([kind.__name__ for kind in seen])
            seen.clear()
    finally:
        handle.remove()
    assert sorted(calls[0]) == sorted(calls[1])


def test_operations_are_counted(pair):
    counts = []
    for model in pair():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(TOKENS, use_cache=False)
        with FlopCounterMode(display=False) as training:
            model.train()(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        counts.append((counter.get_total_flops(), training.get_total_flops()))
    assert counts[0] == counts[1]


def test_copies(pair):
    """`deepcopy`, pickling, `torch.save` of the model object, shared memory."""
    model, _ = pair()
    with torch.no_grad():
        expected = model(TOKENS).logits
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for copied in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
            model.share_memory(),
        ):
            assert type(copied) is type(model) and torch.equal(copied(TOKENS).logits, expected)


def test_dynamic_quantisation(pair):
    """`torch.ao.quantization.quantize_dynamic` asks `type(module) is nn.Linear`."""
    found, logits = [], []
    for model in pair():
        quantised = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
        found.append({name: type(module).__name__ for name, module in quantised.named_modules()})
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            logits.append([quantised(TOKENS[:, :-1], past_key_values=cache).logits])
            logits[-1].append(quantised(TOKENS[:, -1:], past_key_values=cache).logits)
    assert found[0] == found[1]
    for ours, native in zip(*logits):
        torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-3)


def test_transforms(pair):
    """Gradients by `torch.func`, forward-mode derivatives, `vmap`, Hessian-vector products."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    results = []
    for model in pair():
        model.eval().set_experts_implementation("batched_mm")  # the others read how many tokens each expert has
        model.set_attn_implementation("eager")  # PyTorch's fused attention has no forward-mode derivatives
        parameters = dict(model.named_parameters())
        name = "model.layers.1.input_layernorm.weight"

        def loss(weight, model=model, parameters=parameters, name=name):
            replaced = {**parameters, name: weight}
            output = torch.func.functional_call(model, replaced, (TOKENS,), {"labels": TOKENS, "use_cache": False})
            return output.loss

        weight = parameters[name].detach()
        gradient = torch.func.grad(loss)(weight)
        _, tangent = torch.func.jvp(loss, (weight,), (direction,))
        with torch.autograd.forward_ad.dual_level():
            dual = loss(torch.autograd.forward_ad.make_dual(weight, direction))
            forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
        many = torch.func.vmap(loss)(torch.stack([weight, 2 * weight]))
        product = torch.func.jvp(torch.func.grad(loss), (weight,), (direction,))[1]
        results.append((gradient, tangent, forward, many, product))
    for ours, native in zip(*results):
        torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-4)


def test_traced_programs(pair):
    traced = []
    for model in pair():
        model.eval().set_experts_implementation("batched_mm")

        class Logits(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, tokens):
                return self.model(tokens, use_cache=False, return_dict=False)[0]

        with torch.no_grad():
            program = torch.jit.trace(Logits(model), (TOKENS,), check_trace=False)
            assert "transformers_dsv3::" not in str(program.inlined_graph)
            traced.append(program(TOKENS.flip(1)))
    torch.testing.assert_close(*traced, rtol=1e-3, atol=1e-4)


class Noted(torch.Tensor):
    """A subclass that sees its operations; quantised and distributed tensors are such."""

    seen: set = set()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.add(getattr(function, "__name__", str(function)))
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            return result.as_subclass(cls) if function is torch.Tensor.detach else result


def test_tensor_subclasses(pair):
    ours, native = pair()
    seen = []
    for model in (ours, native):
        Noted.seen = set()
        for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate"):
            module = model.get_submodule(name)
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Noted))
        with torch.no_grad():
            model(TOKENS)
        seen.append("linear" in Noted.seen)
    assert seen == [True, True]
    assert_same(ours, native)


def own_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention of one's own: the mean of the values, whatever the queries."""
    return value.mean(dim=2, keepdim=True).expand(*query.shape[:-1], -1).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("name", ["own", "sdpa"])
def test_attention_functions_of_ones_own(pair, name, monkeypatch):
    """Registered under a name of their own, or over one of Transformers'."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, name, own_attention)
    mapping = type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    monkeypatch.setitem(mapping, name, mapping["sdpa"])
    models = pair()
    for model in models:
        model.set_attn_implementation(name)
    assert_same(*models)
