"""`compress` and `export-gguf` under kill -9 at random moments."""

import random
import signal
import sysconfig
import time
from pathlib import Path

import pytest

from tests import programs


# The command, which is killed after some seconds, wherever it is by then; after 0 not at all
_KILLED_AFTER = """
import os, runpy, signal, sys, time
seconds = float(sys.argv.pop(1))
command = os.getpid()
if seconds and os.fork() == 0:
    time.sleep(seconds)
    if os.getppid() == command:
        os.kill(command, signal.SIGKILL)
    os._exit(0)
runpy.run_module("transformers_dsv3.cli", run_name="__main__", alter_sys=True)
"""
KILLS = 20


def contents(path):
    """Of a file, or of a folder's files by name; None of what is not there. Without a record's seconds."""
    if path.is_dir():
        return {file.name: contents(file) for file in path.iterdir()}
    if path.name == "compression_record.json":
        return [line for line in path.read_text().splitlines() if '"seconds"' not in line]
    return path.read_bytes() if path.exists() else None


def check(arguments, output, measured, before=None):
    """Kills a command again and again while it makes `output`, which is whole or as it was `before` at any time."""

    def run(seconds):
        return programs.run(["-c", _KILLED_AFTER, seconds, *arguments, "--output", output])

    undisturbed = run(0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = contents(output)
    assert expected is not None

    def begin_anew():
        if before is None:
            output.rename(output.with_name(f"finished-{len(list(output.parent.iterdir()))}"))
        else:
            output.write_bytes(before)

    begin_anew()
    # The first run took longer, to import what the others share
    draw, kills, finished, longest = random.Random(0), 0, 0, 600.0
    while kills < KILLS:
        started = time.monotonic()
        done = run(draw.uniform(0, longest) if longest < 600 else 0)
        if done.returncode == -signal.SIGKILL:
            kills += 1
            # A command may be killed behind its last step
            assert contents(output) in (before, expected)
        else:
            assert done.returncode == 0, done.stderr
            longest = min(longest, time.monotonic() - started)
        if contents(output) == expected:
            finished += 1
            begin_anew()
    done = run(0)
    assert done.returncode == 0, done.stderr
    assert contents(output) == expected
    # Nothing is left beside it
    assert not [path.name for path in output.parent.iterdir() if path.name.startswith(".") or "partial" in path.name]
    measured[f"{arguments[0]}: {KILLS} kills at random moments, times it was finished in between"] = finished


@pytest.mark.slow
def test_compress(checkpoint, tmp_path, measured):
    text = tmp_path / "text" / "text.py"
    text.parent.mkdir()
    text.write_bytes((Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_bytes()[:20_000])
    options = ["--text", text, "--prune", "0.25", "--experts-bits", "3", "--tokens", "2560", "--window", "64"]
    check(["compress", checkpoint, *options], tmp_path / "out", measured)


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "in place of another"])
def test_export_gguf(checkpoint, gguf_files, tmp_path, measured, replaces):
    before = gguf_files("q8_0").read_bytes() if replaces else None
    check(["export-gguf", checkpoint, "--type", "q4_0"], tmp_path / "model.gguf", measured, before)
