"""PEFT's own tests, on the plugin's classes; see `peft_own_tests.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = os.environ.get("DSV3_PEFT_TESTS")


@pytest.mark.interop
@pytest.mark.skipif(FOLDER is None, reason="DSV3_PEFT_TESTS names no folder for PEFT's source package")
def test_what_native_passes_the_plugin_passes():
    script = Path(__file__).with_name("peft_own_tests.py")
    done = subprocess.run([sys.executable, str(script), FOLDER], capture_output=True, text=True, timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native passes, the plugin does not: 0" in done.stdout
