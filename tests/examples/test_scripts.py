"""What every script of examples/ looks like: short, and on top the command that runs it."""

import ast
from pathlib import Path

import pytest


SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_read_in_minutes(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    assert source.startswith(f'"""{docstring.splitlines()[0]}\n')
    # A sentence, and then commands, the script's own among them (tests/test_documented_commands.py parses them)
    said, _, rest = docstring.partition("\n\n")
    assert said.endswith(".") and len(said.splitlines()) == 1
    commands = rest.partition("\n\n")[0].splitlines()
    assert all(line.startswith("    ") or "\\\n" in rest for line in commands)
    assert any(f"python examples/{script.name} " in f"{line} " for line in rest.splitlines()[:4])
    assert commands[0].startswith(("    python ", "    transformers-dsv3 "))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_has_a_main_and_stands_alone(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert "main" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    others = {other.stem for other in SCRIPTS}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not modules & others


def test_there_are_scripts():
    assert len(SCRIPTS) >= 8
