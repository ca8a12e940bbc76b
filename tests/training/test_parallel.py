"""DDP, FSDP2, tensor and expert parallelism on two processes: the losses, the weights and the file of one process.

Both loss curve and checkpoint have to agree within fp32 rounding, the routers' correction bias exactly: it moves by
integer counts, which are those of all ranks' tokens.
"""

import json
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

import transformers_dsv3
from tests import programs
from transformers_dsv3.models.dsv3.distributed_dsv3 import check_divisible, with_data_parallel_size
from transformers_dsv3.training.parallel import ParallelArguments


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("parallel_steps.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"}

trainer_shards = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="this version's Trainer wraps models that FSDP2 sharded when they were loaded, and saves on one rank alone",
)


def one_process(arguments):
    return programs.run(arguments)


def two_processes(arguments):
    return programs.run_ranks(2, arguments)


ACCELERATE_OPTIONS = ["--config_file", str(ROOT / "examples" / "accelerate_fsdp2.yaml")]


def accelerate_launch(arguments):
    """Two processes too, with the settings that this launcher hands them in the environment."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *ACCELERATE_OPTIONS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


def accelerate_environment(arguments):
    """Two processes with that launcher's settings, started as the others are: it runs until it would start its own."""
    handed = {}
    with (
        unittest.mock.patch.dict(os.environ),
        unittest.mock.patch("torch.distributed.run.run", lambda given: handed.update(os.environ)),
    ):
        options = [*ACCELERATE_OPTIONS, "--main_process_port", "0", *map(str, arguments)]
        launch.launch_command(launch.launch_command_parser().parse_args(options))
    assert handed["ACCELERATE_USE_FSDP"] == "true"
    return programs.run_ranks(2, arguments, **{k: v for k, v in handed.items() if os.environ.get(k) != v})


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "model"
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(checkpoint):
    """Function from a launcher, a folder and options to the losses and so on, and the tensors that were saved."""

    def run_script(launcher, output, *options):
        done = launcher([SCRIPT, "--model", checkpoint, "--output", output, *options])
        assert done.returncode == 0, done.stderr[-4000:]
        report = json.loads((output / "steps.json").read_text())
        report["config"] = json.loads((output / "config.json").read_text())
        return report, load_file(output / "model.safetensors")

    return run_script


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    return train(one_process, tmp_path_factory.mktemp("alone"))


def assert_same_run(seen, expected, start, measured, mode, atol=1e-6):
    (report, weights), (expected_report, expected_weights) = seen, expected
    assert weights.keys() == expected_weights.keys() == start.keys()
    for name, tensor in expected_weights.items():
        assert weights[name].dtype == tensor.dtype, name
        if name.endswith("e_score_correction_bias"):
            assert tensor.dtype == torch.float32 and not torch.equal(tensor, start[name])
            assert torch.equal(weights[name], tensor), name
        else:
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("loss", "grad_norm", "mtp/loss", "router/utilisation"):
        assert len(report[name]) == 3
        torch.testing.assert_close(
            torch.tensor(report[name]), torch.tensor(expected_report[name]), rtol=1e-5, atol=1e-5, msg=name
        )
    assert report["config"] == expected_report["config"]
    assert report["config"]["architectures"] == ["DeepseekV3ForCausalLM"]
    # What is compared did move
    assert max((weights[name] - start[name]).abs().max() for name in start) > 0.02
    largest = max((weights[name] - tensor).abs().max().item() for name, tensor in expected_weights.items())
    measured[f"{mode} on two processes beside one, largest difference of a weight after 3 steps"] = largest
    differences = [abs(a - b) for a, b in zip(report["loss"], expected_report["loss"], strict=True)]
    measured[f"{mode} on two processes beside one, largest difference of a loss"] = max(differences)


