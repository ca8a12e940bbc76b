"""Every command in the documentation.

These are the commands of fenced blocks and inline code of all pages, of the scripts' own docstrings and of `--help`
(those of the cards in `model_cards/` are made from records).
Each is parsed by its own program's parser, so that an option, a file or a verb that is no more fails here; and
`RUN_BY` says which test runs it, small, or why it is run elsewhere.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement

from transformers_dsv3.kernels.selection import CHOICES, VARIABLE
from transformers_dsv3_cli.main import app


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "examples/*.md", "tests/**/*.md", "model_cards/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = (
    "transformers-dsv3",
    "python",
    "torchrun",
    "accelerate",
    "tests/",
    "pip",
    "hf",
    "ruff",
    "mypy",
    "pre-commit",
)

# What runs a command at small size: a test, or what else does and why no test can
RUN_BY = {
    "transformers-dsv3 bench": "tests/cli/test_bench.py",
    "transformers-dsv3 card": "tests/cli/test_card.py",
    "transformers-dsv3 compress": "tests/cli/test_compress.py",
    "transformers-dsv3 evaluate": "tests/cli/test_evaluate.py",
    "transformers-dsv3 explain": "tests/kernels/test_explain.py",
    "transformers-dsv3 export-gguf": "tests/cli/test_export_gguf.py",
    "transformers-dsv3 filter": "tests/cli/test_filter.py",
    "transformers-dsv3 plan": "tests/training/plan/test_plan.py",
    "transformers-dsv3 pull": "tests/hub/test_pull.py",
    "transformers-dsv3 push": "tests/hub/test_push.py",
    "transformers-dsv3 quickstart": "tests/cli/test_quickstart.py",
    "transformers-dsv3 routing": "tests/cli/test_routing.py",
    "transformers-dsv3 run": "tests/cli/test_run.py",
    "transformers-dsv3 serve": "tests/cli/test_serve.py",
    "curl": "tests/serving/test_serve_page.py",
    "examples/balancing_study.py": "tests/training/test_training_cost.py",
    "examples/compress_study.py": "tests/examples/test_compress_study.py",
    "examples/filter_study.py": "tests/examples/test_filter_study.py",
    "examples/continue_pretraining.py": "tests/examples/test_pretrain.py",
    "examples/dpo.py": "tests/examples/test_dpo.py",
    "examples/esft.py": "tests/examples/test_esft.py",
    "examples/lora_sft.py": "tests/examples/test_lora_sft.py",
    "examples/pretrain.py": "tests/examples/test_pretrain.py",
    "torchrun": "tests/examples/test_pretrain_parallel.py",
    "accelerate": "tests/examples/test_pretrain_parallel.py",
    "python setup.py": "tests/kernels/test_cpu_build.py",
    "examples/optimizer_study.py": "tests/training/test_muon.py",
    "examples/esft_study.py": "elsewhere: 20 minutes; its figures are in model_cards/esft",
    "examples/lora_study.py": "elsewhere: an hour and a half; its figures are in model_cards/lora",
    "ahead_of_time": "tests/kernels/test_triton_compile.py",
    "tests/gpu/run.sh": "tests/gpu/test_gpu_run.py",
    "tests/compatibility.sh": "elsewhere: .ci/run",
    "tests/interop/run.sh": "elsewhere: installs 8 GB of other programs",
    "tests/interop/arm64.sh": "elsewhere: installs a Debian for ARM",
    "tests/kernels/sanitize.sh": "elsewhere: needs gcc's sanitizers, and two minutes",
    "python -m pytest": "elsewhere: it is what runs this",
    "pip": "elsewhere: .ci/run installs",
    "python3 -m venv": "elsewhere: .ci/run installs",
    "busy_steps": "elsewhere: needs a machine that does nothing else",
    "decode_step_calls": "tests/kernels/test_dispatch.py",
    "pre-commit": "elsewhere: needs a git checkout",
    "ruff": "elsewhere: .ci/run",
    "mypy": "elsewhere: .ci/run",
    "hf": "elsewhere: downloads data sets",
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands_in(text):
    """Commands of shell text, one a line: comments, continuations, `for` loops, `&&` and variables taken apart."""
    for line in re.sub(r"\\\n\s*", lambda m: " " if m.group().startswith("\\\n ") else "", text).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if loop := re.match(r"for (\w+) in (\S+)[^;]*; do (.*); done$", line):
            line = loop[3].replace(f"${loop[1]}", loop[2])
        yield from (part.strip() for part in line.split("&&") if part.strip())


def documented():
    """(where, command) of all that the documentation tells people to run."""
    found = {}
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE):
            if language == "bash":
                for command in commands_in(block):
                    found.setdefault(command, page)
        prose = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
            code = " ".join(code.split())
            if code.startswith(tuple(f"{name} " for name in PROGRAMS)) or re.match(r"tests/\S+\.sh", code):
                for command in commands_in(code):
                    found.setdefault(command, page)
    for script in sorted(ROOT.glob("examples/*.py")):
        docstring = script.read_text(encoding="utf-8").split('"""')[1].replace("\\\\\n", "\\\n")
        for command in commands_in(docstring):
            if re.match(r"(python|torchrun|transformers-dsv3) .*", command) and "examples" in command:
                found.setdefault(command, script.relative_to(ROOT).as_posix())
    for verb, command in typer.main.get_command(app).commands.items():
        for line in commands_in((command.help or "").partition("Examples:")[2]):
            if line.startswith("transformers-dsv3 "):
                found.setdefault(line, f"transformers-dsv3 {verb} --help")
    return [pytest.param(command, id=f"{page}: {command}"[:150]) for command, page in found.items()]


