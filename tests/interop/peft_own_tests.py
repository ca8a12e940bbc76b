"""PEFT's own tests on a tiny `deepseek_v3`, on native Transformers' classes and on the plugin's, one by one.

    python tests/interop/peft_own_tests.py FOLDER [--only TEXT] [--keep]

Downloads the source package of the PEFT that is installed (its wheel has no tests) into FOLDER, puts a local
checkpoint in place of the Hub's tiny models, and runs `test_decoder_models.py`, `test_target_parameters.py` and
`test_trainable_tokens.py` twice, each time in a process of its own, without the plugin and with it. Prints every
difference, and exits with 1 where the plugin loses a test that native passes. `--only` chooses tests as pytest's `-k`;
`--keep` takes native's results of the last whole run. Takes about 8 minutes on 2 cores. Nothing but the package is
downloaded. What the tests ask of other models (Gemma's scaled embeddings, T5) fails on both and does not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path


FILES = ("test_decoder_models.py", "test_target_parameters.py", "test_trainable_tokens.py")
HELPERS = ("__init__.py", "testing_common.py", "testing_utils.py")
MODES = ("native", "plugin")

# Written beside PEFT's tests. Which layers a tuner adapts by default PEFT knows for the models of its tests only.
CONFTEST = """
import os

import torch
from peft.utils import constants

torch.set_num_threads(1)
ATTENTION = ["q_proj", "kv_b_proj"]
# Native calls kv_b_proj on tensors of four dimensions, which these do not take
FOR_OTHERS = {
    "TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING": ["q_proj", "o_proj"],
    "TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING": ["q_proj", "o_proj"],
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": [*ATTENTION, "down_proj"],
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": ["down_proj"],
    "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING": ["input_layernorm", "post_attention_layernorm"],
}
for name, mapping in vars(constants).items():
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
        mapping["deepseek_v3"] = FOR_OTHERS.get(name, ATTENTION)
if os.environ["DSV3_PEFT_TESTS_ON"] == "plugin":
    import transformers_dsv3
"""

# What the tests ask of the Hub's models by their layers' names, and of other libraries
SUBSTITUTES = {
    "feed_forward.": "mlp.",
    "model.decoder.": "model.",
    "num_local_experts": "n_routed_experts",
    "from diffusers import StableDiffusionPipeline": "StableDiffusionPipeline = type(None)",
    "from datasets import load_dataset": "from datasets import Dataset, DatasetDict",
    'load_dataset("ybelkada/english_quotes_copy")': "DatasetDict(train=Dataset.from_dict({'quote': ['To be.'] * 16}))",
}

# In a process without the plugin. Weights are wide enough that logits deviate by 2 or so, beside which the tests'
# tolerance of 1e-6 forgives little of what one backend rounds otherwise than another.
MAKE_CHECKPOINTS = """
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
for folder, tied in zip(sys.argv[1:], (False, True)):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=258, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, max_position_embeddings=256, initializer_range=0.2,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=257, pad_token_id=256,
    )
    DeepseekV3ForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
"""


def download(folder: Path) -> Path:
    """The folder of PEFT's tests, from the source package of the version that is installed."""
    version = importlib.metadata.version("peft")
    package = folder / f"peft-{version}.tar.gz"
    if not package.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--dest", str(folder), f"peft=={version}"], check=True)
    unpacked = folder / f"peft-{version}"
    if not unpacked.is_dir():
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
    return unpacked / "tests"


def substitute(text: str, checkpoint: Path, tied: Path) -> str:
    """A file of PEFT's tests with local checkpoints in place of the Hub's models, each test once."""
    # Where tests ask which model it is, they make allowances for it
    hub_id = r'(?<!== )"(?:hf|peft|trl)-internal-testing/{}"'
    text = re.sub(hub_id.format("opt-125m"), f'"{tied}"', text)
    text = re.sub(hub_id.format(r'(?!tiny-random-t5)[^"]+'), f'"{checkpoint}"', text)
    text = re.sub(rf'(?:    "{re.escape(str(checkpoint))}",\n)+', f'    "{checkpoint}",\n', text)
    # PEFT converts LoRA's targets for this model before it looks for a default
    text = re.sub(r'(LoraConfig,\s*\{[^{}]*?"target_modules": )None', r'\1["q_proj", "kv_b_proj"]', text)
    for theirs, ours in SUBSTITUTES.items():
        text = text.replace(theirs, ours)
    return text


def prepare(folder: Path) -> Path:
    """FOLDER/tests, ready to be run."""
    source, target = download(folder), folder / "tests"
    target.mkdir(exist_ok=True)
    checkpoints = folder / "tiny-deepseek", folder / "tiny-deepseek-tied"
    if not (checkpoints[1] / "tokenizer_config.json").is_file():
        subprocess.run([sys.executable, "-c", MAKE_CHECKPOINTS, *map(str, checkpoints)], check=True)
    for name in (*HELPERS, *FILES):
        path = source / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        (target / name).write_text(substitute(text, *checkpoints), encoding="utf-8")
    (target / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (target / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return target


def run(tests: Path, mode: str, only: str | None) -> dict[str, str]:
    """Outcome of each test: passed, failed or skipped."""
    report = tests.parent / f"{mode}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore"]
    command += ["--tb=short", f"--junitxml={report}", *(["-k", only] if only else []), *FILES]
    environment = {**os.environ, "DSV3_PEFT_TESTS_ON": mode, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = "1"
    with open(tests.parent / f"{mode}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=tests, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        sys.exit(f"{mode}: pytest did not run, see {tests.parent / f'{mode}.log'}")
    outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", metavar="TEXT")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = prepare(folder)
    outcomes = {}
    for mode in MODES:
        kept = folder / f"{mode}.json"
        if mode == "native" and arguments.keep and kept.is_file():
            outcomes[mode] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        outcomes[mode] = run(tests, mode, arguments.only)
        if not arguments.only:
            kept.write_text(json.dumps(outcomes[mode], indent=1), encoding="utf-8")
    native, plugin = (outcomes[mode] for mode in MODES)
    if arguments.only:
        native = {name: outcome for name, outcome in native.items() if name in plugin}
    for name in FILES:
        counts = []
        for mode in MODES:
            own = [out for test, out in outcomes[mode].items() if name.removesuffix(".py") in test]
            counts.append(
                f"{mode} {own.count('passed')} passed, {own.count('failed')} failed, {own.count('skipped')} skipped"
            )
        print(f"{name}: {'; '.join(counts)}")
    lost = [name for name, outcome in native.items() if outcome == "passed" and plugin.get(name) != "passed"]
    won = [name for name, outcome in plugin.items() if outcome == "passed" and native.get(name) == "failed"]
    for title, names in (("native passes, the plugin does not", lost), ("the plugin passes, native does not", won)):
        print(f"{title}: {len(names)}")
        for name in names:
            print(f"  {name}")
    if not any(outcome == "passed" for outcome in native.values()):
        print("native passes no test: nothing was compared")
        return 1
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
