"""Whole models that decode by Triton's programs: the same text, one graph for every step, few launches."""

import collections
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.fake_gpu import Launches, fake_gpu, on_gpu
from transformers_dsv3 import Dsv3ForCausalLM
from transformers_dsv3.kernels import selection, triton_support


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if (why := triton_support.device_refusal(torch.empty(0, device=DEVICE))) is not None:
    pytest.skip(f"Triton {why}", allow_module_level=True)

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def calls(monkeypatch):
    """The calls of the programs' launchers, by name."""
    from transformers_dsv3.kernels.triton_src import mla_decode, rows

    calls = collections.Counter()

    def noting(original):
        return lambda *arguments: calls.update([original.__name__]) or original(*arguments)

    for module, name in ((mla_decode, "attend"), (rows, "latent_rows"), (rows, "rms_norm")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return calls


def prompts(padded):
    tokens = torch.arange(2, 26, device=DEVICE).view(2, 12)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "settings", [{}, {"cache_implementation": "static"}, {"use_mtp": True}], ids=["dynamic", "static", "mtp"]
)
def test_greedy_text_is_that_of_the_plain_path(settings, padded, make_model, calls):
    model = make_model().to(DEVICE)
    with selection.use(attention="torch", linear="torch"):
        expected = model.generate(**prompts(padded), **GREEDY)
    assert not calls
    with selection.use(attention="triton", linear="triton"):
        text = model.generate(**prompts(padded), **GREEDY, **settings)
    assert torch.equal(text, expected)
    # In each layer for each token but the first, fewer passes where drafts are accepted
    fewest = model.config.num_hidden_layers * (2 if "use_mtp" in settings else 4)
    assert min(calls["attend"], calls["latent_rows"], calls["rms_norm"]) >= fewest


@pytest.mark.skipif(DEVICE == "cuda", reason="compiles with what the CPU has")
def test_generate_runs_every_step_as_one_graph(make_model, calls):
    """`cache_implementation="static"` alone; on a CPU Transformers compiles where it is told to, for tests."""
    torch._dynamo.reset()
    model = make_model()
    with selection.use(attention="torch", linear="torch"):
        expected = model.generate(**prompts(True), **GREEDY)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiler = CompileConfig(fullgraph=True, backend=count, mode="default")
    compiler._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiler, **GREEDY}
    with selection.use(attention="triton", linear="triton"):
        text = model.generate(**prompts(True), **settings)
    assert torch.equal(text, expected)
    assert len(graphs) == 1
    each = model.config.num_hidden_layers * (GREEDY["max_new_tokens"] - 1)
    assert (calls["attend"], calls["latent_rows"]) == (each, each)
    torch._dynamo.reset()


@pytest.mark.slow  # the compiler's C++ for a CPU
@pytest.mark.skipif(DEVICE == "cuda", reason="compiles with what the CPU has")
def test_the_compiler_copies_no_cache(make_model):
    """What the write returns of the caches is the caches: the compiler allocates nothing of their size."""
    torch._dynamo.reset()
    model = make_model()
    attention = model.model.layers[0].self_attn
    cache = StaticCache(config=model.config, max_cache_len=56)
    angles = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    mask = torch.ones(2, 1, 1, 56, dtype=torch.bool)
    with torch.no_grad(), selection.use(attention="triton", linear="triton"):
        model(torch.arange(2, 14).view(2, 6), past_key_values=cache)
        step = torch.compile(lambda x: attention(x, angles, mask, cache)[0], fullgraph=True)
        _, (code,) = run_and_get_code(step, torch.randn(2, 1, 32))
    assert "latent_rows.default(" in code and "mla_decode.default(" in code
    sizes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    assert sizes and not [size for size in sizes if "56" in size]
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_launches_of_a_step(kind, tiny_config, monkeypatch, measured):
    """On a GPU that is not there, where reading a value raises; without a compiler, which would join some of them."""
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    launches = {}
    for choice in ("torch", "triton"):
        with torch.device("meta"):
            model = Dsv3ForCausalLM._from_config(tiny_config()).to(torch.bfloat16).eval()
        with fake_gpu(), torch.no_grad(), selection.use(attention=choice, linear=choice):
            on_gpu(model)
            cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=64)
            for length in (12, 1, 1):
                tokens = torch.empty(1, length, dtype=torch.long, device="cuda")
                with Launches() as noted:
                    model(tokens, past_key_values=cache)
        # Attention over several parts is two
        launches[choice] = len(noted.names) + sum("mla_decode" in name for name in noted.names)
    layers = model.config.num_hidden_layers
    for choice, count in launches.items():
        measured[f"launches of a step, {layers} layers, {kind} cache, attention and norms by {choice}"] = count
    assert launches["triton"] <= launches["torch"] - 45 * layers
