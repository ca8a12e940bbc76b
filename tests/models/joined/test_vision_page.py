"""The Python of examples/vision.md runs, block after block."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.internvl import configuration_internvl, modeling_internvl


PAGE = Path(__file__).parents[3] / "examples" / "vision.md"


def test_blocks_of_the_page_run(make_model, byte_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = configuration_internvl.InternVLVisionConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 16],
        patch_size=[4, 4],
    )
    modeling_internvl.InternVLVisionModel(config).save_pretrained("tower")
    make_model(vocab_size=258).save_pretrained("dsv3-quickstart")
    byte_tokenizer.save_pretrained("dsv3-quickstart")
    Image.new("RGB", (20, 12), (90, 0, 0)).save("icon.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["text"].shape[1] > names["inputs"]["input_ids"].shape[1]
