"""A checkpoint pruned and healed in one call: what it is, resuming, and bad input."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_dsv3.compression import prune_and_heal as module
from transformers_dsv3.compression.expert_pruning import expert_importance, prune_experts
from transformers_dsv3.compression.prune_and_heal import prune_and_heal
from transformers_dsv3.option_error import OptionError


WINDOWS = torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = {"use_cpu": True, "full_determinism": True}


@pytest.fixture
def folder(make_model, tmp_path):
    path = tmp_path / "whole"
    make_model().save_pretrained(path)
    (path / "tokenizer_config.json").write_text("{}")
    return path


def test_without_healing_it_is_the_pruned_checkpoint(folder, tmp_path):
    kept = prune_and_heal(folder, tmp_path / "out", 0.25, WINDOWS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert kept == prune_experts(model, 0.25, expert_importance(model, WINDOWS.flatten(), window=16))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(pruned.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_stopped_while_healing(folder, tmp_path, monkeypatch):
    """The same call goes on from what is finished, and ends at the same weights; another one does not."""
    arguments = {"by": "random", "heal_steps": 2, "save_steps": 1, **OPTIONS}
    prune_and_heal(folder, tmp_path / "one", 0.25, WINDOWS, **arguments)
    healed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "whole"))
    assert json.loads((tmp_path / "one" / "config.json").read_text())["n_routed_experts"] == 6
    assert (tmp_path / "one" / "tokenizer_config.json").exists() and healed.keys() < whole.keys()
    assert not torch.equal(healed["lm_head.weight"], whole["lm_head.weight"])

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_companions", stop)  # of the healed one
        with pytest.raises(KeyboardInterrupt):
            prune_and_heal(folder, tmp_path / "two", 0.25, WINDOWS, **arguments)
    assert not (tmp_path / "two").exists()
    with pytest.raises(OptionError, match="another seed"):
        prune_and_heal(folder, tmp_path / "two", 0.25, WINDOWS, seed=1, **arguments)
    monkeypatch.setattr(module, "prune_checkpoint", stop)  # which is done
    prune_and_heal(folder, tmp_path / "two", 0.25, WINDOWS, **arguments)
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert again.keys() == healed.keys() and all(torch.equal(again[name], healed[name]) for name in healed)
    assert sorted(os.listdir(tmp_path)) == ["one", "two", "whole"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"share": 0.3}, "--prune"),
        ({"by": "size"}, "--prune-by"),
        ({"heal_steps": -1}, "--heal"),
        ({"output": "whole"}, "--output"),
        ({"checkpoint": "nothing"}, "CHECKPOINT"),
    ],
)
def test_bad_input_is_refused_before_work(folder, tmp_path, arguments, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as refused:
        prune_and_heal(**{"checkpoint": folder, "output": "out", "share": 0.25, "windows": WINDOWS, **arguments})
    assert refused.value.option == option and os.listdir(tmp_path) == ["whole"]