# The launcher, options, the class that trains, and how much of the model each process holds at most
MODES = {
    "DDP": (two_processes, [], "DistributedDataParallel", 1.0),
    "FSDP2": (accelerate_environment, ["--in-memory"], "FSDPDeepseekV3ForCausalLM", 0.51),
    "TP=2": (two_processes, ["--distributed", '{"tp_size": 2}'], "DeepseekV3ForCausalLM", 0.6),
    "EP=2": (two_processes, ["--distributed", '{"ep_size": 2}'], "FSDPDeepseekV3ForCausalLM", 0.51),
}
MORE = {
    "FSDP2 by accelerate": (accelerate_launch, ["--accelerate-fsdp"], "FSDPDeepseekV3ForCausalLM", 0.51),
    "TP=2, EP=2": (two_processes, ["--distributed", '{"tp_size": 2, "ep_size": 2}'], "DeepseekV3ForCausalLM", 0.6),
    "TP=2 in memory": (
        two_processes,
        ["--distributed", '{"tp_size": 2}', "--in-memory"],
        "DeepseekV3ForCausalLM",
        0.6,
    ),
    "EP=2 in memory": (
        two_processes,
        ["--distributed", '{"ep_size": 2}', "--in-memory"],
        "FSDPDeepseekV3ForCausalLM",
        0.51,
    ),
}


def check_mode(launcher, options, kind, share, train, alone, checkpoint, folder, measured, mode):
    start = load_file(checkpoint / "model.safetensors")
    seen = train(launcher, folder, *options)
    assert_same_run(seen, alone, start, measured, mode)
    assert seen[0]["class"] == kind
    assert seen[0]["local_parameters"] <= share * alone[0]["local_parameters"]
    assert "model.layers.2.eh_proj.weight" in start and "model.layers.2.shared_head.head.weight" in start
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in start


@pytest.mark.parametrize(
    "mode", ["DDP", *(pytest.param(name, marks=trainer_shards) for name in ("FSDP2", "TP=2", "EP=2"))]
)
def test_two_processes_train_as_one(mode, train, alone, checkpoint, tmp_path, measured):
    check_mode(*MODES[mode], train, alone, checkpoint, tmp_path, measured, mode)
    # And opens in one process, with the plugin and without it
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    native = DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, native(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["FSDP2 by accelerate", *(pytest.param(name, marks=trainer_shards) for name in list(MORE)[1:])]
)
def test_other_ways_to_share_train_as_one(mode, train, alone, checkpoint, tmp_path, measured):
    check_mode(*MORE[mode], train, alone, checkpoint, tmp_path, measured, mode)


@pytest.mark.slow
@trainer_shards
@pytest.mark.parametrize(
    "options, atol",
    [
        (["--gradient-checkpointing", "--gradient-accumulation-steps", "2"], 1e-6),
        # Adam divides gradients of nearly nothing by their own size, rounding errors included
        (["--optim", "adamw_torch", "--learning-rate", "0.02"], 2e-3),
    ],
    ids=["checkpointing and accumulation", "AdamW"],
)
def test_settings_of_the_trainer(options, atol, train, checkpoint, tmp_path, measured):
    start = load_file(checkpoint / "model.safetensors")
    expected = train(one_process, tmp_path / "alone", *options)
    for mode, (launcher, more, *_) in MODES.items():
        seen = train(launcher, tmp_path / mode.replace("=", ""), *more, *options)
        assert_same_run(seen, expected, start, measured, f"{mode}, {' '.join(options)}", atol)


@pytest.mark.slow
def test_tensor_and_expert_parallelism_of_older_transformers(train, alone, checkpoint, tmp_path, measured):
    """Transformers before `ep_size`: experts over the ranks that have the same rows, and a save by all ranks."""
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        pytest.skip("this version has `ep_size`")
    start = load_file(checkpoint / "model.safetensors")
    for name, config in {"tp": {"tp_size": 2}, "ep": {"tp_size": 2, "enable_expert_parallel": True}}.items():
        seen = train(two_processes, tmp_path / name, "--distributed", json.dumps(config), "--save-everywhere")
        assert_same_run(seen, alone, start, measured, f"{name}, older Transformers")


