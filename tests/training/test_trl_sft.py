"""An unchanged `SFTTrainer` script on the plugin's model and on Transformers' own: the same losses."""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


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
        model=model.train(),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    return torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


def test_sft_trainer_runs_unchanged(make_model, native_twin, byte_tokenizer, tmp_path):
    model = make_model(vocab_size=len(byte_tokenizer))
    expected = losses(native_twin(model), byte_tokenizer, tmp_path / "native")
    assert len(expected) == 3 and expected[2] < expected[0]
    torch.testing.assert_close(losses(model, byte_tokenizer, tmp_path / "plugin"), expected, rtol=1e-4, atol=1e-4)
