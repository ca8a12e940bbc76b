"""Every Triton program compiles for every family of GPUs, without one: registers, spills, shared memory.

The compilers run in a process of their own, since here Triton interprets programs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_dsv3.kernels.triton_src.tuned import FAMILIES


pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
MODULE = "transformers_dsv3.kernels.triton_src.ahead_of_time"
PROGRAMS = sorted((ROOT / "transformers_dsv3" / "kernels" / "triton_src").glob("*.py"))

# Programs of whose figures something is known, and some that fail
SPECIMENS = """
import os
import time

import triton
import triton.language as tl

from transformers_dsv3.kernels.triton_src.tuned import Specimen


@triton.jit
def _square(x):
    return x * x


@triton.jit
def product(x, y, out, N, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    places = rows[:, None] * N + rows[None, :]
    tl.store(out + places, _square(tl.dot(tl.load(x + places), tl.load(y + places))))


@triton.jit
def double(x, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(x + places, 2 * tl.load(x + places))


@triton.jit
def forgotten(x):
    tl.store(x, 0.0)


class Ends(dict):
    def __iter__(self):
        os._exit(7)


class Waits(dict):
    def __iter__(self):
        time.sleep(600)


def specimens(family):
    signature = {"x": "*bf16:16", "y": "*bf16:16", "out": "*fp32:16", "N": "i32:16"}
    yield Specimen("is fit", product, signature, {"BLOCK": 64}, {"num_warps": 4}, matrix=True)
    yield Specimen("is an unknown type", product, {**signature, "x": "*i32"}, {"BLOCK": 64}, matrix=True)
    yield Specimen("lacks a constant", product, signature, {}, matrix=True)
    yield Specimen("has one too many", product, signature, {"BLOCK": 64, "WIDTH": 1}, matrix=True)
    yield Specimen("has no products", double, {"x": "*fp32"}, {"BLOCK": 64}, matrix=True)
    yield Specimen("ends the process", product, signature, Ends(BLOCK=64))
    if family == "sm80":
        options = {"num_warps": 4, "maxnreg": 40}
        yield Specimen("spills", product, signature, {"BLOCK": 64}, options, matrix=True)
    elif family == "sm89":  # 99 KiB a program
        wide = {**signature, "x": "*fp32:16", "y": "*fp32:16"}
        yield Specimen("is too large", product, wide, {"BLOCK": 128}, {"num_warps": 8}, matrix=True)
        yield Specimen("takes for ever", product, signature, Waits(BLOCK=64))
"""


def compile_ahead(*arguments, folder=None):
    """The command's exit status and output."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([str(folder)] if folder else [])])
    command = [sys.executable, "-m", MODULE, *map(str, arguments)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def programs_of(path):
    return "def specimens(" in path.read_text(encoding="utf-8") and path.name not in ("ahead_of_time.py", "tuned.py")


@pytest.mark.slow
def test_every_program_compiles_for_every_family(tmp_path):
    with_programs = {path.stem for path in PROGRAMS if programs_of(path)}
    assert with_programs
    status, output = compile_ahead("--json", tmp_path / "report.json")
    print(output)
    record = json.loads((tmp_path / "report.json").read_text())
    reports = record["reports"]
    assert {each["module"].rpartition(".")[2] for each in reports} == with_programs
    assert {each["family"] for each in reports} == set(FAMILIES)
    assert not record["unlisted"]
    assert not [each for each in reports if each["problem"]]
    assert status == 0
    for each in reports:
        assert each["spills"] == 0 and each["registers"] > 0, each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("specimens")
    (made / "some_programs.py").write_text(SPECIMENS)
    return made


@pytest.fixture(scope="module")
def mixed_report(folder):
    path = folder / "report.json"
    status, output = compile_ahead("some_programs", "--family", "sm80,gfx942", "--json", path, folder=folder)
    record = json.loads(path.read_text())
    return status, output, record, {(each["family"], each["label"]): each for each in record["reports"]}


@pytest.mark.parametrize("family", ["sm80", "gfx942"])
def test_what_is_fit_has_its_figures(mixed_report, family):
    fit = mixed_report[3][family, "is fit"]
    assert fit["problem"] is None and fit["spills"] == 0 and fit["matrix"] and fit["program"] == "product"
    assert 16 < fit["registers"] <= 256
    # Both factors at once, or one after the other; and no more, for the sum stays in registers
    assert fit["shared"] in (8192, 16384)


@pytest.mark.parametrize(
    ("family", "label", "problem"),
    [
        ("sm80", "is an unknown type", "does not compile: CompilationError"),
        ("gfx942", "is an unknown type", "does not compile: CompilationError"),
        ("sm80", "lacks a constant", "does not compile: ValueError: the specimen says nothing of BLOCK"),
        ("sm80", "has one too many", "does not compile: ValueError: the program has no WIDTH"),
        ("sm80", "has no products", "does not use the matrix units"),
        ("gfx942", "has no products", "does not use the matrix units"),
        ("sm80", "spills", "spills "),
        ("sm80", "ends the process", "ends the compiler's process, with status 7"),
    ],
)
def test_what_is_not_fit_is_told_by_name(mixed_report, family, label, problem):
    status, output, _, reports = mixed_report
    assert status == 1
    assert reports[family, label]["problem"].startswith(problem)
    assert any(family in line and f"{label}: {problem}" in line for line in output.splitlines())


def test_programs_that_nothing_compiles_are_told(mixed_report):
    assert mixed_report[2]["unlisted"] == ["some_programs.forgotten"]
    assert "some_programs.forgotten is compiled by no specimen" in mixed_report[1]


def test_what_is_too_large_or_takes_too_long(folder):
    arguments = ["some_programs", "--family", "sm89", "--only", "too large"]
    status, output = compile_ahead(*arguments, folder=folder)
    assert status == 1 and "is too large: takes 131,072 bytes of shared memory, and there are 101,376" in output
    arguments = ["some_programs", "--family", "sm89", "--only", "for ever", "--limit", 1]
    status, output = compile_ahead(*arguments, folder=folder)
    assert status == 1 and "takes for ever: takes more than 1 s to compile" in output


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["--family", "sm70"], {}, "--family: 'sm70' is none of sm80, "),
        (["--jobs", "0"], {}, "--jobs: 0 is not at least 1"),
        (["nothing_of_that_name"], {}, "module 'nothing_of_that_name' cannot be imported"),
        (["transformers_dsv3.kernels.triton_src.tuned"], {}, "has no function specimens(family)"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 is set"),
    ],
)
def test_arguments_that_say_nothing_are_refused(arguments, environment, reason, monkeypatch, capsys):
    from transformers_dsv3.kernels.triton_src import ahead_of_time

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        ahead_of_time.main(arguments)
    assert ended.value.code == 2 and reason in capsys.readouterr().err
