"""A vision tower joined to our text behind the Auto classes, beside native's class on the same files."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, InternVLConfig
from transformers.models.internvl import modeling_internvl

import transformers_dsv3
from transformers_dsv3.models.dsv3.checkpoint_dsv3 import CheckpointError
from transformers_dsv3.models.joined.features import FeatureCache
from transformers_dsv3.models.joined.internvl import InternVLForConditionalGeneration


IMAGE = 90


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_text_are_natives_on_the_same_files(make_joined, native_of, prompt, tmp_path, tied, measured):
    made = make_joined(tied=tied)
    made.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(model) is InternVLForConditionalGeneration
    assert type(model.model.language_model) is transformers_dsv3.DeepseekV3Model
    native = native_of(tmp_path)
    assert type(native.model.language_model).__module__.startswith("transformers.")
    shown = prompt["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = model(**prompt), native(**prompt)
    error = relative(ours.logits[shown], theirs.logits[shown])
    measured["logits with pictures beside native's, relative"] = error
    assert error < 1e-5
    torch.testing.assert_close(ours.image_hidden_states, theirs.image_hidden_states)
    if tied:
        assert model.lm_head.weight is model.get_input_embeddings().weight
    else:
        assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    texts = [each.generate(**prompt, max_new_tokens=32, do_sample=False, eos_token_id=-1) for each in (model, native)]
    assert torch.equal(*texts)


def test_a_file_is_official_and_the_same_after_each_save(make_joined, native_of, tmp_path):
    model = make_joined(mtp_loss_weight=0.3, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    model.save_pretrained(tmp_path / "ours")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layer = "language_model.model.layers.2."
    assert {layer + name for name in ("enorm.weight", "embed_tokens.weight", "shared_head.head.weight")} <= names
    assert not [name for name in names if ".mtp." in name]
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["architectures"] == ["InternVLForConditionalGeneration"]
    text = fields["text_config"]
    assert text["architectures"] == ["DeepseekV3ForCausalLM"] and text["model_type"] == "deepseek_v3"
    assert text["rope_theta"] == 1e4 and text["rope_scaling"]["rope_type"] == "yarn"
    assert "mtp_loss_weight" not in text and "seq_aux_loss_weight" not in text

    native_of(tmp_path / "ours").save_pretrained(tmp_path / "native")
    ours, theirs = (load_file(tmp_path / of / "model.safetensors") for of in ("ours", "native"))
    assert {name for name in ours if not name.startswith(layer)} == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_that_native_tied_stays_tied(joined_config, native_of, tmp_path):
    """Its config says so by native's own field alone, and the file has no head."""
    config = joined_config(num_nextn_predict_layers=0)
    config.tie_word_embeddings = True
    modeling_internvl.InternVLForConditionalGeneration(config).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    # Of a config alone, a head of its own that the text asks for is not lost
    model = AutoModelForImageTextToText.from_config(config)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_another_text_stays_natives(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = InternVLConfig(
        vision_config={**small, "image_size": [8, 8], "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", **small, "num_key_value_heads": 2, "vocab_size": 32},
        image_token_id=30,
    )
    native = modeling_internvl.InternVLForConditionalGeneration
    model = AutoModelForImageTextToText.from_config(config)
    assert type(model) is native
    model.save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is native
    assert type(InternVLForConditionalGeneration.from_pretrained(tmp_path)) is native
    with pytest.raises(ValueError, match="transformers.InternVLForConditionalGeneration"):
        InternVLForConditionalGeneration(config)


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import InternVLForConditionalGeneration; import transformers_dsv3",
        "import transformers_dsv3; from transformers import InternVLForConditionalGeneration",
        "import transformers_dsv3; from transformers import InternVLConfig",
        "import transformers_dsv3.models.joined.internvl",
        "import transformers_dsv3; transformers_dsv3.unregister(); transformers_dsv3.register()",
    ],
)
@pytest.mark.slow
def test_whoever_is_imported_first(first):
    code = (
        f"{first}\n"
        "import transformers_dsv3\n"
        "from transformers import AutoModelForImageTextToText, InternVLConfig\n"
        "found = lambda: AutoModelForImageTextToText._model_mapping[InternVLConfig].__module__.split('.')[0]\n"
        "assert found() == 'transformers_dsv3'\n"
        "transformers_dsv3.unregister()\n"
        "assert found() == 'transformers'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_unregister_gives_it_back(tmp_path):
    transformers_dsv3.unregister()
    try:
        found = AutoModelForImageTextToText._model_mapping[InternVLConfig]
    finally:
        transformers_dsv3.register()
    assert found is modeling_internvl.InternVLForConditionalGeneration
    assert AutoModelForImageTextToText._model_mapping[InternVLConfig] is InternVLForConditionalGeneration
    assert AutoConfig.for_model("internvl").model_type == "internvl"


def test_missing_and_extra_tensors_are_named(make_joined, tmp_path):
    model = make_joined()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expert = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if name != expert}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.up_proj"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    projector = "multi_modal_projector.linear_1.weight"
    save_file(
        tensors | {projector: tensors[projector][:, :-1].clone()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=projector):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    without_mtp = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    save_file(without_mtp, tmp_path / "model.safetensors", {"format": "pt"})
    assert not AutoModelForImageTextToText.from_pretrained(tmp_path).get_decoder().mtp_layers


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "sampling": "exact"}, {"use_mtp": True}], ids=str)
def test_padding_on_either_side_gives_the_same_text(make_joined, prompt, settings):
    model = make_joined()
    settings = {"max_new_tokens": 16, "eos_token_id": -1, "pad_token_id": 0} | settings
    row = {"input_ids": prompt["input_ids"][1:, 3:], "pixel_values": prompt["pixel_values"][2:]}
    order = torch.cat([torch.arange(3, 14), torch.arange(3)])
    right = {name: prompt[name].clone() for name in ("input_ids", "attention_mask")} | {
        "pixel_values": prompt["pixel_values"]
    }
    for name in ("input_ids", "attention_mask"):
        right[name][1] = right[name][1, order]
    texts = []
    for given in (prompt, right):
        torch.manual_seed(0)
        texts.append(model.generate(**given, **settings)[:, 14:])
    assert torch.equal(*texts)
    if not settings.get("do_sample"):
        plain = model.generate(**row, **(settings | {"use_mtp": False}))
        assert torch.equal(texts[0][1], plain[0, 11:])


