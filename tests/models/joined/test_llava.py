"""CLIP's and SigLIP's towers joined to a text: `llava` checkpoints, beside native's class on the same files."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import transformers_dsv3
from transformers_dsv3.models.joined import llava
from transformers_dsv3.models.joined.processing_llava import LlavaProcessor


SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = 16


def tower_of(kind):
    torch.manual_seed(0)
    config, model = {"clip": (CLIPVisionConfig, CLIPVisionModel), "siglip": (SiglipVisionConfig, SiglipVisionModel)}[
        kind
    ]
    tower = model(config(**SMALL, image_size=16, patch_size=4))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tower


@pytest.fixture(scope="module", params=["clip", "siglip"])
def joined(request, make_model, byte_tokenizer, tmp_path_factory):
    """Folder with a joined model, and that model and its processor."""
    folder = tmp_path_factory.mktemp(request.param)
    tower_of(request.param).save_pretrained(folder / "tower")
    text = make_model(vocab_size=258, num_nextn_predict_layers=1)
    model, processor = transformers_dsv3.join(folder / "tower", text, byte_tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def asked(processor, pictures=2):
    content = [*[{"type": "image"}] * pictures, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.effect_noise((40, 30 + shade), 90).convert("RGB") for shade in range(pictures)]
    return processor(images=images, text=prompt, return_tensors="pt")


def test_native_opens_it_and_answers_the_same(joined, native_of, tmp_path, measured):
    folder, model, _ = joined
    assert type(model) is llava.LlavaForConditionalGeneration and not model.training
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is LlavaProcessor
    given = asked(processor)
    assert int((given["input_ids"] == model.config.image_token_id).sum()) == 2 * PATCHES
    again, native = AutoModelForImageTextToText.from_pretrained(folder).eval(), native_of(folder)
    assert type(native) is LlavaForConditionalGeneration
    with torch.no_grad():
        logits = [each(**given).logits for each in (model, again, native)]
    torch.testing.assert_close(logits[1], logits[0])
    error = float((logits[0] - logits[2]).abs().max() / logits[2].abs().max())
    measured["logits of a llava checkpoint beside native's, relative"] = error
    assert error < 1e-5
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    texts = [each.generate(**given, **settings) for each in (model, native)]
    assert torch.equal(*texts)
    assert torch.equal(again.generate(**given, **settings, use_mtp=True), texts[0])
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    native.save_pretrained(tmp_path / "native")
    ours = load_file(folder / "model.safetensors").items()
    kept = {name: each for name, each in ours if not name.startswith("language_model.model.layers.2.")}
    theirs = load_file(tmp_path / "native" / "model.safetensors")
    assert kept.keys() == theirs.keys() and all(torch.equal(kept[name], theirs[name]) for name in kept)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == ["LlavaForConditionalGeneration"] and fields["model_type"] == "llava"


def test_a_picture_goes_through_the_tower_once_and_the_text_stands_alone(joined, monkeypatch):
    folder, model, processor = joined
    given, seen, tower = asked(processor), [], model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda pixels, **rest: seen.append(len(pixels)) or tower(pixels, **rest)
    )
    settings = {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0}
    first = model.generate(**given, **settings)
    assert torch.equal(model.generate(**given, **settings), first) and seen == [2]
    with pytest.raises(ValueError, match=f"pictures take {PATCHES}"):
        model(input_ids=given["input_ids"], pixel_values=given["pixel_values"][:1])
    text = AutoModelForCausalLM.from_pretrained(folder).eval()
    words = torch.tensor([list(b"words")])
    with torch.no_grad():
        torch.testing.assert_close(text(words).logits, model(words).logits)
    clips = processor(text="<video> moves", videos=[[Image.new("RGB", (9, 9))] * 3], return_tensors="pt")
    assert clips["pixel_values"].shape == (3, 3, 16, 16)
    assert "Frame3: <image>" in processor.tokenizer.decode(clips["input_ids"][0])


def test_towers_of_folders_with_more_than_a_tower(joined, make_model, byte_tokenizer, tmp_path):
    folder, model, _ = joined
    text = make_model(vocab_size=258)
    of_joined, _ = transformers_dsv3.join(folder, text, byte_tokenizer)
    expected = model.model.vision_tower.state_dict()
    found = of_joined.model.vision_tower.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    if "clip" not in model.config.vision_config.model_type:
        return
    vision = SMALL | {"image_size": 16, "patch_size": 4}
    words = SMALL | {"vocab_size": 99, "projection_dim": 8}
    both = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=8))
    both.save_pretrained(tmp_path / "both")
    of_both, _ = transformers_dsv3.join(tmp_path / "both", text, byte_tokenizer)
    found, stored = of_both.model.vision_tower.state_dict(), both.state_dict()
    assert all(torch.equal(each, stored[f"vision_model.{name}"]) for name, each in found.items())
    with pytest.raises(ValueError, match="CLIPVisionModelWithProjection cannot be joined"):
        transformers_dsv3.join(CLIPVisionModelWithProjection(both.config.vision_config), text, byte_tokenizer)
    tensors = load_file(tmp_path / "both" / "model.safetensors")
    name = next(name for name in tensors if "vision_model" in name and "fc1.weight" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "both" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="both'` lacks 1 tensors of a CLIPVisionModel, such as .*fc1"):
        transformers_dsv3.join(tmp_path / "both", text, byte_tokenizer)


def test_another_tower_or_text_is_natives(tiny_config):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {"model_type": "pixtral", "image_size": 16, "patch_size": 4, "head_dim": 8, **small}
    for config in (
        LlavaConfig(vision_config=vision, text_config=tiny_config()),
        LlavaConfig(text_config={"model_type": "llama", "vocab_size": 99, **small}, vision_config={**vision}),
    ):
        model = AutoModelForImageTextToText.from_config(config)
        assert type(model) is LlavaForConditionalGeneration
        with pytest.raises(ValueError, match="transformers.LlavaForConditionalGeneration"):
            llava.LlavaForConditionalGeneration(config)
