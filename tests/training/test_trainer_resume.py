"""`Trainer` resumes from its own checkpoints, which are official ones: the experts come back too."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.rows = torch.randint(0, 96, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model, folder, steps, **resume):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(64)).train(**resume)
    return model


def test_resumed_run_equals_an_uninterrupted_one(make_model, tmp_path, caplog, monkeypatch):
    whole = train(make_model(mtp_loss_weight=0.3), tmp_path / "whole", 6)
    train(make_model(mtp_loss_weight=0.3), tmp_path / "parts", 3)
    # Other weights, which the checkpoint must replace
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    resumed = train(make_model(mtp_loss_weight=0.3, seed=1), tmp_path / "parts", 6, resume_from_checkpoint=True)
    assert "keys" not in caplog.text  # it would warn of missing ones and of the MTP layers' copies
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_state_dicts_of_official_names(make_model):
    source, target = make_model(seed=0), make_model(seed=1)
    state = {}
    for name, tensor in source.state_dict().items():
        prefix = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
        if not prefix.endswith(".experts"):
            state[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            parts = {"down_proj": weight}
            if name.endswith("gate_up_proj"):
                parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            state.update({f"{prefix}.{expert}.{part}.weight": value for part, value in parts.items()})
    assert any(".experts.7.up_proj.weight" in name for name in state)

    # In two shards, each with a part of every layer's experts
    names = sorted(state)
    for shard in (names[::2], names[1::2]):
        target.load_state_dict({name: state[name] for name in shard}, strict=False)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name

    copies = {f"model.layers.2.{name}": torch.ones(1) for name in ("embed_tokens.weight", "shared_head.head.weight")}
    assert target.load_state_dict({**state, **copies}, strict=False) == ([], [])
    result = target.load_state_dict({**state, "model.layers.1.embed_tokens.weight": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["model.layers.1.embed_tokens.weight"]  # of a layer that is no MTP layer

    target.load_state_dict(state)
    broken = {name: tensor for name, tensor in state.items() if not name.endswith("experts.3.down_proj.weight")}
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight"):
        target.load_state_dict(broken)
    extra = {**state, "model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(24, 32)}
    with pytest.raises(RuntimeError, match=r"Unexpected.*experts\.8\.up_proj"):
        target.load_state_dict(extra)
    wrong = {**state, "model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match=r"experts\.0\.up_proj\.weight has shape \(2, 2\), not \(24, 32\)"):
        target.load_state_dict(wrong)
