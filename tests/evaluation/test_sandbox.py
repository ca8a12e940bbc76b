"""Hostile programs in the sandbox: none of them reaches anything, none outlives its time, none of them passes."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from transformers_dsv3.evaluation import sandbox
from transformers_dsv3.evaluation.sandbox import (
    AUDIT_HOOK,
    DIED,
    NAMESPACES,
    PASSED,
    TIMED_OUT,
    Limits,
    SandboxError,
    run_program,
    sandbox_refusal,
)


LIMITS = Limits(cpu_seconds=1, wall_seconds=1.5, memory_bytes=256 << 20, disk_bytes=1 << 20)


@pytest.fixture(scope="module", params=[NAMESPACES, AUDIT_HOOK])
def run(request):
    """Runs a program in one of the isolations, with small limits."""
    if (refusal := sandbox_refusal(request.param)) is not None:
        pytest.skip(refusal)

    def run(program):
        return run_program(program, LIMITS, request.param)

    run.isolation = request.param
    return run


@pytest.fixture
def strict(run):
    if run.isolation != NAMESPACES:
        pytest.skip("what a hook cannot promise")
    return run


def test_right_and_wrong_programs(run):
    assert run("import math, re, collections\nassert math.gcd(12, 18) == 6") == PASSED
    assert run("assert 1 + 1 == 3") == "raised AssertionError"
    assert run("def f(:") == "raised SyntaxError"
    assert run("unknown") == "raised NameError"
    assert run("input()") == "raised EOFError"


def test_the_environment_is_empty(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib")
    assert run("import os\nassert dict(os.environ) == {}") == PASSED


WRITING_EVERYWHERE = """import os
for fd in range({first}, 64):
    try: os.write(fd, b'{text}\\n\\n {text}\\n')
    except OSError: pass
"""


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import os\nos._exit(0)\nassert False", DIED),
        ("import sys\nsys.exit(0)\nassert False", "raised SystemExit"),
        ("raise SystemExit", "raised SystemExit"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("class passed(BaseException): pass\nraise passed", "raised passed"),
        ("import ctypes\nctypes.string_at(0)", None),
        ("print('passed')\nimport os\nos._exit(0)", DIED),
        (WRITING_EVERYWHERE.format(first=0, text="passed") + "unknown", None),
        ("import builtins, os\nbuiltins.BaseException = ()\nos._exit = print\nraise ValueError", "raised ValueError"),
    ],
)
def test_leaving_early_is_no_pass(run, program, outcome):
    found = run(program)
    assert found != PASSED and outcome in (None, found)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor n in (1, 2, 15, 14, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "while True: print('x' * 10**6)",
        "while True:\n  " + WRITING_EVERYWHERE.format(first=3, text="x" * 4000).replace("\n", "\n  "),
    ],
    ids=["loop", "sleep", "signals ignored", "gigabytes printed", "descriptors flooded"],
)
def test_time_is_limited(run, program):
    started = time.monotonic()
    assert run(program) in (TIMED_OUT, DIED)
    assert time.monotonic() - started < LIMITS.wall_seconds + 15


def test_memory_is_limited(run):
    assert run("x = bytearray(2 << 30)") == "raised MemoryError"
    assert run("x = []\nwhile True: x.append(' ' * 10**6)") == "raised MemoryError"


FORK_BOMB = "import os\nn = 0\ntry:\n  while True:\n    os.fork(); n += 1\nexcept OSError: pass\nassert n == 0"
THREADS = "import threading\nthreading.Thread(target=print).start()"
DETACHED = "import os\nif os.fork() == 0:\n  os.setsid()\n  open('{path}', 'w').close()\n  while True: pass"


def test_no_processes(run, tmp_path):
    assert run(FORK_BOMB) in (PASSED, "raised PermissionError")
    assert run(DETACHED.format(path=tmp_path / "mark")) != PASSED and not (tmp_path / "mark").exists()
    assert run("import subprocess\nsubprocess.run(['/bin/true'])") != PASSED
    if run.isolation == NAMESPACES or os.geteuid() != 0:
        assert run(THREADS) == "raised RuntimeError"  # Python's own word for it: can't start new thread


def test_no_network(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        attempt = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        with socket.create_connection(("127.0.0.1", port)):  # that it would be heard
            listener.accept()[0].close()
        assert run(attempt) != PASSED
        assert run(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')") != PASSED
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


@contextlib.contextmanager
def public_folder():
    """A folder that everybody may write to: pytest's own are private to the user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_nothing_is_written_outside(run):
    with public_folder() as folder:
        kept = folder / "kept"
        kept.write_text("as it was")
        kept.chmod(0o666)
        for program in (
            f"open({str(kept)!r}, 'w').write('gone')",
            f"import os\nos.remove({str(kept)!r})",
            f"import os\nos.rename({str(kept)!r}, {str(folder / 'other')!r})",
            f"import os\nos.mkdir({str(folder / 'new')!r})",
            f"import os\nos.chmod({str(kept)!r}, 0)",
            f"import os\nos.symlink({str(kept)!r}, 'link')\nopen('link', 'w').write('gone')",
            f"import shutil\nshutil.rmtree({str(folder)!r})",
            f"import os\nos.open('kept', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open({str(folder)!r}, os.O_RDONLY))",
            f"import os\nos.chdir({str(folder)!r})\nopen('kept', 'w')",
        ):
            assert run(program) != PASSED, program
        assert kept.read_text() == "as it was" and [path.name for path in folder.iterdir()] == ["kept"]
    assert run("open('own', 'w').write('x')\nassert open('own').read() == 'x'") == PASSED
    library = os.path.dirname(os.__file__)
    assert run(f"open({library + '/dsv3_sandbox_test.py'!r}, 'w')") != PASSED
    assert not os.path.exists(library + "/dsv3_sandbox_test.py")


