"""Whole models that decode by Triton's programs: the same text, one graph for every step."""

import pytest
import torch
from transformers import StaticCache

from transformers_dsv3.kernels import selection, triton_support


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if (why := triton_support.device_refusal(torch.empty(0, device=DEVICE))) is not None:
    pytest.skip(f"Triton {why}", allow_module_level=True)

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def calls(monkeypatch):
    """The calls of the programs' launcher, by name."""
    from transformers_dsv3.kernels.triton_src import mla_decode

    calls = []
    original = mla_decode.attend
    monkeypatch.setattr(mla_decode, "attend", lambda *arguments: calls.append("attend") or original(*arguments))
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
    # A step at the least for each layer and token but the first, fewer where drafts are accepted
    assert len(calls) >= model.config.num_hidden_layers * (2 if "use_mtp" in settings else 7)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiles with what the CPU has")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_every_step(backend, make_model, calls):
    """Of a static cache, without breaks; the positions that are filled are read on the device."""
    torch._dynamo.reset()
    model = make_model()
    model.set_experts_implementation("grouped_mm")
    tokens = prompts(False)["input_ids"]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    step = torch.compile(model.forward, fullgraph=True, backend=count)
    with torch.no_grad():
        expected = model(tokens).logits
        with selection.use(attention="triton", linear="triton"):
            cache = StaticCache(config=model.config, max_cache_len=40)
            model(tokens[:, :6], past_key_values=cache)
            calls.clear()
            for at in range(6, 12):
                output = step(tokens[:, at : at + 1], position_ids=torch.tensor([[at]]), past_key_values=cache).logits
                torch.testing.assert_close(output, expected[:, at : at + 1], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert len(calls) == 6 * model.config.num_hidden_layers
    torch._dynamo.reset()
