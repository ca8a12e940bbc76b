"""Checkpoints that the plugin saves, and the interpreters of the programs that read them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import transformers_dsv3
from tests import programs
from transformers_dsv3.data.byte_bpe import train_byte_bpe


def small_config(vocab_size, **overrides):
    """All parts of DeepSeek-V3 at small size: query LoRA, groups, shared experts, a dense layer, one MTP layer."""
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 48,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 256,
    }
    return transformers_dsv3.Dsv3Config(**{**fields, **overrides})


def random_model(config, dtype=torch.float32):
    """A model whose logits depend on every part: weights of deviation 0.1, norms and correction biases not at rest."""
    torch.manual_seed(0)
    model = transformers_dsv3.Dsv3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.to(dtype)


@pytest.fixture(scope="session")
def text():
    """About 1,700 characters of English and code, which every Python has."""
    return json.__doc__


@pytest.fixture(scope="session")
def yarn():
    """RoPE parameters of a context four times as long as the 64 tokens trained on."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }


@pytest.fixture(scope="session")
def tokenizer(text):
    """A small byte-level BPE, as the quickstart trains it."""
    return train_byte_bpe([text], vocab_size=512, model_max_length=256)


@pytest.fixture
def save(tokenizer):
    """Saves a random small model with its tokenizer: `save(folder, **config)` gives the model."""

    def save_model(folder, tokenizer: PreTrainedTokenizerFast = tokenizer, dtype=torch.float32, **overrides):
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = random_model(small_config(len(tokenizer), **special, **overrides), dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model

    return save_model


class Peer:
    """Another program, in a Python of its own.

    Args:
        variable: the environment variable that names its interpreter; this one where it is not set.
        module: what that interpreter must be able to import.
        install: the packages that bring it.
        below: the major version from which on the module is not what the test wants.
    """

    def __init__(self, variable: str, module: str, install: str, below: int | None = None):
        self.python = os.environ.get(variable, sys.executable)
        # The peer decides what it imports; offline, and quiet about it
        self.environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        if below is not None:
            probe = f"import {module} as m, sys; sys.exit(int(m.__version__.split('.')[0]) >= {below})"
        if subprocess.run([self.python, "-c", probe], capture_output=True, check=False).returncode:
            older = f" below {below}" if below is not None else ""
            pytest.skip(
                f"no {module}{older}: run tests/interop/run.sh, or `pip install {install}` in an environment whose "
                f"python {variable} names"
            )

    def run(self, *arguments, timeout=600, **environment):
        """Runs the interpreter with `arguments`; fails the test with the output where it fails. Returns stdout."""
        if self.python == sys.executable:
            done = programs.run(arguments, timeout, **self.environment, **environment)
        else:
            done = subprocess.run(
                [self.python, *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=timeout,
                env={**os.environ, **self.environment, **environment},
                check=False,
            )
        if done.returncode:
            pytest.fail(f"{' '.join(map(str, arguments))} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        return done.stdout


@pytest.fixture(scope="session")
def peer():
    return Peer


class ShardedRun:
    """What sharded_steps.py reported, and the tensors and config that it saved."""

    def __init__(self, folder):
        self.folder = folder
        self.report = json.loads((folder / "steps.json").read_text())
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def sharded_run(tmp_path_factory, make_model):
    """Function from an engine and options to a `ShardedRun`, two processes where there is an engine; each run once.

    Options: `plugin`, whether the plugin's model trains or native's; `mtp`, whether the checkpoint has an MTP layer;
    `python`, the interpreter; `more`, options of the script.
    """
    folder, runs = tmp_path_factory.mktemp("sharded"), {}
    for mtp in (0, 1):
        make_model(num_hidden_layers=3, num_nextn_predict_layers=mtp).save_pretrained(folder / f"mtp{mtp}")

    def run(engine, plugin, mtp=False, python=sys.executable, more=()):
        key = (engine, plugin, mtp, python, *more)
        if key not in runs:
            output = folder / f"run{len(runs)}"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [python, *(launcher if engine != "none" else []), Path(__file__).with_name("sharded_steps.py")]
            command += ["--model", folder / f"mtp{int(mtp)}", "--output", output, "--engine", engine, *more]
            command += ["--plugin"] if plugin else []
            paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            done = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, timeout=600, env=environment
            )
            assert done.returncode == 0, done.stderr[-6000:]
            runs[key] = ShardedRun(output)
        return runs[key]

    return run


@pytest.fixture(scope="session")
def assert_same_training():
    """Function that compares a `ShardedRun` with one of the same model on one process, or of another library."""

    def compare(seen, expected):
        for name in ("loss", "grad_norm"):
            assert len(seen.report[name]) == 3
            assert seen.report[name] == pytest.approx(expected.report[name], rel=1e-5), name
        assert seen.config["architectures"] == ["DeepseekV3ForCausalLM"]
        # Official names: one tensor an expert, MTP layers numbered behind the others
        assert seen.weights.keys() >= expected.weights.keys()
        assert "model.layers.1.mlp.experts.7.up_proj.weight" in seen.weights
        for name, tensor in expected.weights.items():
            torch.testing.assert_close(seen.weights[name], tensor, rtol=1e-5, atol=1e-6, msg=name)

    return compare
