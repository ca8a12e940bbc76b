"""`transformers-dsv3 bench --against`: llama.cpp takes turns on the GGUF files that its converter makes."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_dsv3.benchmark import ceilings
from transformers_dsv3.benchmark.presets import PRESETS, Preset
from transformers_dsv3_cli.main import app


pytestmark = pytest.mark.interop


def test_llama_cpp_takes_turns(peer, monkeypatch, tmp_path):
    """A preset's own checkpoint and stand-in tokenizer are ones that llama.cpp loads."""
    llama = peer("DSV3_LLAMA_CPP_PYTHON", "llama_cpp", "llama-cpp-python gguf sentencepiece torch transformers")
    prefix = llama.run("-c", "import sys; print(sys.prefix)").strip()
    converter = Path(os.environ.get("DSV3_LLAMA_CPP_CONVERTER", f"{prefix}/llama.cpp/convert_hf_to_gguf.py"))
    if not converter.is_file():
        pytest.skip(f"no llama.cpp converter at {converter}: run tests/interop/run.sh")
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "GEMM_SHAPE", (64, 64, 64))
    fields = {**PRESETS["small"].fields, "vocab_size": 512, "num_hidden_layers": 2, "n_routed_experts": 8}
    monkeypatch.setitem(PRESETS, "small", Preset("tiny", fields))
    path = tmp_path / "bench.json"
    arguments = ["small", "--contexts", "16,32", "--prefill", "24", "--rounds", "2", "--new-tokens", "3"]
    against = ["--against", f"llama.cpp={llama.python}", "--converter", str(converter), "--json", str(path)]
    result = CliRunner().invoke(app, ["bench", *arguments, *against])
    assert result.exit_code == 0, result.output
    results = json.loads(path.read_text())
    assert not results["failed"], results["failed"]
    assert results["contenders"]["llama.cpp bf16"]["version"].startswith("llama-cpp-python ")
    for entry in results["workloads"]:
        assert not entry["failed"]
        peers = {f"llama.cpp {kind}" for kind in ("bf16", "Q8_0", "Q4_0")}
        assert {"plugin", "transformers", *peers} == set(entry["contenders"])
        assert all(len(figures["seconds"]) == 2 for figures in entry["contenders"].values())
