"""What the tests share: small models with weights that matter, their native twins, and one trained model."""

import atexit
import copy
import functools
import gc
import importlib
import inspect
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from filelock import FileLock


# Without a GPU, Triton's programs are interpreted on the CPU. Triton reads this for its own functions when it is
# imported, which importing Transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import transformers_dsv3


TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 2048,
    # The default of 0.02 makes activations so small that errors drown
    "initializer_range": 0.1,
}
# For weights in groups of 32, beside `byte_tokenizer`
WIDTHS_OVER_BYTES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "v_head_dim": 16,
}


# Models of this size gain nothing from a second thread, and lose a factor of ten where another program is busy, since
# the threads of one operation wait for each other. Child processes follow the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    """xdist's own choice gives a file's tests to all workers, and each sets up what they share."""
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What libraries and tests define stays to the end: no collection of garbage goes over its 500,000 objects again.

    Trainers ask for one at every run, of half a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # what is left then counts as leaked


MEASURED = pytest.StashKey()


@pytest.fixture(scope="session")
def measured(pytestconfig):
    """Dictionary from a description to the largest value measured, or a count, printed at the end of the run."""
    return pytestconfig.stash.setdefault(MEASURED, {})


def pytest_terminal_summary(terminalreporter, config):
    figures = config.stash.get(MEASURED, {})
    if figures:
        terminalreporter.section("measured")
        for what, value in sorted(figures.items()):
            terminalreporter.write_line(f"{what}: {value if isinstance(value, int) else format(value, '.3g')}")


