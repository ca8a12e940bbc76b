"""An unchanged `SFTTrainer` script on the plugin's model and on Transformers' own: the same losses."""

import json

import torch
from datasets import Dataset
from safetensors import safe_open
from trl import SFTConfig, SFTTrainer

import transformers_dsv3


def losses(model, tokenizer, folder):
    texts = ["def double(x): return 2 * x", "import os\n", "for row in rows: print(row)"] * 4
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer, torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


def test_sft_trainer_runs_unchanged(make_model, native_twin, byte_tokenizer, tmp_path):
    model = make_model(vocab_size=len(byte_tokenizer))
    model.save_pretrained(tmp_path / "model")
    native = native_twin(model).train()
    _, expected = losses(native, byte_tokenizer, tmp_path / "native")
    assert len(expected) == 3 and expected[2] < expected[0]
    # A model, or the path of one, which TRL loads by the class name in its config
    for given in (model.train(), str(tmp_path / "model")):
        transformers_dsv3.register(names=True)
        try:
            trainer, seen = losses(given, byte_tokenizer, tmp_path / "plugin")
        finally:
            transformers_dsv3.register()
        assert type(trainer.model) is transformers_dsv3.Dsv3ForCausalLM
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        with safe_open(tmp_path / "plugin" / "model.safetensors", framework="pt") as saved:
            assert "model.layers.2.eh_proj.weight" in saved.keys()
        config = json.loads((tmp_path / "plugin" / "config.json").read_text())
        assert config["architectures"] == ["DeepseekV3ForCausalLM"]
