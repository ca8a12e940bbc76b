"""TRL: what its trainers saved with the plugin is opened without, and trained on there with the plugin's losses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "peer_peft_trl.py"
IDS = list(range(3, 67))
TEXTS = ["JSON is a subset of JavaScript", "a lightweight data interchange format", "it is used by default", "pretty"]
PAIRS = [{"prompt": text[:8], "chosen": text[8:], "rejected": text[:7:-1]} for text in TEXTS]


def peer_module():
    """Trains here by the same lines as there."""
    spec = importlib.util.spec_from_file_location("peer_peft_trl", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checkpoints(peer, save, tmp_path, kind):
    plain = peer("DSV3_TRL_PYTHON", "trl", "trl")
    save(tmp_path / "start")
    make, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[kind]
    rows = PAIRS if kind == "dpo" else [{"text": text} for text in TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    trainer = make(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "start"),
        args=config(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[LoadBalancingCallback(), MtpObjectiveCallback()] if kind == "sft" else [],
    )
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    job = {"name": kind, "model": checkpoint, "ids": IDS, "trainer": kind, "texts": PAIRS if kind == "dpo" else TEXTS}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    plain.run(SCRIPT, tmp_path / "jobs.json", tmp_path)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(torch.tensor([IDS])).logits[0]
    theirs = torch.load(tmp_path / f"{kind}.pt")
    difference = (theirs - ours).abs().max().item()
    logged, native = peer_module().train(job, tmp_path), json.loads((tmp_path / "logged.json").read_text())[kind]
    print(
        f"TRL, {kind}: max |difference| of logits {difference:.2e} (deviation {ours.std():.2f}), "
        f"next step {logged}, native's {native}"
    )
    assert difference <= 1e-4 * ours.std()
    # DPO's first loss is log 2 whatever the model: its log-probabilities are compared
    assert logged == pytest.approx(native, rel=1e-4) and len(logged) == (1 if kind == "sft" else 3)
