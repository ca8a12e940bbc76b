"""`examples/lora_sft.py` as users run it: from a checkpoint, killed and resumed, on their own data, and refused."""

import json
import runpy
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, pipeline

from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_digest
from transformers_dsv3.evaluation.training_record import read_training_record


pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def example(make_example):
    return make_example(
        "lora_sft.py",
        "--max_steps 12 --save_steps 4 --max_length 32 --logging_steps 4 --disable_tqdm true --budget 0.1",
    )


@pytest.fixture(scope="module")
def datasets(base):
    """Prompts and completions, a file that is broken, and one of other columns."""
    lines = (base / "general.txt").read_text().splitlines()
    rows = [json.dumps({"prompt": line[:20], "completion": line[20:]}) for line in lines[:60]]
    (base / "pairs.jsonl").write_text("\n".join(rows))
    (base / "broken.jsonl").write_text('{"text": \n')
    (base / "empty.jsonl").write_text("")
    chat = [{"role": "user", "content": "ash"}, {"role": "assistant", "content": "elm"}]
    (base / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 4))
    (base / "columns.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    return base


@pytest.fixture(scope="module")
def whole(example, base, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, example.run(base, output)


def test_adapts_to_the_reference_documentation(base, whole):
    output, printed = whole
    assert "topics held out" in printed and "LoRA of rank" in printed
    before, after = (json.loads((output / f"{name}_results.json").read_text()) for name in ("before", "eval"))
    assert after["eval_domain_loss"] < before["eval_domain_loss"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "model"), output).eval()
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        expected = adapted(tokens).logits
        for cls in (AutoModelForCausalLM, DeepseekV3ForCausalLM):  # the latter is Transformers' own
            torch.testing.assert_close(
                cls.from_pretrained(output / "merged").eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4
            )
    record = read_training_record(output / "training_record.json")
    assert record["results"][0]["after"] == after["eval_domain_loss"]
    assert record["checkpoint"]["sha256"] == checkpoint_digest(output)
    assert record["tokens"] > 0 and len(record["data"]["sha256"]) == 64
    assert not (output / "README.md").exists()  # PEFT's template
    for folder in (output, output / "merged"):
        assert pipeline("text-generation", model=str(folder))("ash", max_new_tokens=4)[0]["generated_text"]


def test_killed_and_resumed_it_ends_at_the_same_weights(example, base, whole, tmp_path):
    output = tmp_path / "out"
    for place in ("checkpoint-4", "saving.partial"):
        example.kill_at(base, output, place)
    example.run(base, output)
    expected = load_file(whole[0] / "adapter_model.safetensors")
    seen = load_file(output / "adapter_model.safetensors")
    assert expected.keys() == seen.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)


@pytest.mark.slow
def test_prompts_and_completions(example, base, datasets, tmp_path):
    printed = example.run(
        base, tmp_path / "out", "--dataset", base / "pairs.jsonl", "--packing", "false", "--where", "linear"
    )
    assert "on attention, dense, shared experts" in printed and "held-out loss" in printed


def test_wrong_input_is_refused_before_anything_is_written(example, base, datasets, whole, tmp_path):
    fresh = tmp_path / "new"
    for output, options, message in (
        (fresh, ["--budget", "1e-6"], "too small for rank 1"),
        (fresh, ["--where", "everywhere"], "none of auto"),
        (fresh, ["--where", "head"], "use Trainer for it"),
        (fresh, ["--rank", "2"], "one of budget"),
        (fresh, ["--max_steps", "-1"], "give the length of the run"),
        (fresh, ["--dataset", base / "broken.jsonl"], "cannot be read"),
        (fresh, ["--dataset", base / "empty.jsonl"], "cannot be read"),
        (fresh, ["--dataset", base / "chats.jsonl"], "needs a chat template"),
        (fresh, ["--dataset", base / "columns.jsonl"], "no column text, prompt or messages"),
        (fresh, ["--text", base / "nowhere"], "nowhere does not exist"),
        (fresh, ["--dataset", base / "nowhere.jsonl"], "no such file"),
        (fresh, ["--text", base, "--dataset", base / "pairs.jsonl"], "one of them"),
        (fresh, ["--model", base / "nowhere"], "nowhere"),
        (whole[0], ["--where", "attention"], "where was ['auto'] and is ['attention'] now"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(sys, "argv", example.command(base, output, *options)[1:])
            runpy.run_path(str(example.script), run_name="__main__")
        assert message in str(caught.value.code)
        assert not fresh.exists()
