"""Kimi's official files, read and written as they are, beside native's class on the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.deepseek_v3 import configuration_deepseek_v3
from transformers.models.kimi_k25 import configuration_kimi_k25, modeling_kimi_k25

import transformers_dsv3
from transformers_dsv3.models.joined.kimi import Kimi_K25ForConditionalGeneration, KimiVLForConditionalGeneration


TOKEN, VIDEO = 90, 91
WIDTH, HEADS = 32, 2
VISION = {
    "kimi_k25": {
        "vt_hidden_size": WIDTH,
        "vt_intermediate_size": 40,
        "vt_num_attention_heads": HEADS,
        "vt_num_hidden_layers": 2,
        "init_pos_emb_height": 8,
        "init_pos_emb_width": 8,
        "init_pos_emb_time": 4,
        "patch_size": 4,
        "merge_kernel_size": [2, 2],
        "mm_hidden_size": WIDTH,
        "projector_ln_eps": 1e-5,
    },
    "kimi_vl": {
        "model_type": "moonvit",
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "init_pos_emb_height": 8,
        "init_pos_emb_width": 8,
        "patch_size": 4,
        "merge_kernel_size": [2, 2],
    },
}
PROJECTOR = {
    "kimi_k25": {
        "pre_norm": "mm_projector.pre_norm",
        "in_proj": "mm_projector.proj.0",
        "out_proj": "mm_projector.proj.2",
    },
    "kimi_vl": {
        "pre_norm": "multi_modal_projector.pre_norm",
        "in_proj": "multi_modal_projector.linear_1",
        "out_proj": "multi_modal_projector.linear_2",
    },
}
CLASSES = {"kimi_k25": Kimi_K25ForConditionalGeneration, "kimi_vl": KimiVLForConditionalGeneration}


def interleaved(weight):
    """Rows of queries or keys from halves of a head, as native turns them, to pairs, as files have them."""
    return weight.unflatten(0, (HEADS, 2, -1)).transpose(1, 2).flatten(0, 2)


def official_tensors(native, kind):
    """The tensors of native's model by the names in official files, written down here from a release's index."""
    found = {}
    for name, tensor in native.state_dict().items():
        if name.startswith("model.language_model."):
            rest = name.removeprefix("model.language_model.")
            stack, _, leaf = rest.rpartition(".")
            if stack.endswith(".experts"):
                for e, expert in enumerate(tensor):
                    parts = {"down_proj": expert}
                    if leaf == "gate_up_proj":
                        gate, up = expert.chunk(2)
                        parts = {"gate_proj": gate, "up_proj": up}
                    for part, value in parts.items():
                        found[f"language_model.model.{stack}.{e}.{part}.weight"] = value
            else:
                found[f"language_model.model.{rest}"] = tensor
        elif name.startswith("lm_head."):
            found[f"language_model.{name}"] = tensor
        elif name.startswith("model.mm_projector."):
            _, _, part, leaf = name.split(".")
            found[f"{PROJECTOR[kind][part]}.{leaf}"] = tensor
        elif name.startswith("model.vision_tower.layers."):
            *_, layer, module, leaf = name.replace("mlp.fc", "mlp-fc").replace("attn.", "attn-").split(".")[2:]
            block = f"vision_tower.encoder.blocks.{layer}"
            plain = {"norm1": "norm0", "norm2": "norm1", "mlp-fc1": "mlp.fc0", "mlp-fc2": "mlp.fc1", "attn-proj": "wo"}
            if module in plain:
                found[f"{block}.{plain[module]}.{leaf}"] = tensor
            elif module == "attn-q_proj":
                attention = native.get_submodule(f"model.vision_tower.layers.{layer}.attn")
                q, k, v = (getattr(getattr(attention, each), leaf) for each in ("q_proj", "k_proj", "v_proj"))
                found[f"{block}.wqkv.{leaf}"] = torch.cat([interleaved(q), interleaved(k), v])
        elif "final_layernorm" in name:
            found[name.replace("model.vision_tower.", "vision_tower.encoder.")] = tensor
        elif name.endswith("position_embeddings"):
            found["vision_tower.patch_embed.pos_emb.weight"] = tensor
        else:
            found[name.removeprefix("model.")] = tensor
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.fixture(scope="module", params=["kimi_k25", "kimi_vl"])
def official(request, tiny_config, tmp_path_factory):
    """Kind, folder with official files, and native's model of the same weights around native's own text."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    # Queries without a low-rank projection, as Kimi-VL's: named as the tower's
    changed = {"q_lora_rank": None} if kind == "kimi_vl" else {}
    fields = tiny_config(num_nextn_predict_layers=0, **changed).to_dict()
    vision = VISION[kind]
    native_vision = configuration_kimi_k25.Kimi_K25VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        patch_size=4,
        pos_emb_height=8,
        pos_emb_width=8,
        pos_emb_time=4,
    )
    torch.manual_seed(0)
    transformers_dsv3.unregister()
    try:
        config = configuration_kimi_k25.Kimi_K25Config(
            text_config=configuration_deepseek_v3.DeepseekV3Config(**fields),
            vision_config=native_vision,
            projection_hidden_size=WIDTH,
            image_token_id=TOKEN,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
        )
        native = modeling_kimi_k25.Kimi_K25ForConditionalGeneration(config).eval()
    finally:
        transformers_dsv3.register()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(official_tensors(native, kind), folder / "model.safetensors", {"format": "pt"})
    text = json.loads(tiny_config(num_nextn_predict_layers=0, **changed).to_json_string())
    written = {
        "architectures": [CLASSES[kind].__name__.replace("_", "")],
        "auto_map": {"AutoConfig": "configuration_kimi.KimiConfig"},
        "model_type": kind,
        "text_config": text | {"model_type": {"kimi_k25": "kimi_k2", "kimi_vl": "deepseek_v3"}[kind]},
        "vision_config": vision,
        "media_placeholder_token_id": TOKEN,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    if kind == "kimi_k25":
        written["video_token_id"] = VIDEO
    (folder / "config.json").write_text(json.dumps(written))
    return kind, folder, native


@pytest.fixture
def pictures():
    """Two rows: one with pictures of 4x4 and 2x4 patches, one with one of 6x2, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, TOKEN, (2, 12), generator=generator)
    ids[0, 1:5] = ids[0, 6:8] = ids[1, 5:8] = TOKEN
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 6, 2]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3, 4, 4, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grid}


def test_official_files_give_natives_logits_and_text(official, pictures, measured):
    kind, folder, native = official
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(model) is CLASSES[kind] and type(model.get_decoder()) is transformers_dsv3.DeepseekV3Model
    shown = pictures["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (each(**pictures).logits[shown] for each in (model, native))
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    measured[f"logits of {kind}'s official files beside native's, relative"] = error
    assert error < 1e-5
    texts = [
        each.generate(**pictures, max_new_tokens=32, do_sample=False, eos_token_id=-1) for each in (model, native)
    ]
    assert torch.equal(*texts)


def test_official_files_are_written_again_as_they_were(official, tmp_path):
    kind, folder, _ = official
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == kind and fields["media_placeholder_token_id"] == TOKEN
    assert VISION[kind].items() <= fields["vision_config"].items()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_a_new_model_is_saved_with_official_names_and_its_mtp_layers(official, tiny_config, tmp_path):
    kind, folder, _ = official
    config = AutoConfig.from_pretrained(folder)
    config.text_config = tiny_config(mtp_loss_weight=0.3)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"language_model.model.layers.2.enorm.weight", "vision_tower.encoder.blocks.1.wqkv.bias"} <= names
    assert not [name for name in names if ".mtp." in name or name.startswith("model.")]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_video_of_k25(official, pictures):
    kind, folder, native = official
    if kind != "kimi_k25":
        pytest.skip("Kimi-VL has no videos")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = torch.randint(3, TOKEN, (1, 10), generator=torch.Generator().manual_seed(2))
    ids[0, 2:6] = VIDEO
    pixels = torch.randn(2 * 4 * 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 4]])}
    with torch.no_grad():
        pooled = native.model.vision_tower(pixels, grid_thw=given["video_grid_thw"]).pooler_output
        features = native.model.mm_projector(pooled).squeeze(1)
        embeds = native.get_input_embeddings()(ids.masked_fill(ids == VIDEO, 0))
        embeds[0, 2:6] = features
        expected = native(inputs_embeds=embeds).logits
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-5, atol=1e-5)
    first = model.generate(**given, max_new_tokens=1, do_sample=False, eos_token_id=-1)
    assert first[0, -1] == expected[0, -1].argmax()


def test_pictures_that_do_not_fit_are_refused(official, pictures):
    _, folder, _ = official
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(ValueError, match="has 9 tokens of id 90 .* pictures take 6"):
        model(
            **{
                **pictures,
                "image_grid_thw": pictures["image_grid_thw"][:2],
                "pixel_values": pictures["pixel_values"][:24],
            }
        )
    with pytest.raises(ValueError, match="24 patches, and `image_grid_thw` tells of 36"):
        model(**{**pictures, "pixel_values": pictures["pixel_values"][:24]})
    with pytest.raises(ValueError, match="belong together"):
        model.generate(**{**pictures, "image_grid_thw": None})


def test_four_bits_stay_packed_in_the_text(official, tiny_config, pictures, tmp_path):
    """In compressed-tensors' format, said in the text's config, as Kimi K2.5 is released."""
    kind, folder, _ = official
    config = AutoConfig.from_pretrained(folder)
    wider = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "v_head_dim": 16}
    config.text_config = tiny_config(**wider, q_lora_rank=32, num_nextn_predict_layers=1)
    torch.manual_seed(0)
    model = transformers_dsv3.quantize(AutoModelForImageTextToText.from_config(config).eval(), bits=4)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in fields
    assert fields["text_config"]["quantization_config"]["quant_method"] == "compressed-tensors"
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"language_model.model.layers.1.mlp.experts.0.gate_proj.weight_packed"} <= names
    assert {"vision_tower.encoder.blocks.0.wqkv.weight"} <= names
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    experts = loaded.get_decoder().layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == model.get_decoder().layers[1].mlp.experts.gate_up_proj.dtype == torch.uint8
    with torch.no_grad():
        torch.testing.assert_close(loaded(**pictures).logits, model(**pictures).logits)
