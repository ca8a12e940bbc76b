"""A step of decoding as one program, beside the same layers run one by one and beside native's model."""

import copy
import pickle
import threading
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

import transformers_dsv3
from transformers_dsv3.kernels import backends, selection
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu import linear as cpu_linear
from transformers_dsv3.kernels.cpu.step import Program
from transformers_dsv3.models.dsv3 import decoding_dsv3
from transformers_dsv3.models.dsv3.cache_dsv3 import SPARE_TOKENS, take_back


pytestmark = pytest.mark.skipif(library.unavailable is not None, reason="no compiled CPU library")


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by one at each step that a program runs."""
    found, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, *arguments: found.append(self) or run(self, *arguments))
    return found


@pytest.fixture
def by_layers(monkeypatch):
    """Calls a function while no program is taken."""

    def call(function, *arguments, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(decoding_dsv3, "MOST_TOKENS", 0)
            return function(*arguments, **kwargs)

    return call


def start(model, batch=2, length=9, padded=0, seed=0):
    """A cache of a prompt, a mask that hides `padded` positions of the first row, and what makes new tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache, mask, generator


def step(model, cache, mask, tokens):
    mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(-1) - 1)[:, -tokens.shape[1] :]
    output = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return output.logits, mask


def beside_the_layers(model, by_layers, batch, tokens, padded=0, steps=3, seed=0):
    """Steps by a program and by the layers over caches of their own: largest difference of logits and of caches."""
    with torch.no_grad():
        (cache, mask, generator), (other, _, _) = (
            start(model, batch, 9, padded, seed),
            start(model, batch, 9, padded, seed),
        )
        worst = 0.0
        for _ in range(steps):
            new = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)
            expected, _ = by_layers(step, model, other, mask, new)
            got, mask = step(model, cache, mask, new)
            assert got.shape == expected.shape and got.dtype == expected.dtype
            worst = max(worst, float((got - expected).abs().max()))
        for ours, plain in zip(cache.layers, other.layers):
            assert ours.keys.shape == plain.keys.shape and ours.values.shape == plain.values.shape
            worst = max(worst, float((ours.keys - plain.keys).abs().max()))
            worst = max(worst, float((ours.values - plain.values).abs().max()))
    return worst


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 4),
    padded=st.integers(0, 6),
    heads=st.sampled_from([1, 3, 4]),
    lora=st.sampled_from([None, 5, 12]),
    latents=st.sampled_from([4, 16, 24]),
    experts=st.sampled_from([(8, 2, 1, 3), (6, 1, 1, 2), (4, 2, 2, 4)]),
    dense=st.integers(0, 2),
    rope=st.sampled_from(["default", "yarn", "linear"]),
    interleave=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_what_the_layers_compute(
    make_model, measured, batch, tokens, padded, heads, lora, latents, experts, dense, rope, interleave, bias, dtype
):
    E, groups, top_groups, K = experts
    scaling = {} if rope == "default" else {"factor": 4.0}
    model = make_model(
        num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=lora, kv_lora_rank=latents,
        n_routed_experts=E, n_group=groups, topk_group=top_groups, num_experts_per_tok=K, first_k_dense_replace=dense,
        rope_parameters={"rope_type": rope, "rope_theta": 10000.0, **scaling}, rope_interleave=interleave,
        attention_bias=bias,
    ).to(dtype)  # fmt: skip
    assert model.model.decoding.refusal(model.model) is None
    patch = pytest.MonkeyPatch()
    try:

        def by_layers(function, *arguments):
            with patch.context() as inner:
                inner.setattr(decoding_dsv3, "MOST_TOKENS", 0)
                return function(*arguments)

        patch.setattr(cpu_linear, "MOST_ROWS", {})
        count, run = [], Program.run
        patch.setattr(Program, "run", lambda self, *given: count.append(1) or run(self, *given))
        worst = beside_the_layers(model, by_layers, batch, tokens, padded)
        # Expanding every latent is cheaper where there are few of them and many tokens
        assert len(count) == 3 or not model.model.layers[0].self_attn.is_absorbed_cheaper(tokens, 9 + tokens)
    finally:
        patch.undo()
    # Linear layers as small as these are PyTorch's where the layers are called, which rounds fp32 otherwise; in bf16 a
    # last bit that falls otherwise grows on its way
    assert worst < (2e-5 if dtype is torch.float32 else 0.02)
    measured[f"program beside layers, {dtype}"] = max(measured.get(f"program beside layers, {dtype}", 0.0), worst)


