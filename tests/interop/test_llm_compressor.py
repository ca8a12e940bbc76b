"""llm-compressor: what it writes of a native model opens packed, with the values that compressed-tensors reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_dsv3.compression.quantized_weights import QuantizedExperts, QuantizedLinear, dequantize


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "peer_llm_compressor.py"


@pytest.mark.parametrize(("scheme", "bits"), [("W4A16", 4), ("W8A8", 8)])
def test_opens_packed(peer, save, tmp_path, scheme, bits):
    install = "--no-deps llmcompressor loguru compressed-tensors"
    llm_compressor = peer("DSV3_LLM_COMPRESSOR_PYTHON", "llmcompressor", install)
    # Its schemes have groups of 128
    widths = {"intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128}
    save(tmp_path / "plain", dtype=torch.bfloat16, num_nextn_predict_layers=0, **widths)
    llm_compressor.run(SCRIPT, tmp_path / "plain", tmp_path / "theirs", scheme)
    values = load_file(tmp_path / "theirs" / "values.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.bits == bits
            read = {f"{name}.weight": dequantize(module.weight, module.weight_scale, torch.float32)}
        elif isinstance(module, QuantizedExperts):
            assert module.bits == bits
            gate_up = dequantize(module.gate_up_proj, module.gate_up_proj_scale, torch.float32)
            down = dequantize(module.down_proj, module.down_proj_scale, torch.float32)
            read = {}
            for part, stack in zip(("gate", "up", "down"), (*gate_up.chunk(2, dim=1), down)):
                read |= {f"{name}.{e}.{part}_proj.weight": expert for e, expert in enumerate(stack)}
        else:
            continue
        for weight, value in read.items():
            assert torch.equal(value, values[weight]), weight
        found |= read.keys()
    assert found == values.keys()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
