"""TRL's own tests of its trainers, on the plugin's classes; see `trl_own_tests.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = os.environ.get("DSV3_TRL_TESTS")
CHECKOUT = os.environ.get("DSV3_TRL_TESTS_FROM")


@pytest.mark.interop
@pytest.mark.skipif(FOLDER is None, reason="DSV3_TRL_TESTS names no folder for TRL's tests")
def test_what_native_passes_the_plugin_passes():
    script = Path(__file__).with_name("trl_own_tests.py")
    command = [sys.executable, str(script), FOLDER, *(["--tests", CHECKOUT] if CHECKOUT else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    print(done.stdout)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native passes, the plugin does not: 0" in done.stdout
