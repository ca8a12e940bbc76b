import sys

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from tests import programs
from transformers_dsv3_cli.main import app


SCRIPT = """
import json, sys
from pathlib import Path
import helper
import transformers
from transformers import AutoConfig
# Programs that look a class up by its name find the plugin's too
classes = [type(AutoConfig.for_model("deepseek_v3")), getattr(transformers, "DeepseekV3ForCausalLM")]
(class_name,) = {kind.__module__.split(".")[0] for kind in classes}
Path(sys.argv[1]).write_text(json.dumps([sys.argv, __name__, class_name, helper.VALUE]))
"""


def command(*arguments):
    return programs.run(["-m", "transformers_dsv3.cli", *arguments])


@pytest.mark.parametrize("verb", [[], ["quickstart"], ["run"], ["explain"], ["bench"]])
def test_help_teaches(verb):
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0
    assert "transformers-dsv3 quickstart" in result.output if not verb else "Examples:" in result.output


def test_run_script_registers_the_plugin_and_passes_everything_on(tmp_path):
    import json

    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("VALUE = 3\n")
    out = tmp_path / "out.json"
    extra = ["--help", "--seed=4", "-x", "two words"]
    result = command("run", tmp_path / "script.py", out, *extra)
    assert result.returncode == 0, result.stderr
    assert json.loads(out.read_text()) == [
        [str(tmp_path / "script.py"), str(out), *extra],
        "__main__",
        "transformers_dsv3",
        3,
    ]


def test_run_module_shows_the_modules_own_help():
    result = command("run", "json.tool", "--help")
    assert result.returncode == 0
    assert "--json-lines" in result.stdout


def test_a_scripts_exit_code_is_the_commands(tmp_path):
    (tmp_path / "fails.py").write_text("import sys; sys.exit(7)")
    assert command("run", tmp_path / "fails.py").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no/such.py"], "no such script: no/such.py"),
        (["run", "no_such_module_here"], "no module named 'no_such_module_here'"),
        (["run", "no_such_package.module"], "no module named 'no_such_package.module'"),
        (["run", "-m", "json.tool"], "leave -m out: transformers-dsv3 run json.tool"),
        (["run", "-m"], "leave -m out: transformers-dsv3 run MODULE"),
        (["run", "--seed", "3", "script.py"], "'--seed' comes before the script or module"),
        (["quickstart", "--steps", "0"], "0 is not at least 1"),
        (["quickstart", "--seed", "-1"], "-1 does not lie between"),
        (["quickstart", "--text", "/no/such/text"], "/no/such/text does not exist"),
        (["explain", "x", "--dtype", "int3"], "'int3' is none of"),
        (["explain", "/no/such/checkpoint"], "/no/such/checkpoint: no such folder"),
        (["explain", "/no/such/checkpoint", "--device", "bogus"], "--device: 'bogus' is no device of this machine"),
        (["explain", "/no/such/checkpoint", "--device", "cuda:99"], "--device: 'cuda:99' is no device of this"),
    ],
)
def test_bad_arguments_name_the_argument(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_explain_names_a_folder_without_weights(tmp_path):
    AutoConfig.for_model("deepseek_v3").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{tmp_path}: " in result.output.replace("\n", " ") and "safetensors" in result.output


def test_run_takes_a_file_without_suffix_as_a_script(tmp_path, monkeypatch):
    (tmp_path / "train").write_text("import sys; sys.exit(len(sys.argv))")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # the verb replaces both
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert CliRunner().invoke(app, ["run", "train", "a", "b"]).exit_code == 3


LAUNCHERS = [
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "deepspeed",
    "deepspeed.launcher.runner",
    "trl.cli.main",
    "torchrun",
    "accelerate",
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_refused_with_the_form_that_works(launcher):
    result = CliRunner().invoke(app, ["run", launcher, "--nproc_per_node", "2", "script.py"])
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert f"{launcher} starts processes" in output and "where the plugin is not registered" in output
    assert "torchrun --nproc_per_node 2 -m transformers_dsv3.cli run script.py" in output
    assert "accelerate launch -m transformers_dsv3.cli run script.py" in output


def test_a_launchers_program_is_refused_too(tmp_path):
    (tmp_path / "torchrun").write_text("raise SystemExit(5)")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "torchrun"), "script.py"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    ],
)
def test_the_form_that_works_registers_the_plugin_in_every_process(launcher, tmp_path):
    pytest.importorskip(launcher[0].split(".")[0])
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom pathlib import Path\nfrom transformers import AutoConfig\n"
        "name = type(AutoConfig.for_model('deepseek_v3')).__module__.split('.')[0]\n"
        "(Path(sys.argv[1]) / f'rank_{os.environ.get(\"RANK\", 0)}').write_text(name)\n"
    )
    module, *options = launcher
    arguments = [*options, "-m", "transformers_dsv3.cli", "run", tmp_path / "script.py", tmp_path]
    result = programs.run(["-m", module, *arguments])
    assert result.returncode == 0, result.stderr
    ranks = {path.name: path.read_text() for path in tmp_path.glob("rank_*")}
    count = 2 if module.startswith("torch") else 1
    assert ranks == {f"rank_{rank}": "transformers_dsv3" for rank in range(count)}
