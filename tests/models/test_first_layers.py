"""The first layers of a checkpoint that has MTP layers, beside native's; other ways in which checkpoints differ."""

import json

import pytest
import torch
from fp8_files import read_all, rewrite, write_fp8_checkpoint
from fp8_files import tiny_config as fp8_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from transformers_dsv3.models.dsv3.checkpoint_conversion_dsv3 import official_name


IDS = torch.arange(2, 14)[None]


@pytest.fixture(scope="module", params=["10GB", "40KB"], ids=["one file", "sharded"])
def folder(request, tmp_path_factory, make_model):
    """Four main layers and two of MTP."""
    folder = tmp_path_factory.mktemp("four_and_two")
    model = make_model(num_hidden_layers=4, num_nextn_predict_layers=2)
    model.save_pretrained(folder, max_shard_size=request.param)
    return folder


def native(folder, **fields):
    config = DeepseekV3Config.from_pretrained(folder, **fields)
    return DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def assert_no_mtp(model, folder, layers):
    assert len(model.base_model.layers) == layers and not model.base_model.mtp_layers
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (layers, 0)
    kept = {name.split("layers.")[1].split(".")[0] for name in read_all(folder) if "layers." in name}
    assert kept == {str(layer) for layer in range(layers)}


# Three leave one main layer where the first MTP layer is looked for, and an MTP layer where the second is
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_first_layers(folder, tmp_path, layers):
    expected = native(folder, num_hidden_layers=layers)
    with torch.no_grad():
        want = expected(IDS).logits
        model, info = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=layers, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
        decoder = AutoModel.from_pretrained(folder, num_hidden_layers=layers)
        torch.testing.assert_close(model.lm_head(decoder(IDS).last_hidden_state), want, rtol=1e-4, atol=1e-5)
        assert_no_mtp(model, tmp_path / "model", layers)
        assert_no_mtp(decoder, tmp_path / "decoder", layers)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        torch.testing.assert_close(native(tmp_path / "model")(IDS).logits, want)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
def test_first_layers_of_fp8(tmp_path, layers, cls):
    expected = write_fp8_checkpoint(
        tmp_path / "fp8", fp8_config(num_hidden_layers=3, num_nextn_predict_layers=1), (16, 16)
    )
    model = cls.from_pretrained(tmp_path / "fp8", num_hidden_layers=layers, dtype=torch.float32)
    for name, tensor in model.base_model.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(tensor, expected[f"model.{name}"].float()), name
    if layers == 2:
        for e, expert in enumerate(model.base_model.layers[1].mlp.experts.down_proj):
            assert torch.equal(expert, expected[f"model.layers.1.mlp.experts.{e}.down_proj.weight"].float())
    assert_no_mtp(model, tmp_path / "again", layers)


def test_mtp_layers_without_copies_of_embedding_and_head(folder, tmp_path):
    tensors = {
        name: tensor
        for name, tensor in read_all(folder).items()
        if not name.endswith("shared_head.head.weight") and ("embed_tokens" not in name or ".layers." not in name)
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    tmp_path.joinpath("config.json").write_text((folder / "config.json").read_text())
    rewrite(tmp_path, tensors)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    again.save_pretrained(tmp_path / "again")
    assert read_all(tmp_path / "again").keys() == read_all(folder).keys()


def test_a_prefix_that_the_user_names(folder, tmp_path):
    """The text part of a larger model. The prefix stays in what is saved, as native's renamings do."""
    tmp_path.joinpath("config.json").write_text((folder / "config.json").read_text())
    rewrite(tmp_path, {f"language_model.{name}": tensor for name, tensor in read_all(folder).items()})
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, key_mapping={r"^language_model\.": ""}, output_loading_info=True
    )
    assert not any(info.values()) and len(model.model.mtp_layers) == 2
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "again")
    assert read_all(tmp_path / "again").keys() == read_all(tmp_path).keys()


def test_a_decoder_alone_gives_its_layers_to_a_language_model(folder, tmp_path):
    decoder = AutoModel.from_pretrained(folder)
    decoder.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    for layers, mtp in ((4, 2), (3, 0)):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path, num_hidden_layers=layers, output_loading_info=True
        )
        assert info["missing_keys"] == {"lm_head.weight"} and len(model.model.mtp_layers) == mtp
        stored = read_all(tmp_path)
        for name, tensor in model.model.state_dict().items():
            if ".experts." not in name:
                assert torch.equal(tensor, stored[official_name(name, model.config)]), name


def test_names_of_the_decoder_with_and_without_its_prefix_in_one_file(folder, tmp_path):
    """As some tools merge them; Transformers adds the prefix name by name."""
    tensors = read_all(folder)
    mixed = {name.removeprefix("model.") if ".layers.1." in name else name: t for name, t in tensors.items()}
    tmp_path.joinpath("config.json").write_text((folder / "config.json").read_text())
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)
