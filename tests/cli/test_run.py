import subprocess
import sys

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from transformers_dsv3.cli.main import app


SCRIPT = """
import json, sys
from pathlib import Path
import helper
from transformers import AutoConfig
class_name = type(AutoConfig.for_model("deepseek_v3")).__name__
Path(sys.argv[1]).write_text(json.dumps([sys.argv, __name__, class_name, helper.VALUE]))
"""


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "transformers_dsv3.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("verb", [[], ["quickstart"], ["run"], ["explain"]])
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
        "Dsv3Config",
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
