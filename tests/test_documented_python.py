"""The Python of the pages runs, each block by itself, on a small model in the place of the one it speaks of."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for pattern in ("*.md", "examples/*.md") for path in ROOT.glob(pattern)
)
# Run by a test of its own
OF_ITS_OWN = {
    "examples/compress.md": "tests/compression/test_compress.py",
    "examples/serve.md": "tests/serving/test_serve_page.py",
    "examples/share.md": "tests/hub/test_share_page.py",
    "examples/vision.md": "tests/models/joined/test_vision_page.py",
}
# Only compiled, and what they import looked up
NOT_RUN = {
    'device_map="cuda"': "needs a GPU",
    "distributed_config=": "needs two processes: tests/models/test_sharded_models.py",
    "PipelineTrainer(": "needs two processes: tests/training/test_pipeline.py",
    "CpuParallelismConfig()": "needs two processes: tests/training/test_parallel.py",
}


def documented():
    for page in PAGES:
        if page in OF_ITS_OWN:
            assert page.rpartition("/")[2] in (ROOT / OF_ITS_OWN[page]).read_text(encoding="utf-8")
            continue
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        yield from (pytest.param(block, id=f"{page} {number}") for number, block in enumerate(blocks, 1))


@pytest.fixture
def names(trained_model, byte_merges, tmp_path, monkeypatch):
    """What the pages' blocks take as given: a checkpoint here, the model of it, data, arguments."""
    monkeypatch.chdir(tmp_path)
    trained_model.save_pretrained("dsv3-quickstart")
    byte_merges.save_pretrained("dsv3-quickstart")
    tokenizer = AutoTokenizer.from_pretrained("dsv3-quickstart")
    ids = torch.arange(64).reshape(4, 16)
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "folder": "dsv3-quickstart",
        "tokenizer": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained("dsv3-quickstart"),
        "inputs": tokenizer("def main(", return_tensors="pt"),
        "args": TrainingArguments("run", max_steps=2, use_cpu=True, report_to="none", per_device_train_batch_size=2),
        "data": Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
    }


@pytest.mark.parametrize("block", list(documented()))
def test_blocks_run(block, names, capsys):
    block = block.replace("budget=0.001", "budget=0.02")  # of a model this small 0.1 % is not one rank
    block = block.replace('type="q4_0"', 'type="bf16"')  # groups of 32 do not divide this model's widths
    code = compile(block, "<page>", "exec")
    if any(part in block for part in NOT_RUN):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)
        return
    exec(code, names)
    if isinstance(names.get("trainer"), Trainer):
        assert names["trainer"].state.global_step == 2


def test_what_is_not_run_is_there():
    blocks = [block.values[0] for block in documented()]
    assert len(blocks) > 6
    for part in NOT_RUN:
        assert any(part in block for block in blocks), part
