"""TRL's own tests of its trainers on a tiny `deepseek_v3`, on native's classes and on the plugin's, test by test.

    python tests/interop/trl_own_tests.py FOLDER [--tests TESTS] [--only TEXT] [--keep]

Runs `test_sft_trainer.py`, `test_dpo_trainer.py`, `test_reward_trainer.py`, `test_kto_trainer.py` and
`test_grpo_trainer.py` twice, each time in a process of its own, without the plugin and with it. Local checkpoints
stand in place of the Hub's tiny text models, and data of the Hub's shapes is made here; nothing is downloaded from the
Hub. Prints every difference, and exits with 1 where the plugin loses a test that native passes.

TRL publishes no tests on PyPI: its source package leaves them out. They are cloned from GitHub at the tag of the TRL
that is installed, or TESTS names the folder `tests` of a checkout; exits with 3 where there are none. Tests of another
version than the installed TRL run too: those that do not fit fail on both and do not count. `--only` chooses tests as
pytest's `-k`; `--keep` takes native's results of the last run. Left out: tests that TRL marks slow, those of models
that see, of vLLM, and those of GRPO's reward functions and tools, which ask nothing of the model; without a GPU also
Liger-Kernel's. Takes about 20 minutes on 2 cores.

TRL looks a model given by its path up in `transformers` by its class's name, so the plugin registers its names there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import torch


FILES = tuple(f"test_{kind}_trainer.py" for kind in ("sft", "dpo", "reward", "kto", "grpo"))
HELPERS = ("__init__.py", "conftest.py", "testing_utils.py", "testing_constants.py")
MODES = ("native", "plugin")
LEFT_OUT = ("VLM", "vlm", "Vision", "vllm", "Slow", "tool", "environment", "reward_func", "scale_rewards", "rollout")
LEFT_OUT += () if torch.cuda.is_available() else ("test_liger", "with_liger")
SKIPPED = " and ".join(f"not {word}" for word in LEFT_OUT)

# Added to TRL's own conftest.py: the plugin, data in place of the Hub's, and each test once
CONFTEST = '''

import importlib
import os

import datasets

torch.set_num_threads(1)
KINDS = ("sft", "dpo", "reward", "kto", "grpo")
OTHERS = ["import_utils", "models.utils", *(f"trainer.{kind}_trainer" for kind in KINDS)]


def absent(name):
    """For tests of another version: helpers that this TRL does not have fail where they are used, not on import."""
    if not name.startswith("__"):
        return lambda *args, **kwargs: False
    raise AttributeError(name)


if not torch.cuda.is_available():
    # Its kernels need a GPU, and stay in native's module for all tests behind. Before TRL's tests ask.
    importlib.import_module("trl.import_utils").is_liger_kernel_available = lambda *args, **kwargs: False
for module in OTHERS:
    importlib.import_module(f"trl.{module}").__getattr__ = absent
if os.environ["DSV3_TRL_TESTS_ON"] == "plugin":
    import transformers_dsv3

    transformers_dsv3.register(names=True)

QUESTIONS = ["Beautiful is better than", "Explicit is better than", "Simple is better than", "Flat is better than"]
QUESTIONS += ["Complex is better than", "Sparse is better than", "Now is better than", "Readability"]
RIGHT = [" ugly.", " implicit.", " complex.", " nested.", " complicated.", " dense.", " never.", " counts."]
WRONG = [" the moon.", " a list.", " the sea.", " no one.", " the rest.", " a tree.", " rain.", " sings."]
IN_MEMORY_HUB = "trl-internal-testing/zen"


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def rows(name, at):
    """One row of the Hub's configuration of that name: plain text or conversations, in the columns of each task."""
    style, _, task = name.partition("_")
    talks = style == "conversational"
    question, right, wrong = QUESTIONS[at % 8], RIGHT[at % 8], WRONG[at % 8]
    prompt = user(question) if talks else question
    chosen, rejected = (assistant(right), assistant(wrong)) if talks else (right, wrong)
    whole = [prompt + chosen, prompt + rejected]
    return {
        "language_modeling": {"messages" if talks else "text": whole[0]},
        "prompt_only": {"prompt": prompt},
        "prompt_completion": {"prompt": prompt, "completion": chosen},
        "preference": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "implicit_prompt_preference": {"chosen": whole[0], "rejected": whole[1]},
        "unpaired_preference": {"prompt": prompt, "completion": rejected if at % 2 else chosen, "label": at % 2 == 0},
    }[task]