def randomize(model, seed=0):
    """Gives every parameter that starts as 0 or 1 (norms, attention biases, correction biases) values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith(("norm.weight", "layernorm.weight")):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith(".bias"):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("e_score_correction_bias"):
                # As wide as the sigmoid scores, so that choice by biased and by plain scores differ
                tensor.normal_(0.0, 0.5, generator=generator)
    return model


@pytest.fixture(scope="session")
def tiny_config():
    """Function from changed fields to a small `Dsv3Config`."""
    return lambda **fields: transformers_dsv3.Dsv3Config(**{**TINY, **fields})


@pytest.fixture(scope="session")
def make_model(tiny_config):
    """Function from changed fields to a small fp32 `Dsv3ForCausalLM` (or `cls`) in evaluation mode."""

    def make(cls=transformers_dsv3.Dsv3ForCausalLM, seed=0, attn_implementation=None, **fields):
        torch.manual_seed(seed)
        config = tiny_config(**fields)
        # A copy, since models write to the configuration they are given
        model = cls._from_config(copy.deepcopy(config), attn_implementation=attn_implementation)
        return randomize(model, seed).eval()

    return make


@pytest.fixture(scope="session")
def native_twin():
    """Function from a model of the plugin to Transformers' own model of the same weights and attention."""

    def twin(model, cls=DeepseekV3ForCausalLM):
        fields = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "dtype")}
        native = cls._from_config(
            DeepseekV3Config(**fields),
            attn_implementation=model.config._attn_implementation,
            dtype=model.dtype,
        )
        result = native.load_state_dict(model.state_dict(), strict=False)
        assert not result.missing_keys
        assert not [name for name in result.unexpected_keys if not re.search(r"(^|\.)mtp\.\d", name)]
        return native.train(model.training)

    return twin


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of one token a byte, 256 of them, with `<pad>` and `<end>` behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def byte_merges():
    """A tokenizer for `trained_model`: a token a byte, and one merge, without which llama.cpp opens none."""
    letters = bytes_to_unicode()
    vocabulary = {letter: byte for byte, letter in letters.items()} | {letters[0] + letters[1]: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(letters[0], letters[1])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")


TRAINING_TEXT = inspect.getsource(importlib.import_module("textwrap"))[:2000]
LEARNED = 1200
PAD, EOS = 256, 257


@pytest.fixture(scope="session")
def training_bytes():
    """A text, one token a byte. `trained_model` has learned its first 1,200 and seen nothing of the rest."""
    return torch.tensor(list(TRAINING_TEXT.encode()))


def _train(config, training_bytes):
    torch.manual_seed(0)
    # At this size the plainest implementations are the fastest
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers_dsv3.Dsv3ForCausalLM._from_config(copy.deepcopy(config), **plain).train()
    steps, batch, length = 600, 3, 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        # Past both ends, since the first and the last bytes lie in few windows
        starts = torch.randint(-40, LEARNED - length + 40, (batch,), generator=generator).clamp(0, LEARNED - length)
        tokens = torch.stack([training_bytes[start : start + length] for start in starts])
        output = model(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert output.loss < 0.3, f"the shared model did not learn: loss {output.loss:.2f}"
    return model


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this run, one for all of xdist's workers: what they share is made there under a `FileLock`."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def _trained(tiny_config, training_bytes, shared_folder):
    config = tiny_config(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        kv_lora_rank=32,
        q_lora_rank=32,
        num_hidden_layers=2,
        mtp_loss_weight=0.3,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        max_position_embeddings=1024,
    )
    # Trained by the first of xdist's workers that needs it, for all of them
    kept = shared_folder / "trained.pt"
    with FileLock(shared_folder / "trained.lock"):
        if not kept.exists():
            torch.save(_train(config, training_bytes).state_dict(), kept)
    model = transformers_dsv3.Dsv3ForCausalLM(config)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


@pytest.fixture
def trained_model(_trained):
    """A `Dsv3ForCausalLM` in fp32, trained on bytes of source code with its MTP layer. A copy: tests may change it."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def write_harness_tasks():
    """Function from a folder and lines of text to tasks of lm-evaluation-harness there, about the lines' halves.

    `halves_choice` is to choose a line's own second half, `halves_text` scores lines as a whole, `halves_writing` asks
    for 24 more tokens; `halves` is the group of the first and the last.
    """

    def write(folder, lines):
        halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
        documents = [{"start": start, "ends": [end, halves[at - 1][1]]} for at, (start, end) in enumerate(halves)]
        data = folder / "halves.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        common = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{start}}",
            "doc_to_target": "{{ends[0]}}",
            "target_delimiter": "",
            "metadata": {"version": 1.5},
        }
        tasks = {
            "halves_choice": {
                "output_type": "multiple_choice",
                "doc_to_choice": "{{ends}}",
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
            "halves_text": {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{start}}{{ends[0]}}",
                "metric_list": [
                    {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
                ],
            },
            "halves_writing": {
                "output_type": "generate_until",
                "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 24},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            },
        }
        for name, fields in tasks.items():
            (folder / f"{name}.yaml").write_text(json.dumps({**common, "task": name, **fields}))  # JSON is YAML
        group = {
            "group": "halves",
            "task": ["halves_choice", "halves_writing"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        }
        (folder / "halves.yaml").write_text(json.dumps(group))

    return write


@pytest.fixture(scope="session")
def harness_tasks(tmp_path_factory, write_harness_tasks):
    """Folder with those tasks about 16 lines of `textwrap`."""
    folder = tmp_path_factory.mktemp("harness_tasks")
    lines = [line.strip() for line in TRAINING_TEXT.splitlines() if len(line.strip()) > 30][:16]
    write_harness_tasks(folder, lines)
    return folder


@pytest.fixture(scope="session")
def _harness_index(shared_folder):
    """Function that gives the harness's index of its own 14,000 files, made by the first of xdist's workers to ask."""
    index = pytest.importorskip("lm_eval.tasks._index")
    build = index.TaskIndex.build

    @functools.cache
    def load():
        kept = shared_folder / "harness_index.pickle"
        with FileLock(shared_folder / "harness_index.lock"):
            if not kept.exists():
                kept.write_bytes(pickle.dumps(build([Path(index.__file__).parent])))
        return pickle.loads(kept.read_bytes())

    return load


@pytest.fixture(scope="module")
def one_task_index(_harness_index):
    """The harness's index of all its tasks takes ten seconds to make: the tests share it, and only theirs are read."""
    index = pytest.importorskip("lm_eval.tasks._index")
    build, own = index.TaskIndex.build, Path(index.__file__).parent

    def joined(paths):
        found = {}
        for path in paths:
            found |= _harness_index() if Path(path) == own else build([path])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index.TaskIndex, "build", staticmethod(joined))
        yield
