"""How long torch's threads wait busily for each other."""

from __future__ import annotations

import os


# Rounds of waiting before a thread sleeps: a quarter of a millisecond, where OpenMP of GCC takes 15. Threads of a
# small model meet several thousand times a step. Where another process has one of their cores, those that arrive wait
# for the one that does not run, and busy waiting takes from it the core that it could run on.
ROUNDS = 5000


def wait_less() -> None:
    """Makes OpenMP's threads sleep after `ROUNDS`, unless the environment says how they wait.

    Has to come before torch is imported, which is when OpenMP reads it. Nothing is slower for it on a machine that
    does nothing else: `python tests/training/busy_steps.py`.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(ROUNDS))
