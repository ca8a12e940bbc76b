"""A digest stays with the contents: resharding keeps it, one changed bit does not."""

import hashlib
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from transformers_dsv3.evaluation.checkpoint_folder import CheckpointFolder
from transformers_dsv3.evaluation.checkpoint_identity import (
    checkpoint_digest,
    checkpoint_identity,
    config_digest,
)
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **fields):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


def test_sharding_and_names_do_not_matter(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "other", max_shard_size="40KB")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 2
    one, other = checkpoint_identity(folder), checkpoint_identity(tmp_path / "other", name="of/many")
    assert one.sha256 == other.sha256 and one.config_sha256 == other.config_sha256
    assert (one.name, other.name) == ("model", "of/many")


def test_the_digest_is_of_names_shapes_and_bytes(folder):
    """Made again from what the safetensors library reads."""
    digest = hashlib.sha256(config_digest(folder).encode())
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        content = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        digest.update(json.dumps([name, "F32", list(tensor.shape), content]).encode() + b"\n")
    assert checkpoint_digest(folder) == digest.hexdigest()


@pytest.mark.parametrize("change", ["bit", "name", "shape"])
def test_any_change_of_a_tensor_changes_it(folder, change):
    before = checkpoint_digest(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    if change == "bit":
        tensors[name].view(torch.int32)[3] ^= 1
    elif change == "shape":
        tensors[name] = tensors[name].reshape(2, -1)
    else:
        tensors["model.norm2.weight"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(folder) != before


def test_configuration(folder):
    before = checkpoint_digest(folder), config_digest(folder)
    edit(folder / "config.json", transformers_version="5.99", auto_map={"AutoConfig": "code.Config"})
    assert (checkpoint_digest(folder), config_digest(folder)) == before
    edit(folder / "config.json", routed_scaling_factor=2.0)
    assert checkpoint_digest(folder) != before[0] and config_digest(folder) != before[1]


def test_adapters(make_model, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj", "kv_b_proj", "q_b_proj"], init_lora_weights=False)
    adapted = get_peft_model(make_model(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert CheckpointFolder(tmp_path / "adapter").is_adapter
    before = checkpoint_digest(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    modules = json.loads(path.read_text())["target_modules"]
    edit(path, target_modules=modules[::-1], base_model_name_or_path="/somewhere/else")
    assert checkpoint_digest(tmp_path / "adapter") == before
    edit(path, lora_alpha=3)
    assert checkpoint_digest(tmp_path / "adapter") != before


def test_what_is_no_checkpoint_is_refused_by_name(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        checkpoint_digest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is no checkpoint: it has neither config.json nor adapter_config"):
        checkpoint_digest(tmp_path / "empty")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="empty is no checkpoint: it has neither model.safetensors"):
        checkpoint_digest(tmp_path / "empty")
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json is not a configuration"):
        checkpoint_digest(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        checkpoint_digest(folder)
