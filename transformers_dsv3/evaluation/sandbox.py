"""Running a program that nobody has read: a Python process of its own that can reach nothing and ends on time.

`NAMESPACES`, on Linux, takes away what a process could reach: it has its own network without an interface, its own
process table, and a file system that holds Python's library read-only and an empty folder in memory. It runs without
privileges (as nobody where the caller is root), with an empty environment, limits on processor time, memory and disk,
and may start neither processes nor threads.

`AUDIT_HOOK` is for systems that do not allow that. The same limits hold, but the rest is Python's own word: a hook
refuses sockets, processes and writing outside of the folder. It stops what programs do by accident, and a program that
wants out finds a way.

Neither keeps a program from forging its own verdict. It passes by running to its end, so that leaving early is no
pass.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path


NAMESPACES, AUDIT_HOOK = "namespaces", "audit hook"

PASSED, TIMED_OUT, DIED = "passed", "timed out", "died"

_WORKER = Path(__file__).with_name("sandbox_worker.py")
# Nobody's on every Linux
_NOBODY = 65534
# Without it an interpreter outside of the usual places may not start. The worker empties its environment.
_LOADER_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# A worker that does not end by itself is killed so long after its time
_GRACE_SECONDS = 10
_LONGEST_VERDICT = 4096


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        cpu_seconds: processor time.
        wall_seconds: time on the clock, longer since other programs run too.
        memory_bytes: address space, the interpreter included.
        disk_bytes: of the folder in memory; of one file with the audit hook.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20


class SandboxError(RuntimeError):
    """The sandbox could not be set up; the message says which step failed. The program was not run."""


def run_program(program: str, limits: Limits | None = None, isolation: str = NAMESPACES) -> str:
    """Run a program to its end in a sandbox.

    Returns:
        `PASSED` where it ran to its end, `TIMED_OUT`, `DIED` where the process ended without a word (also by
        `os._exit`), or `raised NAME` with the class of the exception that ended it (`SystemExit` included).

    Raises:
        SandboxError: the sandbox could not be set up.
    """
    limits = limits or Limits()
    word = secrets.token_hex(16)
    request = {
        "program": program,
        "word": word,
        "isolation": isolation,
        "limits": asdict(limits),
        "readable": _readable_folders(),
        "nobody": _NOBODY,
    }
    folder = tempfile.mkdtemp(prefix="transformers-dsv3-sandbox-")
    verdict_read, verdict_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER), str(verdict_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={name: os.environ[name] for name in _LOADER_PATHS if name in os.environ},
            pass_fds=(verdict_write,),
            start_new_session=True,
        )
        # Also where the worker itself hangs, or waits for a reader of a verdict that never ends
        killer = threading.Timer(limits.wall_seconds + _GRACE_SECONDS, _kill, (process,))
        killer.start()
        try:
            os.close(verdict_write)
            verdict_write = -1
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died; the verdict will be missing
            with open(verdict_read, "rb", buffering=0) as pipe:
                verdict_read = -1
                verdict = _read(pipe)
        finally:
            killer.cancel()
            _kill(process)
            process.wait()
    finally:
        for descriptor in (verdict_read, verdict_write):
            if descriptor >= 0:
                os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
    return _outcome(verdict, word)


def sandbox_refusal(isolation: str = NAMESPACES) -> str | None:
    """Why programs cannot be run in that isolation here, in one line; None where they can. Tried."""
    if sys.platform == "win32":
        return "Windows has no limits on processes that could be used"
    try:
        outcome = run_program("assert 1 + 1 == 2", isolation=isolation)
    except SandboxError as error:
        return str(error)
    return None if outcome == PASSED else f"a program that does nothing ended with {outcome!r}"


def _read(pipe: object) -> bytes:
    """Up to the end of the pipe, or more than any verdict is long."""
    parts, size = [], 0
    while size <= _LONGEST_VERDICT and (part := pipe.read(_LONGEST_VERDICT)):  # type: ignore[attr-defined]
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _outcome(verdict: bytes, word: str) -> str:
    # The program can write there too, but not the word, unless it searches the worker's memory
    for line in verdict[: _LONGEST_VERDICT + 1].decode(errors="replace").splitlines():
        said, _, outcome = line.partition(" ")
        if said == word and outcome.startswith("setup: "):
            raise SandboxError(outcome.removeprefix("setup: "))
        if said == word:
            return outcome
    return DIED


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # ended; macOS says the latter of one not waited for
        pass


def _readable_folders() -> list[str]:
    """What an interpreter needs to import the standard library: its own folders and the system's libraries."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    folders = {sysconfig.get_path("stdlib")}
    folders |= {os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", "lib64")}
    folders |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"}
    folders |= {folder for name in _LOADER_PATHS for folder in os.environ.get(name, "").split(":") if folder}
    existing = sorted(f for f in map(os.path.abspath, folders) if os.path.isdir(f) and f != "/")
    # A folder within another comes with it
    return [f for f in existing if not any(f != other and Path(f).is_relative_to(other) for other in existing)]
