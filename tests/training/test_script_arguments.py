"""The command line of a training script, and what it says of what is wrong."""

import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, TrainingArguments

from transformers_dsv3 import Dsv3Config
from transformers_dsv3.training.model_arguments import NewModelArguments, read_config
from transformers_dsv3.training.run_folder import RunFolder
from transformers_dsv3.training.script_arguments import ScriptArgumentParser, exit_on_refusal, run_defaults


@dataclass
class Arguments:
    size: int = 3


def test_defaults_are_those_of_a_run_that_is_resumed(tmp_path):
    parser = ScriptArgumentParser((Arguments, TrainingArguments))
    own, args = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--save_steps", "7"])
    assert own.size == 3 and args.save_steps == 7
    for name, value in run_defaults().items():
        assert getattr(args, name) == (7 if name == "save_steps" else value), name
    # A script without a trainer's arguments gets nothing beside its own
    assert ScriptArgumentParser(Arguments).parse_args_into_dataclasses(["--size", "4"]) == (Arguments(4),)


def test_main_is_called_and_interruption_explained(tmp_path, monkeypatch, capsys):
    parser = ScriptArgumentParser((Arguments, TrainingArguments))
    monkeypatch.setattr(sys, "argv", ["script.py", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
    called = []
    parser.run(lambda *arguments: called.extend(arguments))
    assert called[0] == Arguments() and called[1].output_dir == str(tmp_path / "run")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        parser.run(interrupted)
    assert caught.value.code == 130 and "the same command starts again" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("--p: no"), FileNotFoundError("--p: no")])
def test_refusals_are_one_line(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit, match="^script.py: --p: no$"), exit_on_refusal():
        raise error


def test_what_is_no_refusal_keeps_its_traceback():
    with pytest.raises(TypeError), exit_on_refusal():
        raise TypeError


def test_configs_of_fields_that_do_not_fit_are_refusals(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit, match="n_group"), exit_on_refusal():
        NewModelArguments(config_overrides="n_group=3").make_config()


def test_new_models(tmp_path):
    config = NewModelArguments().make_config()
    assert isinstance(config, Dsv3Config) and config.hidden_size == 256
    config = NewModelArguments(config_overrides="hidden_size=64, n_routed_experts=8").make_config()
    assert (config.hidden_size, config.n_routed_experts, config.num_hidden_layers) == (64, 8, 4)
    config.save_pretrained(tmp_path)
    assert NewModelArguments(str(tmp_path)).make_config().hidden_size == 64
    assert read_config(str(tmp_path)).hidden_size == 64
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^--config .* is of model type 'llama', not deepseek_v3$"):
        NewModelArguments(str(tmp_path)).make_config()
    with pytest.raises(ValueError, match="^--model .* is of model type 'llama'"):
        read_config(str(tmp_path))


def test_figures_before_a_run_are_measured_once(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.measured_before(lambda: {"loss": 0.1}) == {"loss": 0.1}
    assert RunFolder(tmp_path).measured_before(pytest.fail) == {"loss": 0.1}
    assert folder.measured_before(lambda: {"loss": 0.2}, "before.json") == {"loss": 0.2}


def test_a_run_has_a_length(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=-1, use_cpu=not torch.cuda.is_available())
    with pytest.raises(ValueError, match="^--max_steps: give the length of the run"):
        RunFolder(tmp_path).checkpoint_to_resume(args)
