"""Transformers 4, which many servers are built on: it opens a saved checkpoint and computes the plugin's logits."""

import json
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "peer_native.py"


@pytest.mark.parametrize("kind", ["yarn", "theta"])
def test_logits(peer, save, tokenizer, yarn, text, tmp_path, kind):
    transformers_4 = peer("DSV3_TRANSFORMERS_4_PYTHON", "transformers", '"transformers<5" torch==2.13.0', below=5)
    rope = yarn if kind == "yarn" else {"rope_type": "default", "rope_theta": 500.0}
    model = save(tmp_path / "saved", n_group=4, topk_group=2, rope_parameters=rope)
    ids = tokenizer(text)["input_ids"][:200]
    job = {"load": str(tmp_path / "saved"), "save": str(tmp_path / "theirs"), "max_shard_size": "10GB", "ids": ids}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    transformers_4.run(SCRIPT, tmp_path / "jobs.json")
    theirs = torch.load(tmp_path / "theirs" / "logits.pt")
    with torch.no_grad():
        difference = (model(torch.tensor([ids])).logits[0] - theirs).abs().max().item()
    print(f"Transformers 4: max |logit difference| {difference:.2e}")
    assert difference <= 1e-4
