"""The Python of examples/vision.md runs, block after block."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.internvl import modeling_internvl

from tests.serving.conftest import serving
from transformers_dsv3.generation.engine import Engine
from transformers_dsv3.serving.pictures import Pictures
from transformers_dsv3.serving.settings import MediaLimits


PAGE = Path(__file__).parents[3] / "examples" / "vision.md"


def test_blocks_of_the_page_run(make_model, byte_tokenizer, small_tower, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    modeling_internvl.InternVLVisionModel(small_tower).save_pretrained("tower")
    make_model(vocab_size=258).save_pretrained("dsv3-quickstart")
    byte_tokenizer.save_pretrained("dsv3-quickstart")
    Image.new("RGB", (20, 12), (90, 0, 0)).save("icon.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks[:-1]:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["text"].shape[1] > names["inputs"]["input_ids"].shape[1]
    model, processor = names["adapted"].unload(), names["processor"]
    engine = Engine(model, processor.tokenizer)
    engine.start()
    try:
        with serving(engine, model_name="joined", pictures=Pictures(model, processor, MediaLimits())) as client:
            exec(compile(blocks[-1].replace("http://127.0.0.1:8000", client.address), PAGE.name, "exec"), names)
    finally:
        engine.stop()
    assert names["chat"].usage.completion_tokens > 0
