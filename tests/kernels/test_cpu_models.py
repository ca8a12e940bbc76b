"""Whole models by the compiled backend: the text of the plain path, graphs that hold the operators, no more memory."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

import transformers_dsv3
from transformers_dsv3.kernels import selection
from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.kernels.cpu import linear as linear_cpu


pytestmark = pytest.mark.usefixtures("compiled")

OPERATORS = {"project", "linear", "mixture", "attention_expanded", "route", "rms_norm"}


@pytest.fixture
def everywhere(monkeypatch):
    """The compiled backend takes small models' linear layers too."""
    monkeypatch.setattr(linear_cpu, "FEWEST_BYTES", 0)


@contextlib.contextmanager
def plain(model, monkeypatch):
    """PyTorch serves everything, the router included."""
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    with monkeypatch.context() as patch, selection.use(linear="torch", attention="torch"):
        patch.setitem(selection.chosen, "experts", "eager")
        yield
    model.set_experts_implementation(before)


@pytest.mark.parametrize("use_mtp", [False, True])
@pytest.mark.parametrize("isa", selection.CHOICES["isa"])
def test_greedy_text_is_that_of_the_plain_path(trained_model, training_bytes, everywhere, monkeypatch, isa, use_mtp):
    best = cpu_library.instruction_set()
    try:
        cpu_library.instruction_set(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        # What was learned and what was not
        for starts in ([40], [100, 700, 1300, 1500]):
            prompts = torch.stack([training_bytes[start : start + 48] for start in starts])
            mask = torch.ones_like(prompts)
            if len(starts) > 1:
                mask[1, :9] = 0  # padding on the left
            arguments = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False, "use_mtp": use_mtp}
            compiled = trained_model.generate(prompts, **arguments)
            with plain(trained_model, monkeypatch):
                assert torch.equal(trained_model.generate(prompts, **arguments), compiled)
    finally:
        cpu_library.instruction_set(best)


def operators(graph_module):
    names = {str(node.target).removesuffix(".default") for node in graph_module.graph.nodes}
    return {name.removeprefix("transformers_dsv3.") for name in names if name.startswith("transformers_dsv3.")}


def test_compiled_graphs_hold_the_operators(make_model, everywhere):
    model, tokens = make_model(attn_implementation="sdpa"), torch.arange(1, 8)[None]
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        result = torch.compile(model, fullgraph=True, backend=backend)(tokens, use_cache=False).logits
    torch.testing.assert_close(result, expected)
    assert len(graphs) == 1 and operators(graphs[0]) >= OPERATORS


def test_functionalised_graphs_give_the_same(make_model, everywhere):
    model, tokens = make_model(attn_implementation="sdpa", num_hidden_layers=1), torch.arange(1, 8)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)
        longer = torch.arange(1, 12)[None]
        torch.testing.assert_close(compiled(longer, use_cache=False).logits, model(longer, use_cache=False).logits)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_open_without_the_package(make_model, everywhere, strict):
    model, tokens = make_model(attn_implementation="sdpa"), torch.arange(1, 8)[None]
    model.set_experts_implementation("batched_mm")  # the others choose by what tokens hold
    with torch.no_grad():
        program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=strict)
        assert not operators(program.graph_module)
        other = tokens.flip(1)
        result = program.module()(other, use_cache=False)
        torch.testing.assert_close(result.logits, model(other, use_cache=False).logits)


RESIDENT = """
import json, re, sys, torch, transformers_dsv3
from transformers import AutoModelForCausalLM

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

before = resident("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.no_grad():
    cache = model(torch.arange(1, 17)[None]).past_key_values
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
print(json.dumps([resident("VmRSS") - before, sum(p.numel() * p.element_size() for p in model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_no_more_memory_than_without(tiny_config, tmp_path, measured):
    """Loading and a step of decoding, with the backend and without: weights are used where they are."""
    config = tiny_config(
        hidden_size=1024,
        moe_intermediate_size=512,
        intermediate_size=2048,
        num_hidden_layers=5,
        n_routed_experts=32,
        num_nextn_predict_layers=0,
        vocab_size=4096,
    )
    transformers_dsv3.Dsv3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)

    def resident(choices):
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, str(tmp_path)],
            env={**os.environ, selection.VARIABLE: choices},
            capture_output=True,
            text=True,
            check=True,
        )
        grown, size = json.loads(done.stdout.splitlines()[-1])
        assert size > 300e6
        return grown

    without, with_backend = resident("experts=eager,linear=torch,attention=torch"), resident("")
    measured["memory of loading and a step, compiled backend over PyTorch"] = with_backend / without
    assert with_backend <= 1.05 * without
