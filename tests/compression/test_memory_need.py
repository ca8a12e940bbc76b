"""What compressing takes of memory, beside what it promises before."""

import sysconfig
from pathlib import Path

import pytest
import torch

from tests import programs
from tests.conftest import TINY, WIDTHS_OVER_BYTES
from transformers_dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers_dsv3.benchmark.presets import PRESETS


WIDE = {
    **TINY,
    **WIDTHS_OVER_BYTES,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 64,
    "n_group": 1,
    "q_lora_rank": 256,
}
# The first two of its layers: one of dense, one of routed experts
BENCH = {**PRESETS["bench-2b"].fields, "num_hidden_layers": 2}
# One layer of the config's own widths, which are DeepSeek-V3's, with few of the experts
V3 = {
    "vocab_size": 258,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
COMPRESS = """
import sys
import transformers_dsv3
from transformers_dsv3.compression import compression_job
from transformers_dsv3.memory import resident_bytes

needed, original = [], compression_job.memory_needed
compression_job.memory_needed = lambda *given: needed.append(original(*given)) or needed[0]
settings = transformers_dsv3.CompressionSettings(tokens=2048, min_tokens=32)
transformers_dsv3.compress(*sys.argv[1:3], settings, text=[sys.argv[3]], memory=16 << 30)
print(needed[0], resident_bytes()["peak"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "most"),
    [
        (WIDE, 1 << 30),  # less than its experts alone would take in fp32, and the program
        (BENCH, 3 << 30),
        (V3, 16 << 30),
    ],
    ids=["wide", "bench-2b", "DeepSeek-V3"],
)
def test_memory_stays_within_what_is_promised(fields, most, byte_tokenizer, tmp_path, measured, request):
    """Minutes for each of the larger ones."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**{**fields, "num_nextn_predict_layers": 0}))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    del model
    (tmp_path / "text").write_bytes((Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_bytes()[:6000])
    code = ["-c", COMPRESS, tmp_path / "model", tmp_path / "out", tmp_path / "text"]
    done = programs.run(code, timeout=3600)
    assert done.returncode == 0, done.stderr
    needed, peak = map(int, done.stdout.split())
    name = request.node.callspec.id
    measured[f"compress, {name}: peak memory over what is promised"] = peak / needed
    measured[f"compress, {name}: peak memory, GiB"] = peak / 2**30
    assert peak < needed and peak < most
