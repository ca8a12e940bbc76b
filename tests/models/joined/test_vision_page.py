"""The Python of examples/vision.md runs, block after block."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.internvl import modeling_internvl


PAGE = Path(__file__).parents[3] / "examples" / "vision.md"


def test_blocks_of_the_page_run(make_model, byte_tokenizer, small_tower, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    modeling_internvl.InternVLVisionModel(small_tower).save_pretrained("tower")
    make_model(vocab_size=258).save_pretrained("dsv3-quickstart")
    byte_tokenizer.save_pretrained("dsv3-quickstart")
    Image.new("RGB", (20, 12), (90, 0, 0)).save("icon.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["text"].shape[1] > names["inputs"]["input_ids"].shape[1]