def test_mtp_decoding_drafts_and_writes_the_same(make_joined, prompt):
    model = make_joined()
    settings = {"max_new_tokens": 24, "eos_token_id": -1, "pad_token_id": 0}
    plain = model.generate(**prompt, **settings)
    output = model.generate(**prompt, **settings, use_mtp=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain) and output.mtp_drafted_tokens > 0


def test_a_conversation_goes_on_in_its_cache(make_joined, prompt):
    model = make_joined()
    settings = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    row = {"input_ids": prompt["input_ids"][:1], "pixel_values": prompt["pixel_values"][:2]}
    first = model.generate(**row, **settings, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    whole = model.generate(more, pixel_values=row["pixel_values"], **settings)
    going_on = model.generate(more, past_key_values=first.past_key_values, **settings)
    assert torch.equal(whole, going_on)
    again = model.generate(**row, **settings, return_dict_in_generate=True)
    with_pictures = model.generate(
        more, pixel_values=row["pixel_values"], past_key_values=again.past_key_values, **settings
    )
    assert torch.equal(whole, with_pictures)


def test_training_reaches_all_and_the_mtp_loss_is_the_texts(make_joined, prompt):
    """The MTP objective over merged embeddings is that of the text model on the same embeddings."""
    model = make_joined(mtp_loss_weight=0.3).train()
    labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == IMAGE, -100)
    output = model(**prompt, labels=labels)
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert output.mtp_loss > 0
    for part in ("vision_tower", "multi_modal_projector", "mlp.experts", "mtp.0.eh_proj", "lm_head"):
        found = [grad for name, grad in grads.items() if part in name]
        assert found and all(grad is not None for grad in found), part
    embeds = model.merged(prompt["input_ids"], pixel_values=prompt["pixel_values"]).detach()
    text = model.causal_lm
    text.zero_grad()
    alone = text(inputs_embeds=embeds, attention_mask=prompt["attention_mask"], labels=labels)
    torch.testing.assert_close(alone.loss, output.loss)
    torch.testing.assert_close(alone.mtp_loss, output.mtp_loss)
    alone.loss.backward()
    name = "model.language_model.mtp.0.eh_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, grads[name])


def test_idle_mtp_layers_are_frozen(make_joined):
    model = make_joined().train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".mtp.0." in name for name in frozen)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_pictures_that_do_not_fit_are_refused_before_the_tower(make_joined, prompt, call, monkeypatch):
    model = make_joined()
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: pytest.fail("the tower ran"))
    run = {"forward": model, "generate": model.generate}[call]
    pixels = prompt.pop("pixel_values")
    with pytest.raises(ValueError, match="has 12 tokens of id 90 .* pictures take 8"):
        run(**prompt, pixel_values=pixels[:2])
    with pytest.raises(ValueError, match="cut off"):
        run(prompt["input_ids"][:, :5], pixel_values=pixels)
    with pytest.raises(ValueError, match="the pictures take 0"):
        run(**prompt)
    with pytest.raises(ValueError, match="`pixel_values` must be"):
        run(**prompt, pixel_values=pixels[None])


def test_a_picture_goes_through_the_tower_once(make_joined, prompt, monkeypatch):
    model = make_joined()
    seen, tower = [], model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda **given: seen.append(len(given["pixel_values"])) or tower(**given)
    )
    settings = {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0}
    first = model.generate(**prompt, **settings)
    assert torch.equal(model.generate(**prompt, **settings), first) and seen == [3]
    other = prompt["pixel_values"].clone()
    other[1] += 1
    changed = model.generate(**prompt | {"pixel_values": other}, **settings)
    assert seen == [3, 1]
    assert torch.equal(changed, copy.deepcopy(model).generate(**prompt | {"pixel_values": other}, **settings))
    seen.clear()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(2)
    model.generate(**prompt, **settings)
    assert seen == [3]


def test_kept_features_have_a_bound():
    cache, made = FeatureCache(most_bytes=3 * 4 * 2), []
    pictures = [torch.full((2, 2), float(value)) for value in range(4)]

    def ask(*places):
        def compute(missing):
            made.extend(places[at] for at in missing)
            return [pictures[places[at]][0] for at in missing]

        found = cache.features([pictures[place] for place in places], [], compute)
        assert all(torch.equal(one, pictures[place][0]) for one, place in zip(found, places, strict=True))

    ask(0, 1, 0, 2)
    ask(0)
    ask(3)  # in the place of 1, which was used the longest ago
    ask(0, 2, 3)
    assert sorted(made) == [0, 1, 2, 3]
    ask(1)
    assert made[-1] == 1 and len(made) == 5


def test_attention_that_was_reset_around_the_text_is_the_default(make_joined, prompt):
    """Without one Transformers makes no mask, and words would see those behind them."""
    model = make_joined()
    with torch.no_grad():
        expected = model(**prompt).logits
        for config in (model.config, model.config.text_config):
            config._attn_implementation = None
            model.model.vision_tower.config._attn_implementation = "sdpa"
            torch.testing.assert_close(model(**prompt).logits, expected)
    assert model.config.text_config._attn_implementation == "sdpa"
