"""Runs the stages one after another, each in a process of its own with a limit, and keeps what was finished.

`run.sh` calls it. It needs the standard library alone, so that whatever is missing or broken on a machine is told.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import summary


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
# Of a stage's output, in the JSON file, where the stage failed
LAST_LINES = 60
# For a stage that is told to end: the benchmark still writes what it has
GRACE = 10.0
TESTS = [
    "tests/kernels/test_experts_triton.py",
    "tests/kernels/test_mla_triton.py",
    "tests/kernels/test_triton_models.py",
]
BENCH = ["-m", "transformers_dsv3.cli", "bench"]


@dataclass(frozen=True)
class Stage:
    """A program and the seconds it may take at most.

    Args:
        gpu, cpu: its arguments for Python on a GPU, and for the rehearsal on a CPU. "{json}" stands for the file that
            it writes.
    """

    name: str
    seconds: float
    gpu: list[str]
    cpu: list[str]


DECODING = ["--contenders", "plugin static,plugin,transformers", "--what", "decode,batched"]
# The most valuable first
STAGES = [
    Stage(
        "checks",
        110,
        ["tests/gpu/checks.py", "--device", "cuda", "--json", "{json}"],
        ["tests/gpu/checks.py", "--device", "cpu", "--json", "{json}"],
    ),
    Stage(
        "kernels",
        90,
        [*BENCH, "moonlight", "--device", "cuda", "--what", "experts,attention", "--rounds", "5", "--json", "{json}"],
        [*BENCH, "small", "--device", "cpu", "--what", "experts,attention", "--rounds", "2", "--json", "{json}"]
        + ["--expert-tokens", "1,16", "--attention", "1x32,2x64"],
    ),
    Stage(
        "decoding",
        240,
        [*BENCH, "moonlight", "--device", "cuda", "--contexts", "1k,8k", "--rounds", "4", *DECODING]
        + ["--json", "{json}"],
        [*BENCH, "small", "--device", "cpu", "--layers", "2", "--contexts", "16,32", "--rounds", "2", *DECODING]
        + ["--batch", "2", "--batch-context", "16", "--new-tokens", "2", "--json", "{json}"],
    ),
    Stage(
        "tests",
        120,
        ["-m", "pytest", "-m", "not slow", "-v", "-p", "no:cacheprovider", *TESTS],
        ["-m", "pytest", "-v", "-p", "no:cacheprovider", TESTS[0], "-k", "sorted"],
    ),
]


def environment(device: str) -> dict[str, str]:
    """Of every stage: this checkout's package, and no file from the Hub."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # Models this small gain nothing from a second thread, and wait for it where another program is busy
    return {**found, "OMP_NUM_THREADS": "1"} if device == "cpu" else found


def run_limited(command: list[str], variables: dict[str, str], seconds: float, log: Path) -> tuple[int, bool]:
    """The exit status of a command and whether it was ended for taking longer; its output goes to a file."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds), False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                pass
            return process.poll() or -signal.SIGTERM, True
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def outcomes(log: str) -> dict[str, str]:
    """Of `pytest -v`: from a test to "passed", "failed", "error" or "skipped"."""
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", log, re.M)
    return {name: outcome.lower() for name, outcome in found}


def run_stage(stage: Stage, device: str, seconds: float, folder: Path) -> dict[str, object]:
    """What became of a stage: outcome, seconds, its record, its last lines where it failed."""
    written, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    arguments = stage.gpu if device == "cuda" else stage.cpu
    command = [sys.executable, *(argument.replace("{json}", str(written)) for argument in arguments)]
    started = time.monotonic()
    status, ended = run_limited(command, environment(device), seconds, log)
    lines = log.read_text(errors="replace")
    entry: dict[str, object] = {
        "name": stage.name,
        "command": [argument.replace("{json}", f"{stage.name}.json") for argument in arguments],
        "seconds": round(time.monotonic() - started, 1),
        "outcome": "out of time" if ended else "finished" if status == 0 else "failed",
    }
    if written.exists():
        entry["record"] = json.loads(written.read_text())
    if stage.name == "tests":
        entry["record"] = outcomes(lines)
    if entry["outcome"] != "finished":
        entry["last_lines"] = lines.splitlines()[-LAST_LINES:]
    return entry


def look_at(device: str) -> dict[str, object]:
    """What the machine has, with the reasons why nothing can be run there.

    Raises:
        SystemExit: where not even that can be found out.
    """
    command = [sys.executable, str(HERE / "machine.py"), "--device", device]
    done = subprocess.run(command, env=environment(device), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{sys.executable} cannot run this package:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def commit() -> str | None:
    """Of the checkout, with a mark where files differ from it; None where git does not tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=RESULTS, help="For the results. Default: tests/gpu/results."
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="For everything. Default: 8.")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", default=",".join(names), metavar="STAGE,...", help=f"Any of {', '.join(names)}.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses it at tiny sizes.")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(names)}")
    started = time.monotonic()
    # Seconds for the last table, and for a stage that does not end at once
    until = started + 60 * options.minutes - 1.5 * GRACE

    machine = look_at(options.device)
    for problem in machine["problems"]:
        print(problem, file=sys.stderr)
    if machine["problems"]:
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    begun = datetime.now(timezone.utc)
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"]["name"].lower()).strip("-")
    path = options.folder / f"{name}-{begun:%Y%m%dT%H%M%S}.json"
    results = {
        "started": begun.isoformat(timespec="seconds"),
        "commit": commit(),
        "rehearsal": options.device == "cpu",
        "machine": machine,
        "stages": [],
    }

    def write() -> None:
        results["seconds"] = round(time.monotonic() - started, 1)
        results["targets"] = summary.targets(results["stages"])
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(summary.page(results), encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        for stage in STAGES:
            if stage.name not in wanted:
                continue
            left = until - time.monotonic()
            if stage.name == "tests" and machine["missing_for_tests"]:
                entry = {"name": "tests", "outcome": f"not run: {machine['missing_for_tests']}", "seconds": 0.0}
            elif left < GRACE:
                entry = {"name": stage.name, "outcome": "not run: out of time", "seconds": 0.0}
            else:
                print(f"{stage.name}, up to {min(stage.seconds, left):.0f} s ...", flush=True)
                entry = run_stage(stage, options.device, min(stage.seconds, left), Path(scratch))
            print(f"{stage.name}: {entry['outcome']}, {entry['seconds']:.0f} s", flush=True)
            results["stages"].append(entry)
            write()
    print(summary.page(results))
    print(f"{path} and {path.with_suffix('.md').name}, after {results['seconds']:.0f} s")
    return 0 if summary.succeeded(results["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
