"""What trains, adapts, rounds, explains and asks the text model, on a model with a vision tower."""

import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.internvl import modeling_internvl
from typer.testing import CliRunner

import transformers_dsv3
from transformers_dsv3_cli import server
from transformers_dsv3_cli.main import app


def inside(name):
    return name.startswith("model.language_model.")


@pytest.fixture(scope="module")
def joined(make_model, byte_tokenizer, small_tower, tmp_path_factory):
    """Folder with a joined model of wider layers, which can be rounded in groups of 32, and the processor."""
    folder = tmp_path_factory.mktemp("joined")
    torch.manual_seed(0)
    wider = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32}
    text = make_model(vocab_size=258, v_head_dim=16, **wider)
    tokenizer = copy.deepcopy(byte_tokenizer)
    model, processor = transformers_dsv3.join(modeling_internvl.InternVLVisionModel(small_tower), text, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


@pytest.fixture
def examples(joined):
    _, processor = joined
    rows = []
    for shade in range(4):
        image = Image.new("RGB", (20, 20), (60 * shade, 0, 0))
        given = processor(images=[image], text=f"<IMG_CONTEXT> It has shade {shade}.", return_tensors="pt")
        labels = given["input_ids"].masked_fill(given["input_ids"] >= 256, -100)
        rows.append({"input_ids": given["input_ids"][0], "labels": labels[0], "pixel_values": given["pixel_values"]})
    return rows


def collate(rows):
    return {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
    }


@pytest.mark.parametrize("targets", ["lora_config", "all-linear", ["kv_b_proj"]], ids=str)
def test_adapters_land_in_the_text(make_joined, targets):
    peft = pytest.importorskip("peft")
    model = make_joined()
    if targets == "lora_config":
        config = transformers_dsv3.lora_config(model, rank=2)
    else:
        config = peft.LoraConfig(target_modules=targets, r=2)
    adapted = peft.get_peft_model(model, config)
    names = {name.removeprefix("base_model.model.") for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert names and all(inside(name) and ".mtp." not in name for name in names)
    assert any(".experts." in name for name in names) == (targets != ["kv_b_proj"])
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)


def test_trainer_balances_trains_the_mtp_layers_and_saves(joined, examples, tmp_path):
    folder, _ = joined
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    callbacks = [transformers_dsv3.LoadBalancingCallback(), transformers_dsv3.MtpObjectiveCallback(0.3)]
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate, callbacks=callbacks)
    first = trainer.train().metrics["train_loss"]
    assert first > 0
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("vision_tower", "multi_modal_projector", "mtp.0.eh_proj", "e_score_correction_bias", "lm_head"):
        assert any(part in name for name in moved), part
    assert not model.config.text_config.mtp_loss_weight  # put back
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.slow
def test_sft_trainer_of_trl_with_pictures(joined, tmp_path):
    """Its loss is computed by itself; the MTP objective is carried all the same."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    folder, processor = joined
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [
        {
            "images": [Image.new("RGB", (20, 20), (60 * shade, 0, 0))],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Which? {shade}"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"shade {shade}"}]},
            ],
        }
        for shade in range(4)
    ]
    arguments = trl.SFTConfig(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, max_length=None, bf16=False
    )
    trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[transformers_dsv3.LoadBalancingCallback(), transformers_dsv3.MtpObjectiveCallback(0.3)],
    ).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for part in ("vision_tower", "multi_modal_projector", "mtp.0.eh_proj", "mlp.experts", "lm_head"):
        assert any(part in name for name in moved), part


def test_pipeline_and_four_bits_under_pictures(joined, examples, tmp_path):
    folder, processor = joined
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    row = {name: examples[1][name] for name in ("pixel_values",)} | {"input_ids": examples[1]["input_ids"][None, :12]}
    settings = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    plain = model.generate(**row, **settings)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.new("RGB", (20, 20), (60, 0, 0))
    said = ask(images=image, text="<IMG_CONTEXT> It ", max_new_tokens=8, return_full_text=False)
    assert isinstance(said[0]["generated_text"], str)
    tower = copy.deepcopy(model.model.vision_tower.state_dict())
    rounded = transformers_dsv3.quantize(model, bits=4)
    assert all(torch.equal(tensor, tower[name]) for name, tensor in rounded.model.vision_tower.state_dict().items())
    experts = rounded.get_decoder().layers[1].mlp.experts
    assert experts.gate_up_proj.dtype in (torch.uint8, torch.int8)
    said = rounded.generate(**row, **settings)
    assert said.shape == plain.shape and "* program" in transformers_dsv3.explain(rounded)
    rounded.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert loaded.get_decoder().layers[1].mlp.experts.gate_up_proj.dtype == experts.gate_up_proj.dtype
    assert torch.equal(loaded.generate(**row, **settings), said)


def test_the_text_alone_is_a_language_model(joined):
    folder, _ = joined
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(text) is transformers_dsv3.DeepseekV3ForCausalLM
    ids = torch.tensor([list(b"words")])
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(ids).logits)
    pages = [transformers_dsv3.explain(model).split("\n", 1)[1] for model in (text, whole)]
    assert pages[0] == pages[1] and "* program" in pages[0]
    assert AutoTokenizer.from_pretrained(folder).decode([104, 105])


def test_commands_take_the_folder(joined, tmp_path):
    folder, _ = joined
    (tmp_path / "text.txt").write_text("Words of a text. " * 400)
    run = CliRunner()
    said = run.invoke(app, ["explain", str(folder)])
    assert said.exit_code == 0 and "program" in said.output
    words = ["routing", str(folder), "--text", str(tmp_path / "text.txt"), "--window", "64", "--max-tokens", "512"]
    said = run.invoke(app, words)
    assert said.exit_code == 0 and "utilisation" in said.output, said.output
    words = ["evaluate", str(folder), "--text", str(tmp_path / "text.txt"), "--what", "text", "--window", "64"]
    said = run.invoke(app, [*words, "--json", str(tmp_path / "record.json")])
    assert said.exit_code == 0 and (tmp_path / "record.json").is_file(), said.output
    _, _, where = server._tokenizer(str(folder), SimpleNamespace(bits=None))
    assert server._model(str(folder), where, SimpleNamespace(bits=None, dtype="auto", device=None)).lm_head is not None
    said = run.invoke(app, ["compress", str(folder), "--output", str(tmp_path / "out"), "--bits", "4"])
    assert said.exit_code != 0 and "internvl" in said.output.replace("\n", " ")
