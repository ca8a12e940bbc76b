"""The compiled backend built for ARM, by qemu where this is none: instruction sets, and text of a compressed model.

With `-m slow` the other tests of operators run on it too (fixture `isa`).
"""

import copy

import pytest
import torch

import transformers_dsv3
from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.kernels.cpu import linear as linear_cpu
from transformers_dsv3.kernels.cpu.step import Program

from .served_library import ALL, CORTEX_A53, emulated, served


ELF_MACHINE, AARCH64 = slice(18, 20), b"\xb7\x00"


@pytest.fixture
def everywhere(monkeypatch):
    """The compiled backend takes small models' layers too, however many their rows; returns what counts steps."""
    monkeypatch.setattr(linear_cpu, "FEWEST_BYTES", 0)
    monkeypatch.setattr(linear_cpu, "MOST_ROWS", {})
    steps, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, *arguments: steps.append(1) or run(self, *arguments))
    return steps


@pytest.mark.parametrize("processor, best", [(ALL, "neon_dot"), (CORTEX_A53, "neon")])
def test_the_best_that_a_processor_runs(served_arm, processor, best):
    with open(served_arm[1], "rb") as library:
        assert library.read(20)[ELF_MACHINE] == AARCH64
    with served(emulated(served_arm, processor)):
        assert cpu_library.instruction_set() == best
        assert cpu_library.instruction_set("portable") == "portable"
        assert cpu_library.instruction_set("neon") == "neon"
        for other in {"neon_dot", "avx2"} - {best}:
            with pytest.raises(ValueError, match=f"does not run '{other}' code"):
                cpu_library.instruction_set(other)
        assert cpu_library.instruction_set() == best


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("processor", [ALL, CORTEX_A53])
def test_text_and_logits_of_a_model(served_arm, trained_model, training_bytes, everywhere, processor, bits):
    """A model, as it is and compressed, with activations rounded to 8 bits, writes what it has learned."""
    model, learned = trained_model, (40, 100, 700)
    if bits is not None:
        transformers_dsv3.quantize(model, bits=bits, activations="8")
    prompts = torch.stack([training_bytes[start : start + 24] for start in learned])
    with served(emulated(served_arm, processor)), torch.no_grad():
        text = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False)
        assert len(everywhere) == 11
        logits = model(text).logits
    assert torch.equal(text, torch.stack([training_bytes[start : start + 36] for start in learned]))
    if bits is None:
        exact, tolerance = copy.deepcopy(model).double()(text).logits, 1e-5
    else:
        with torch.no_grad():
            exact, tolerance = model(text).logits, 1e-2  # by this machine's instructions; some values round otherwise
    assert (logits - exact).abs().max() < tolerance * exact.abs().max()