def split(command):
    """Words, without variables in front and without the marks of what may be left out or repeated."""
    words = shlex.split(re.sub(r"[\[\]](?=\s|$)|(?<=\s)\[|…", "", command))
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == VARIABLE:
            for choice in value.split(","):
                operation, _, backend = choice.partition("=")
                assert backend in CHOICES[operation], f"{backend} is no backend for {operation}"
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
    return words


def parse_click(group, words):
    """As the program does, up to the point where it would begin."""
    context = group.make_context(words[0], words[1:])
    rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
    name, command, rest = group.resolve_command(context, rest)
    if rest:  # a verb alone is no command, but the name of one
        command.make_context(name, rest, parent=context)


class Parsed(Exception):
    pass


def parse_script(words, monkeypatch, run=lambda script: runpy.run_path(str(ROOT / script), run_name="__main__")):
    """Runs a script until its parser has taken the command line."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None, **options):
        _, unknown = original(self, args, namespace, **options)
        assert not unknown, f"{words[0]} does not know {unknown}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(Parsed):
        run(words[0])
    monkeypatch.undo()


def parse_pip(words):
    assert words.pop(0) == "install"
    extras = set(
        re.findall(r"^(\w+) = \[", read("pyproject.toml").partition("optional-dependencies")[2], re.MULTILINE)
    )
    for word in words:
        if word == "-e":
            continue
        if word.startswith("."):
            assert set(filter(None, word[1:].strip("[]").split(","))) <= extras, word
        else:
            Requirement(word)


def parse_pytest(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-m")
    parser.add_argument("-r")
    parser.add_argument("-n")
    parser.add_argument("-k")
    given = parser.parse_args(words)
    for path in given.paths:
        assert (ROOT / path).exists(), f"{path} is not there"
    marks = set(re.findall(r"\w+", given.m or "")) - {"not", "or", "and"}
    assert marks <= {"slow", "interop"}, marks


def parse(words, monkeypatch):
    """Raises where the program that is named would refuse the command line."""
    match words:
        case ["transformers-dsv3", *_]:
            parse_click(typer.main.get_command(app), words)
        case ["hf", *_]:
            from huggingface_hub.cli.hf import app as hf

            parse_click(hf if hasattr(hf, "make_context") else typer.main.get_command(hf), words)
        case ["python3", "-m", "venv", folder]:
            assert folder == ".venv"
        case ["python", "-m", "pytest", *rest]:
            parse_pytest(rest)
        case ["python", "-m", module, *rest]:
            parse_script([module, *rest], monkeypatch, lambda name: runpy.run_module(name, run_name="__main__"))
        case ["python", "setup.py", *rest]:
            assert rest == ["build_ext", "--inplace"]
        case ["python", script, *rest]:
            parse_script([script, *rest], monkeypatch)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            given = get_args_parser().parse_args(rest)
            parse_script([given.training_script, *given.training_script_args], monkeypatch)
        case ["accelerate", "launch", *rest]:
            from accelerate.commands.launch import launch_command_parser

            given = launch_command_parser().parse_args(rest)
            assert given.config_file is None or (ROOT / given.config_file).is_file()
            parse_script([given.training_script, *given.training_script_args], monkeypatch)
        case ["pip", *rest]:
            parse_pip(rest)
        case [script, *_] if script.endswith(".sh"):
            assert os.access(ROOT / script, os.X_OK)
            subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
        case ["curl", address, *rest]:
            assert address.startswith("http://127.0.0.1:8000/")
            given = dict(zip(rest[::2], rest[1::2]))
            assert set(given) == {"-H", "-d"} and isinstance(json.loads(given["-d"]), dict)
        case ["ruff" | "mypy", *_]:
            assert " ".join(words) in read(".ci/run")
        case _:
            assert words[0] in ("pre-commit",), f"nothing here knows {words[0]}"


DOCUMENTED = documented()


def test_all_programs_are_found():
    commands = [command.values[0] for command in DOCUMENTED]
    for program in RUN_BY:
        assert any(program in command for command in commands), f"{program} is in RUN_BY, and on no page"


@pytest.mark.parametrize("command", DOCUMENTED)
def test_commands_are_taken(command, monkeypatch):
    parse(split(command), monkeypatch)


@pytest.mark.parametrize("command", DOCUMENTED)
def test_commands_are_run(command):
    words = " ".join(split(command))
    programs = [program for program in RUN_BY if program in words]
    assert programs, "no test runs it: add one to RUN_BY"
    for program in programs:
        place = RUN_BY[program]
        if not place.startswith("elsewhere: "):
            last = program.rpartition("/")[2].split()[-1].removesuffix(".py")
            assert last in read(place), f"{place} does not run {program}"