def test_large_layers_are_the_same_to_the_last_bit(make_model, by_layers, runs):
    """Where the layers are the compiled backend's too, nothing is computed otherwise."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 600}
    sizes |= {"q_lora_rank": None, "kv_lora_rank": 448, "qk_nope_head_dim": 64, "v_head_dim": 64}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(**sizes).to(dtype)
        for padded in (0, 3):
            assert beside_the_layers(model, by_layers, 3, 1, padded) == 0
    assert len(runs) == 12


def test_native_gives_the_same(make_model, native_twin, runs):
    model = make_model(num_hidden_layers=3)
    native = native_twin(model)
    with torch.no_grad():
        (cache, mask, generator), (other, _, _) = start(model, padded=4), start(native, padded=4)
        for _ in range(4):
            new = torch.randint(model.config.vocab_size, (2, 1), generator=generator)
            expected, _ = step(native, other, mask, new)
            got, mask = step(model, cache, mask, new)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert len(runs) == 4


@pytest.mark.parametrize("options", [{}, {"use_mtp": True}, {"num_beams": 3}, {"do_sample": True, "seed": 1}], ids=str)
def test_the_text_is_the_same(trained_model, training_bytes, by_layers, runs, options):
    prompts = torch.stack([training_bytes[at : at + 12] for at in (0, 300, 700)])
    mask = torch.ones_like(prompts)
    mask[1, :7] = mask[2, :3] = 0

    def text():
        given = {"do_sample": False, **options}
        torch.manual_seed(given.pop("seed", 0))
        fixed = {"max_new_tokens": 40, "pad_token_id": 256, "eos_token_id": None}
        return trained_model.generate(prompts, attention_mask=mask, **fixed, **given)

    expected = by_layers(text)
    assert not runs
    assert torch.equal(text(), expected)
    assert len(runs) > 10


# What a program rests on, changed between two steps: every one must count, and none may leave something stale behind


def _hook(model):
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, given, output: (output[0], output[1] * 3, output[2])
    )


def _pre_hook(model):
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, given: (given[0] * 2,))


def _forward(model):
    norm = model.model.layers[1].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 2


def _replaced(model):
    layer = model.model.layers[1].mlp.shared_experts.down_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _data(model):
    layer = model.model.layers[0].self_attn.kv_a_proj_with_mqa
    layer.weight.data = layer.weight.data * 2


def _in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(2)


def _in_place_buffer(model):
    model.model.layers[1].mlp.gate.e_score_correction_bias.neg_()


def _module(model):
    old = model.model.layers[0].self_attn.o_proj
    model.model.layers[0].self_attn.o_proj = new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight.data = old.weight.data * 2


def _class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.model.layers[0].self_attn.o_proj.__class__ = Doubled


def _fewer_experts(model):
    model.model.layers[1].mlp.gate.top_k = 2


def _scaling(model):
    model.model.layers[0].self_attn.scaling *= 3


def _eps(model):
    model.model.norm.variance_epsilon = 1.0


def _last_norm(model):
    model.model.norm.weight.data = model.model.norm.weight.data * 2


def _dtype(model):
    model.double()


def _one_dtype(model):
    model.model.layers[0].mlp.up_proj.double()


def _train(model):
    model.train()


def _attention(model):
    model.model.layers[1].self_attn.attention_dropout = 0.9
    model.model.layers[1].self_attn.train()


def _implementation(model):
    model.set_attn_implementation("eager")


def _experts_implementation(model):
    model.set_experts_implementation("eager")


def _interleave(model):
    model.config.rope_interleave = not model.config.rope_interleave


def _frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _attention_scaling(model):
    model.model.rotary_emb.attention_scaling = 2.0


def _fewer_layers(model):
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def _swapped_layers(model):
    layers = model.model.layers
    layers[0].self_attn.o_proj, layers[1].self_attn.o_proj = layers[1].self_attn.o_proj, layers[0].self_attn.o_proj


def _adapter(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj", "q_a_proj"], init_lora_weights=False))
    return adapted


def _merged(model):
    return get_peft_model(
        model, LoraConfig(target_modules=["o_proj", "q_a_proj"], init_lora_weights=False)
    ).merge_and_unload()


CHANGES = [value for name, value in list(globals().items()) if name.startswith("_") and type(value) is FunctionType]
# These need not change what is computed
SILENT = {_dtype, _implementation, _experts_implementation, _train}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_what_it_rests_on_counts_at_once(make_model, by_layers, runs, change):
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        (cache, mask, generator), (other, _, _) = start(model, padded=3), start(model, padded=3)
        new = torch.randint(model.config.vocab_size, (2, 1), generator=generator)
        first, after = step(model, cache, mask, new)
        assert len(runs) == 1
        by_layers(step, model, other, mask, new)
        unchanged, _ = step(model, copy.deepcopy(cache), after, new)
        torch.manual_seed(0)
        model = change(model) or model
        if change is _dtype:
            cache.layers, other.layers = cache.layers, other.layers
            for layer in (*cache.layers, *other.layers):
                layer.keys, layer.values = layer.keys.double(), layer.values.double()
        torch.manual_seed(0)
        try:
            expected, _ = by_layers(step, model, other, after, new)
        except RuntimeError as error:  # dtypes that do not go together
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                step(model, cache, after, new)
            return
        torch.manual_seed(0)
        got, _ = step(model, cache, after, new)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    if change not in SILENT:
        assert float((got - unchanged).abs().max()) > 1e-3


@pytest.mark.parametrize("target", ["o_proj", "q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa"])
def test_adapters_that_are_switched_off_and_on(make_model, by_layers, target):
    """A program may stand for layers whose adapters are off; it knows at once when they are not."""
    settings = LoraConfig(target_modules=[target], init_lora_weights=False)
    model = get_peft_model(make_model(), settings, adapter_name="first").eval()
    model.add_adapter("second", settings)
    new = torch.ones(2, 1, dtype=torch.long)

    def logits(take_program):
        with torch.no_grad():
            cache, mask, _ = start(model)
            return (step if take_program else lambda *given: by_layers(step, *given))(model, cache, mask, new)[0]

    seen = []
    for change in (
        model.base_model.disable_adapter_layers,
        model.base_model.enable_adapter_layers,
        model.base_model.disable_adapter_layers,
        lambda: model.set_adapter("second"),
        model.base_model.disable_adapter_layers,
        model.base_model.enable_adapter_layers,
        model.base_model.merge_adapter,
        model.base_model.disable_adapter_layers,
    ):
        change()
        seen.append(logits(True))
        torch.testing.assert_close(seen[-1], logits(False), atol=2e-5, rtol=1e-4)
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3 and float((seen[1] - seen[4]).abs().max()) > 1e-3


def test_it_comes_back(make_model, runs):
    model = make_model()
    with torch.no_grad():
        cache, mask, generator = start(model)
        new = torch.randint(model.config.vocab_size, (2, 1), generator=generator)
        _, mask = step(model, cache, mask, new)
        handle = model.model.norm.register_forward_hook(lambda *given: None)
        _, mask = step(model, cache, mask, new)
        assert len(runs) == 1
        handle.remove()
        for _ in range(3):  # another text
            cache, mask, _ = start(model)
            step(model, cache, mask, new)
        assert len(runs) == 4


@pytest.mark.parametrize(
    "look",
    [
        lambda: selection.use(linear="torch"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.enable_grad,
        torch.autograd.profiler.profile,
    ],
)
def test_what_looks_at_operators_sees_them(make_model, runs, look):
    model = make_model()
    with torch.no_grad():
        cache, mask, generator = start(model)
        with look():
            step(model, cache, mask, torch.ones(2, 1, dtype=torch.long))
    assert not runs


def test_what_is_asked_for_beside_the_logits_is_there(make_model, by_layers, runs):
    model = make_model()
    with torch.no_grad():
        for asked in ("output_hidden_states", "output_attentions", "output_router_logits"):
            cache, mask, _ = start(model)
            output = model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache, **{asked: True})
            assert getattr(output, asked.removeprefix("output_")) is not None
    assert not runs


# The cache


def test_what_was_given_out_is_not_written_to(make_model, runs):
    model = make_model()
    with torch.no_grad():
        cache, mask, generator = start(model)
        new = torch.ones(2, 1, dtype=torch.long)
        _, after = step(model, cache, mask, new)
        held = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
        copied = copy.deepcopy(cache)
        expected, _ = step(model, copied, after, new + 1)
        cache.crop(-1)
        _, after = step(model, cache, mask, new + 5)  # in place of what `held` ends with
        assert all(torch.equal(one, as_it_was) for one, as_it_was in held)
        again = DynamicCache(config=model.config)
        for layer, (keys, _) in enumerate(held):
            again.update(keys, copied.layers[layer].values[:, :, :-1], layer)
        got, _ = step(model, again, after, new + 1)
        assert torch.equal(got, expected)
    assert len(runs) == 4


def test_steps_copy_nothing(make_model, runs):
    model = make_model()
    with torch.no_grad():
        cache, mask, _ = start(model)
        new = torch.ones(2, 1, dtype=torch.long)
        places = set()
        for _ in range(SPARE_TOKENS + 20):
            _, mask = step(model, cache, mask, new)
            places.add(cache.layers[1].keys.data_ptr())
        assert len(places) == 2  # it grew once
        take_back(cache, 3)
        step(model, cache, mask[:, :-3], new)
        assert cache.layers[1].keys.data_ptr() in places


@pytest.mark.parametrize(
    "change, batch",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
        (lambda cache: cache.batch_repeat_interleave(2), 4),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
        (lambda cache: cache.crop(-2), 2),
    ],
    ids=["reorder", "repeat", "select", "crop"],
)
def test_changes_of_the_cache(make_model, by_layers, runs, change, batch):
    model = make_model()
    with torch.no_grad():
        (cache, mask, _), (other, _, _) = start(model), start(model)
        new = torch.ones(2, 1, dtype=torch.long)
        step(model, cache, mask, new)
        by_layers(step, model, other, mask, new)
        change(cache), change(other)
        new = torch.arange(batch)[:, None]
        expected = by_layers(model, new, past_key_values=other).logits
        torch.testing.assert_close(model(new, past_key_values=cache).logits, expected, atol=2e-5, rtol=1e-4)
    assert len(runs) == 2


def test_a_layer_of_its_own_kind_in_the_cache(make_model, runs):
    model = make_model()
    with torch.no_grad():
        cache, mask, _ = start(model)
        calls, update = [], cache.layers[1].update
        cache.layers[1].update = lambda *given, **options: calls.append(1) or update(*given, **options)
        step(model, cache, mask, torch.ones(2, 1, dtype=torch.long))
    assert calls and not runs


# Copies, threads, failures


def test_copies_have_programs_of_their_own(make_model, by_layers):
    model = make_model()
    with torch.no_grad():
        cache, mask, _ = start(model)
        new = torch.ones(2, 1, dtype=torch.long)
        step(model, cache, mask, new)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            if twin.model is not model.model:
                for parameter in twin.parameters():
                    parameter.mul_(1.1)
            (cache, mask, _), (other, _, _) = start(twin), start(twin)
            expected, _ = by_layers(step, twin, other, mask, new)
            got, _ = step(twin, cache, mask, new)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(make_model, by_layers, runs, threads):
    model = make_model()
    before = torch.get_num_threads()
    with torch.no_grad():
        (cache, mask, _), (other, _, _) = start(model), start(model)
        new = torch.ones(2, 2, dtype=torch.long)
        expected, _ = step(model, other, mask, new)
        try:
            torch.set_num_threads(threads)
            got, _ = step(model, cache, mask, new)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(got, expected)
    assert len(runs) == 2


def test_two_models_in_two_threads(make_model):
    models = [make_model(seed=seed) for seed in (1, 2)]
    prompt = torch.arange(10)[None]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [model.generate(prompt, **options) for model in models]
    got: dict[int, list] = {0: [], 1: [], 2: []}

    def decode(place):
        torch.set_num_threads(2)
        got[place] = [models[place % 2].generate(prompt, **options) for _ in range(5)]

    threads = [threading.Thread(target=decode, args=(place,)) for place in got]  # two of them on one model
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, texts in got.items():
        assert len(texts) == 5 and all(torch.equal(text, expected[place % 2]) for text in texts)


def test_angles_never_become_fewer(make_model, runs):
    """Another thread may be about to read the last of them."""
    model = make_model()
    with torch.no_grad():
        cache, mask, _ = start(model)
        step(model, cache, mask, torch.ones(2, 1, dtype=torch.long))
    program = runs[0]
    before = program.positions
    program.set_angles(torch.zeros(3, 8), torch.zeros(3, 8))
    assert program.positions == before > 3
    program.set_angles(torch.zeros(before + 1, 8), torch.zeros(before + 1, 8))
    assert program.positions == before + 1


def test_a_failure_at_the_first_launch_is_a_refusal(make_model, by_layers, monkeypatch, caplog):
    model = make_model()
    program = backends.STEP["program"]
    monkeypatch.setattr(program, "is_proven", False)
    monkeypatch.setattr(program, "failure", None)

    def fail(*arguments):
        raise OSError("no such instruction")

    monkeypatch.setattr(Program, "run", fail)
    with torch.no_grad():
        (cache, mask, _), (other, _, _) = start(model), start(model)
        new = torch.ones(2, 1, dtype=torch.long)
        expected, _ = by_layers(step, model, other, mask, new)
        got, _ = step(model, cache, mask, new)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert "no such instruction" in program.failure
    assert "program" in transformers_dsv3.explain(model) and "no such instruction" in transformers_dsv3.explain(model)
    selection.epoch += 1


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"n_shared_experts": 0}, "shared experts"),
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"attn_implementation": "eager"}, "eager"),
    ],
)
def test_explain_says_why_not(make_model, runs, fields, part):
    model = make_model(**fields)
    assert part in (model.model.decoding.refusal(model.model) or "")
    page = transformers_dsv3.explain(model)
    row = next(line for line in page.splitlines() if line.split()[:1] == ["program"])
    assert part in row
    with torch.no_grad():
        cache, mask, _ = start(model)
        step(model, cache, mask, torch.ones(2, 1, dtype=torch.long))
    assert not runs


def test_explain_says_so(make_model):
    page = transformers_dsv3.explain(make_model())
    assert any(line.split()[:2] == ["*", "program"] for line in page.splitlines())
