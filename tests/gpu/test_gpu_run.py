"""The script for a GPU that is lent, rehearsed without one: stages, limits, targets, what it says of a machine."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transformers_dsv3.benchmark import ceilings
from transformers_dsv3_cli.main import app


HERE = Path(__file__).parent


def load(name):
    """A module of this folder, which is no package: the script runs its files by their paths."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


summary, machine, run, checks = (load(name) for name in ("summary", "machine", "run", "checks"))


def script(*arguments, **environment):
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    command = [str(HERE / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_checks(check):
    """As far as a CPU goes: those about graphs say that there are none."""
    entry = checks.run(check, torch.device("cpu"))
    assert entry["outcome"] in ("passed", "not here"), entry
    assert entry["outcome"] == "passed" or check in (
        checks.static_decoding_compiles_once,
        checks.a_token_is_one_launch,
        checks.the_host_never_waits,
    )


def test_a_check_that_fails_is_told(capsys):
    def breaks(device):
        assert 1 + 1 == 3, "sums are wrong"

    entry = checks.run(breaks, torch.device("cpu"))
    assert entry["outcome"] == "failed" and entry["reason"] == "AssertionError: sums are wrong"


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script(tmp_path / "results")
    assert done.returncode == 2 and "has no GPU to use here" in done.stderr and "--device cpu" in done.stderr
    assert not (tmp_path / "results").exists()


def test_machines_that_lack_something():
    fine = {"torch": "2.11.0+rocm7", "transformers": "5.17.0", "triton": "unknown"}
    assert not list(machine.problems(fine, "cuda"))
    assert not list(machine.problems({**fine, "torch": "3.0.0", "transformers": "6.0.1"}, "cuda"))
    assert not list(machine.problems({**fine, "triton": None}, "cpu"))
    (problem,) = machine.problems({**fine, "triton": None}, "cuda")
    assert problem.startswith("triton is not installed in ")
    (problem,) = machine.problems({**fine, "torch": "2.9.1"}, "cuda")
    assert problem == "torch 2.9.1 is older than 2.11, the oldest that is supported."


def test_time_that_runs_out_ends_a_stage(tmp_path):
    """With all the processes it started, and what it wrote until then is kept."""
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "written = pathlib.Path(sys.argv[1] + '.partial')\n"
        "written.write_text('{\"child\": %d}' % child.pid)\n"
        "written.rename(sys.argv[1])\n"
        "print('begun', flush=True); time.sleep(600)\n"
    )
    for seconds in (1, 10, 100):  # on a busy machine it begins late
        stage = run.Stage("decoding", seconds, [], ["-c", code, "{json}"])
        started = time.monotonic()
        entry = run.run_stage(stage, "cpu", stage.seconds, tmp_path)
        assert time.monotonic() - started < stage.seconds + run.GRACE + 300  # its child would sleep for longer
        if entry["last_lines"]:
            break
    assert entry["outcome"] == "out of time" and entry["last_lines"] == ["begun"]
    # A process that was killed is there until the system has come round to it
    deadline = time.monotonic() + 300
    while is_running(entry["record"]["child"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_outcomes_of_tests_are_read_from_the_log():
    log = (
        "tests/a.py::test_one PASSED   [ 33%]\n"
        "tests/a.py::test_two[all to one-dtype] FAILED  [ 66%]\n"
        "tests/a.py::test_three SKIPPED (no GPU) [100%]\n"
        "FAILED tests/a.py::test_two[all to one-dtype] - assert 1 == 2\n"
    )
    assert run.outcomes(log) == {
        "tests/a.py::test_one": "passed",
        "tests/a.py::test_two[all to one-dtype]": "failed",
        "tests/a.py::test_three": "skipped",
    }


def test_every_file_of_tests_is_there():
    for stage in run.STAGES:
        for argument in (*stage.gpu, *stage.cpu):
            assert not argument.startswith("tests/") or (run.ROOT / argument).is_file(), argument


def kernels(**contenders):
    """A record of the benchmark's as on a GPU, with figures of one's own."""
    entries = []
    for what, with_gradients, operations in (("experts", False, 10), ("experts", True, 30), ("attention", None, 5)):
        figures = {
            name: {
                "median": seconds,
                "operations_per_second": rate,
                "bytes_per_second": rate / 100,
                "errors": {"output": error},
            }
            for name, (seconds, rate, error) in contenders.items()
        }
        figures["torch" if what == "attention" else "grouped_mm"] = {
            "median": 2.0,
            "operations_per_second": 1.0,
            "bytes_per_second": 1.0,
            "errors": {"output": 2e-3},
        }
        entry = {"what": what, "title": what, "operations": operations, "contenders": figures, "failed": {}}
        entries.append(entry if with_gradients is None else {**entry, "with_gradients": with_gradients})
    return {"name": "kernels", "outcome": "finished", "record": {"kernels": entries}}


def met(stages):
    return [each["met"] for each in summary.targets(stages)]


def test_targets():
    assert met([]) == [None] * 10
    fast = kernels(triton=(1.0, 600e12, 1e-3))
    assert met([fast]) == [True, True, True, True, *[None] * 5, True]
    slow = kernels(triton=(1.9, 450e12, 2.1e-3))
    assert met([slow]) == [False, True, False, True, *[None] * 5, False]
    assert "1.050×" in summary.targets([slow])[-1]["written"]
    missing = kernels()
    missing["record"]["kernels"][0]["failed"] = {"triton": "needs a GPU"}
    assert summary.targets([missing])[0]["written"] == "not measured, triton: needs a GPU"


@pytest.fixture
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_page_is_made_of_what_the_benchmark_writes(make_model, tmp_path, small_ceilings):
    make_model().save_pretrained(tmp_path / "model")
    record = tmp_path / "bench.json"
    stages = []
    for name, options in (
        ("kernels", "--what experts,attention --expert-tokens 1,8 --attention 1x16,2x32"),
        ("decoding", f"--contexts 8,16 --batch 2 --batch-context 4 --new-tokens 2 {' '.join(run.DECODING[2:])}"),
    ):
        contenders = run.DECODING[:2] if name == "decoding" else []
        arguments = ["bench", str(tmp_path / "model"), *options.split(), *contenders]
        result = CliRunner().invoke(app, [*arguments, "--rounds", "1", "--json", str(record)])
        assert result.exit_code == 0, result.output
        stages.append({"name": name, "outcome": "finished", "seconds": 1.0, "record": json.loads(record.read_text())})
    targets = summary.targets(stages)
    assert not [each for each in targets if each["met"] is None], targets
    results = {
        "machine": {"device": {"name": "CPU"}, "versions": {"torch": "2.13.0", "triton": None}},
        "rehearsal": True,
        "commit": None,
        "started": "now",
        "targets": targets,
        "stages": stages,
    }
    page = summary.page(results)
    for text in (
        "# CPU\n",
        "A rehearsal on a CPU",
        "(plugin static)",
        "decode, 16 cached",
        "| decoding | finished | 1 |",
    ):
        assert text in page
    # Every row of a table has as many cells as its headings
    for table in re.findall(r"(?:^\|.*\|\n)+", page, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def check_results(folder, stages):
    (path,) = folder.glob("*.json")
    results = json.loads(path.read_text())
    assert [stage["name"] for stage in results["stages"]] == stages
    assert {stage["outcome"] for stage in results["stages"]} == {"finished"}, results["stages"]
    assert results["rehearsal"] and results["machine"]["versions"]["torch"] == torch.__version__
    assert path.name.startswith("cpu-") and path.with_suffix(".md").read_text() == summary.page(results)
    return results


def test_a_rehearsal_of_one_stage(tmp_path):
    done = script(tmp_path, "--device", "cpu", "--only", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    (stage,) = check_results(tmp_path, ["tests"])["stages"]
    assert stage["record"] and set(stage["record"].values()) == {"passed"}


@pytest.mark.slow
def test_a_rehearsal_of_all_stages(tmp_path):
    done = script(tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    results = check_results(tmp_path, [stage.name for stage in run.STAGES])
    assert all(each["met"] is not None for each in results["targets"])
    assert results["seconds"] < 8 * 60