def test_experts_alone_are_shared_by_all_processes(monkeypatch):
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        with pytest.raises(ValueError, match="ep_size"):
            with_data_parallel_size({"ep_size": 2})
        return
    # Native refuses it whatever the model; a dictionary reaches the model, which completes it
    with pytest.raises(ValueError, match="ep_size"):
        DistributedConfig(ep_size=2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert with_data_parallel_size({"ep_size": 2}) == {"ep_size": 2, "fsdp_size": 8}
    assert with_data_parallel_size({"ep_size": 2, "dp_replicate_size": 2})["fsdp_size"] == 4
    for complete in ({"tp_size": 2}, {"ep_size": 1}, {"ep_size": 2, "tp_size": 2}, {"ep_size": 2, "fsdp_size": 4}):
        assert with_data_parallel_size(complete) == complete
    assert DistributedConfig(**with_data_parallel_size({"ep_size": 4})).efsdp_size == 2


def test_sizes_that_cut_heads_or_experts_are_refused(tiny_config):
    check_divisible(tiny_config(), DistributedConfig(tp_size=4))
    for fields, config, message in (
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6},
            {"tp_size": 4},
            r"`num_attention_heads=6`.*tp_size \(4\)",
        ),
        ({"moe_intermediate_size": 25}, {"tp_size": 2}, r"`moe_intermediate_size=25`.*tp_size \(2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_divisible(tiny_config(**fields), DistributedConfig(**config))
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        with pytest.raises(ValueError, match=r"`n_routed_experts=8`.*ep_size \(3\)"):
            check_divisible(tiny_config(), DistributedConfig(fsdp_size=3, ep_size=3))
        with pytest.raises(ValueError, match="`n_shared_experts=0`"):
            check_divisible(tiny_config(n_shared_experts=0), DistributedConfig(fsdp_size=2, ep_size=2))


def test_plans_name_what_models_have(make_model):
    for fields in ({}, {"q_lora_rank": None}):
        model = make_model(**fields)
        names = {".".join("*" if part.isdigit() else part for part in n.split(".")) for n, _ in model.named_modules()}
        names |= {
            ".".join("*" if part.isdigit() else part for part in n.split(".")) for n, _ in model.named_parameters()
        }
        assert {name.removesuffix(".weight") for name in model._tp_plan} <= names
        assert set(model._ep_plan) <= names and set(model._fsdp_plan) <= names
        for part in ("kv_b_proj", "o_proj", "q_proj" if "q_lora_rank" in fields else "q_b_proj"):
            assert f"model.layers.*.self_attn.{part}" in model._tp_plan


def test_arguments_of_command_lines(monkeypatch, tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none")
    ParallelArguments().prepare(arguments)
    assert arguments.save_strategy != "no" and arguments.parallelism_config is None
    with pytest.raises(ValueError, match="--tp_size 2"):
        ParallelArguments(tp_size=2).prepare(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train by itself"):
        ParallelArguments().prepare(arguments)
    assert ParallelArguments().distributed_config() is None
    assert ParallelArguments(tp_size=2).distributed_config() == {"tp_size": 2}
    assert ParallelArguments(ep_size=4).distributed_config() == {"ep_size": 4}


def test_accelerate_finds_the_layers_of_models_without_mtp(make_model):
    # Its FSDP raises on names of layers that a model does not have
    assert set(make_model(num_nextn_predict_layers=0)._no_split_modules) == {"DeepseekV3DecoderLayer"}
    assert set(make_model()._no_split_modules) == {"DeepseekV3DecoderLayer", "Dsv3MtpLayer"}


def test_state_dicts_of_fused_experts_are_saved_under_official_names(make_model, checkpoint, tmp_path):
    model = make_model()
    copy = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    copy.save_pretrained(tmp_path)
    saved, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, checkpoint))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
