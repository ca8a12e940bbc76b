"""Measuring in a process that does nothing else, and has done nothing before."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def measure_apart(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """What `python -m MODULE` makes of a request: JSON in by its input, JSON out as its last line.

    Raises:
        RuntimeError: with the last line of what the process said, where it failed.
    """
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])
