"""Transformers' own tests of models, on the plugin's classes; see `transformers_own_tests.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = os.environ.get("DSV3_TRANSFORMERS_TESTS")


@pytest.mark.interop
@pytest.mark.skipif(FOLDER is None, reason="DSV3_TRANSFORMERS_TESTS names no folder for Transformers' source package")
def test_what_native_passes_the_plugin_passes():
    script = Path(__file__).with_name("transformers_own_tests.py")
    done = subprocess.run([sys.executable, str(script), FOLDER], capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "only native passes: none" in done.stdout and " 0 passed" not in done.stdout