def load_dataset(path, name=None, split=None, streaming=False, **options):
    if path != IN_MEMORY_HUB:
        raise ConnectionError(f"{path} is on the Hub, which is not asked")
    sizes = {"train": 8, "test": 2}
    whole = {part: datasets.Dataset.from_list([rows(name, at) for at in range(n)]) for part, n in sizes.items()}
    if streaming:
        whole = {part: data.to_iterable_dataset() for part, data in whole.items()}
    if split is None:
        return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(whole)
    part, _, some = split.partition("[:")
    return whole[part].select(range(int(some.rstrip("]")))) if some else whole[part]


datasets.load_dataset = load_dataset  # before the tests import it


def pytest_collection_modifyitems(config, items):
    """Tests of several models of the Hub are one and the same with one model in place of them."""
    seen, kept, again = set(), [], []
    for item in items:
        values = getattr(item, "callspec", None) and sorted(item.callspec.params.items(), key=lambda pair: pair[0])
        key = (item.path, item.cls, item.originalname, repr(values))
        (again if key in seen else kept).append(item)
        seen.add(key)
    items[:] = kept
    config.hook.pytest_deselected(items=again)
'''

# In a process without the plugin
MAKE_CHECKPOINTS = """
import sys
from pathlib import Path

import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, PreTrainedTokenizerFast,
)

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
bos, eos, pad = (f"<\\uff5c{name}\\uff5c>" for name in (
    "begin\\u2581of\\u2581sentence", "end\\u2581of\\u2581sentence", "\\u2581pad\\u2581"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad,
    additional_special_tokens=["<\\uff5cUser\\uff5c>", "<\\uff5cAssistant\\uff5c>", "<think>", "</think>"],
)
tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "deepseekv3.jinja").read_text()
for folder, model_class in zip(sys.argv[1:], (DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification)):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, max_position_embeddings=4096, initializer_range=0.1, num_labels=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model_class(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
"""


def checkout(folder: Path) -> Path:
    """The folder of TRL's tests, at the tag of the version that is installed."""
    source = folder / f"trl-{importlib.metadata.version('trl')}"
    if not source.is_dir():
        tag = f"v{importlib.metadata.version('trl')}"
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag]
        if subprocess.run([*command, "https://github.com/huggingface/trl", str(source)], check=False).returncode:
            print(f"TRL's tests could not be cloned: give --tests, the folder `tests` of a checkout of TRL {tag}")
            sys.exit(3)
    return source / "tests"


def substitute(text: str, causal: Path, classifier: Path) -> str:
    """A file of TRL's tests with local checkpoints in place of the Hub's text models."""
    hub_id = r'"trl-internal-testing/tiny-[A-Za-z0-9_]+{}[A-Za-z0-9_.-]*"'
    text = re.sub(hub_id.format("ForCausalLM"), f'"{causal}"', text)
    # Layers that are adapted by default PEFT knows for the Hub's models
    text = text.replace("LoraConfig()", 'LoraConfig(target_modules=["q_proj", "v_proj"])')
    text = text.replace('"q_proj", "v_proj"', '"q_b_proj", "kv_b_proj"')
    return re.sub(hub_id.format("ForSequenceClassification"), f'"{classifier}"', text)


def prepare(folder: Path, source: Path) -> Path:
    """FOLDER/tests, ready to be run."""
    target = folder / "tests"
    target.mkdir(exist_ok=True)
    checkpoints = folder / "tiny-deepseek", folder / "tiny-deepseek-classifier"
    if not (checkpoints[1] / "tokenizer_config.json").is_file():
        subprocess.run([sys.executable, "-c", MAKE_CHECKPOINTS, *map(str, checkpoints)], check=True)
    for name in (*HELPERS, *FILES):
        path = source / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        text += CONFTEST if name == "conftest.py" else ""
        (target / name).write_text(substitute(text, *checkpoints), encoding="utf-8")
    (target / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    slow\n    low_priority\n    require_trl_cpp\n", encoding="utf-8"
    )
    return target


def run(tests: Path, mode: str, only: str | None) -> dict[str, str]:
    """Outcome of each test: passed, failed or skipped."""
    report = tests.parent / f"{mode}.xml"
    report.unlink(missing_ok=True)
    chosen = f"({SKIPPED}) and ({only})" if only else SKIPPED
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore"]
    command += ["--tb=short", "-m", "not slow", "-k", chosen, f"--junitxml={report}", *FILES]
    environment = {**os.environ, "DSV3_TRL_TESTS_ON": mode, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
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
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--only", metavar="TEXT")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = prepare(folder, arguments.tests or checkout(folder))
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