def test_disk_is_limited(run):
    assert run("open('big', 'wb').write(bytes(8 << 20))") != PASSED


def test_nothing_is_left_behind(run):
    folders = set(Path(tempfile.gettempdir()).glob("transformers-dsv3-sandbox-*"))
    run("open('a', 'w').close()")
    assert set(Path(tempfile.gettempdir()).glob("transformers-dsv3-sandbox-*")) <= folders


def test_files_of_the_user_cannot_be_seen(strict):
    with public_folder() as folder:
        (folder / "secret").write_text("secret")
        assert strict(f"open({str(folder / 'secret')!r}).read()") == "raised FileNotFoundError"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            (folder / "socket").chmod(0o777)
            reach = f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(folder / 'socket')!r})"
            assert strict(reach) == "raised FileNotFoundError"
        absent = (str(folder), "/home", "/etc", "/proc/1", "/var", "/bin/sh")
        assert strict(f"import os\nassert not any(map(os.path.exists, {absent!r}))") == PASSED


def test_other_processes_cannot_be_seen(strict):
    """The caller lives, though it may be of the same user."""
    for target in (os.getpid(), -1, 0):
        strict(f"import os, signal\nos.kill({target}, signal.SIGKILL)")
    assert strict("import os\nassert os.getpid() == 1 and os.getppid() == 0") == PASSED


def test_it_has_no_privileges(strict):
    call = "import ctypes\nlibc = ctypes.CDLL(None)\n"
    assert strict(call + "assert libc.umount2(b'/usr/lib', 2) == 0 or libc.umount2(b'/lib', 2) == 0") != PASSED
    assert strict(call + "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0") == "raised AssertionError"
    assert strict("import os\nassert os.geteuid() != 0\nos.setuid(0)") != PASSED
    remount = "assert libc.mount(None, b'/usr/lib', None, 0x1020, None) == 0"  # writable again
    assert strict(call + remount) == "raised AssertionError"
    assert strict(call + "libc.unshare(0x10020000)\n" + remount) == "raised AssertionError"  # in a nested one neither


def test_a_sandbox_that_cannot_be_set_up_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "_readable_folders", lambda: [str(tmp_path / "nowhere")])
    if sys.platform.startswith("linux"):
        with pytest.raises(SandboxError):
            run_program("pass", LIMITS)
        assert "mount" in sandbox_refusal() or "unshare" in sandbox_refusal()


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[2])  # the module alone: the package would import torch
from sandbox import Limits, run_program
run_program("import time\\nwhile True: time.sleep(1)", Limits(cpu_seconds=60, wall_seconds=60.0), sys.argv[1])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_programs_end_with_their_caller(run, how, tmp_path):
    if how is signal.SIGKILL and run.isolation != NAMESPACES:
        pytest.skip("the hook's own alarm ends it later")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, run.isolation, os.path.dirname(sandbox.__file__)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # who is killed leaves an empty folder
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    def workers():
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"sandbox_worker" in (entry / "cmdline").read_bytes():
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()
                    found.append((int(entry.name), int(parent[1]), int(parent[3])))  # pid, parent, session
        sessions = {session for _, parent, session in found if parent == process.pid}
        return {pid for pid, _, session in found if session in sessions}

    deadline = time.monotonic() + 300
    while not (mine := workers()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    mine = workers() or mine
    process.send_signal(how)
    process.wait(300)
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in mine):
        assert time.monotonic() < deadline + 300
        time.sleep(0.05)
