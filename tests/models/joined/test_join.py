"""A tower and a text joined, saved, and opened by native's classes without the plugin."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers.models.internvl import configuration_internvl, modeling_internvl

import transformers_dsv3
from transformers_dsv3.models.joined.internvl import InternVLForConditionalGeneration
from transformers_dsv3.models.joined.processing_internvl import InternVLProcessor


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    config = configuration_internvl.InternVLVisionConfig(**SMALL, image_size=[16, 16], patch_size=[4, 4])
    model = modeling_internvl.InternVLVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def text(request, make_model):
    return make_model(vocab_size=258, tie_word_embeddings=request.param, num_nextn_predict_layers=1)


def picture(shade, size=(80, 60)):
    return Image.effect_noise(size, 90).convert("RGB").point(lambda value: (value + shade) % 256)


def test_joined_saved_and_opened_by_native(tower, text, byte_tokenizer, native_of, tmp_path, measured):
    head = text.lm_head.weight[:258].clone()
    alone = copy.deepcopy(text)
    model, processor = transformers_dsv3.join(tower, text, byte_tokenizer)
    assert type(model) is InternVLForConditionalGeneration and not model.training
    assert model.get_input_embeddings().weight is text.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight[:258], head) and len(model.lm_head.weight) == 262
    tied = text.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    words = torch.tensor([list(b"The text is what it was.")])
    with torch.no_grad():
        torch.testing.assert_close(model(words).logits[..., :258], alone(words).logits)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And it?"}]},
    ]
    processor = AutoProcessor.from_pretrained(tmp_path)  # needs no torchvision
    assert type(processor) is InternVLProcessor
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<IMG_CONTEXT>\nWhat is it?\nA picture.\n<IMG_CONTEXT>\nAnd it?\n"
    given = processor(images=[picture(0), picture(9)], text=prompt, return_tensors="pt")
    assert given["pixel_values"].shape == (2, 3, 16, 16)  # an icon is not cut into tiles
    given = {name: tensor for name, tensor in given.items() if name != "num_patches"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    native = native_of(tmp_path)
    with torch.no_grad():
        logits = [each(**given).logits for each in (model, again, native)]
    torch.testing.assert_close(logits[1], logits[0])
    error = float((logits[0] - logits[2]).abs().max() / logits[2].abs().max())
    measured["logits of a joined model beside native's, relative"] = error
    assert error < 1e-5
    texts = [each.generate(**given, max_new_tokens=32, do_sample=False, eos_token_id=-1) for each in (model, native)]
    assert torch.equal(*texts)
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    native.save_pretrained(tmp_path / "native")
    kept = {name: each for name, each in load_file(tmp_path / "model.safetensors").items() if ".layers.2." not in name}
    theirs = load_file(tmp_path / "native" / "model.safetensors")
    assert kept.keys() == theirs.keys() and all(torch.equal(kept[name], theirs[name]) for name in kept)


def test_towers_of_folders(tower, make_model, make_joined, byte_tokenizer, tmp_path):
    tower.save_pretrained(tmp_path / "tower")
    make_joined().save_pretrained(tmp_path / "internvl")
    make_model(vocab_size=258).save_pretrained(tmp_path / "text")
    byte_tokenizer.save_pretrained(tmp_path / "text")
    from_tower, _ = transformers_dsv3.join(tmp_path / "tower", tmp_path / "text")
    expected = tower.state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in from_tower.model.vision_tower.state_dict().items())
    other = AutoModelForImageTextToText.from_pretrained(tmp_path / "internvl").model.vision_tower.state_dict()
    from_joined, processor = transformers_dsv3.join(tmp_path / "internvl", tmp_path / "text", tiles=4)
    assert all(torch.equal(each, other[name]) for name, each in from_joined.model.vision_tower.state_dict().items())
    assert processor.image_processor.max_patches == 4
    assert processor.image_processor.size["height"] == 16


def test_a_template_of_the_texts_own_stays(tower, make_model, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    _, processor = transformers_dsv3.join(tower, make_model(vocab_size=258), tokenizer)
    content = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "video"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    said = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert said == "[user] Look: <IMG_CONTEXT>\n<video>\n;[assistant] Yes.;[assistant]"


def test_bad_arguments_are_named(tower, make_model, byte_tokenizer, tmp_path):
    text = make_model(vocab_size=258)
    clip = CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=16, patch_size=4))
    with pytest.raises(ValueError, match="`tiles=2`.*`llava` checkpoint"):
        transformers_dsv3.join(clip, text, byte_tokenizer, tiles=2)
    with pytest.raises(ValueError, match="`vision`: a DeepseekV3Model cannot be joined"):
        transformers_dsv3.join(text, text, byte_tokenizer)
    with pytest.raises(ValueError, match="`vision=.*'`: a tower of type deepseek_v3 cannot be joined"):
        text.config.save_pretrained(tmp_path)
        transformers_dsv3.join(tmp_path, text, byte_tokenizer)
    with pytest.raises(ValueError, match="`text`.*InternVLVisionModel"):
        transformers_dsv3.join(tower, tower, byte_tokenizer)
    with pytest.raises(ValueError, match="`tokenizer`"):
        transformers_dsv3.join(tower, text)
    with pytest.raises(ValueError, match="`tiles=0`"):
        transformers_dsv3.join(tower, text, byte_tokenizer, tiles=0)


@pytest.mark.slow
def test_a_process_without_the_plugin(tower, make_model, byte_tokenizer, tmp_path):
    model, processor = transformers_dsv3.join(tower, make_model(vocab_size=258), byte_tokenizer)
    model.save_pretrained(tmp_path)
    given = processor(images=[picture(3)], text="<IMG_CONTEXT> What?", return_tensors="pt")
    given = {name: given[name] for name in ("input_ids", "pixel_values")}
    torch.save(given, tmp_path / "given.pt")
    code = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"folder = {str(tmp_path)!r}\n"
        "model = AutoModelForImageTextToText.from_pretrained(folder).eval()\n"
        "assert 'transformers_dsv3' not in sys.modules\n"
        "given = torch.load(folder + '/given.pt')\n"
        "text = model.generate(**given, max_new_tokens=32, do_sample=False, eos_token_id=-1)\n"
        "print(json.dumps(text.tolist()))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600).stdout
    ours = model.generate(**given, max_new_tokens=32, do_sample=False, eos_token_id=-1)
    assert json.loads(said.splitlines()[-1]) == ours.tolist()
