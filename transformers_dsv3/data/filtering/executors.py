"""What runs datatrove's steps: processes of this machine, or Ray's."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from ...option_error import OptionError


# Runs steps as so many tasks, with a folder for logs and marks of completion
Executor = Callable[[list[Any], int, str], None]
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def named_executor(name: str, workers: int) -> Executor:
    """`local` or `ray`.

    Raises:
        OptionError: it is none of them, or not installed.
    """
    if name == "local":
        return lambda steps, tasks, logs: run_local(steps, tasks, logs, workers)
    if name == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise OptionError("--executor", "ray needs pip install ray") from None

        def run_ray(steps: list[Any], tasks: int, logs: str) -> None:
            from datatrove.executor import RayPipelineExecutor

            RayPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=logs).run()

        return run_ray
    raise OptionError("--executor", f"is local or ray, not {name!r}")


def run_local(steps: list[Any], tasks: int, logs: str, workers: int) -> None:
    """Run the tasks that are not done, each in a process that is forked for it, so many at a time; one worker runs
    them here.

    datatrove's own executor leaves processes behind when it is killed, and imports torch anew for each stage.

    Raises:
        RuntimeError: a task has failed; its traceback is on standard error.
    """
    from datatrove.executor import LocalPipelineExecutor

    def run(rank: int) -> None:
        # Steps count for themselves. Of ranks other than the first, only errors are printed
        LocalPipelineExecutor(deepcopy(steps), tasks=tasks, logging_dir=logs)._run_for_rank(rank, local_rank=1)

    waiting = LocalPipelineExecutor(steps, tasks=tasks, logging_dir=logs).get_incomplete_ranks()
    if workers == 1 or len(waiting) <= 1:
        for rank in waiting:
            run(rank)
        return
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                rank = waiting.pop(0)
                process = context.Process(target=_run_in_child, args=(run, rank, os.getpid()))
                process.start()
                running[process.sentinel] = (rank, process)
            for sentinel in multiprocessing.connection.wait(list(running)):
                rank, process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    raise RuntimeError(f"task {rank} of {logs} has failed: exit code {process.exitcode}, see above")
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _run_in_child(run: Callable[[int], None], rank: int, parent: int) -> None:
    """Ends with its parent, however that ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != parent:  # before it was asked for
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    run(rank)
