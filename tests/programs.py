"""Python programs in processes of their own, without the seconds in which each would import the same libraries.

A server that has imported Transformers and its neighbours, not the plugin, and computed nothing is forked for every
program. What a program imports, computes and prints is its own, and a signal ends it alone. What libraries read from
the environment when they are imported, they read in the server's: that of the tests, without the Hub and with a cache
of its own.
"""

import atexit
import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path


ROOT = Path(__file__).parents[1]
IMPORTED = [
    "tests.programs",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.auto.modeling_auto",
    "transformers.pipelines",
    "transformers.trainer",
    "datasets",
    "peft",
    "trl",
]


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1", "HF_HOME": cache}
    with unittest.mock.patch.dict(os.environ, environment):
        multiprocessing.forkserver.ensure_running()
    return context


def _signal_when(path, number):
    """Sends this process a signal in its first operation on files after `path` is there, at any load."""
    sent = False

    def look(event, arguments):
        nonlocal sent
        if not sent and event.startswith(("open", "os.", "shutil.")) and os.path.exists(path):
            sent = True
            os.kill(os.getpid(), number)

    sys.addaudithook(look)


def _main(arguments, environment, folder, output, signal_when):
    """In the new process: what the interpreter does with its arguments."""
    # Collecting garbage would go over all that was imported, and so copy the memory that is shared with the server
    gc.freeze()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(output / name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    # As in a shell's foreground, whatever started the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if signal_when:
        _signal_when(*signal_when)
    match arguments:
        case ["-m", module, *rest]:
            sys.argv, sys.path[:0] = [module, *rest], [folder]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv, sys.path[:0] = ["-c", *rest], [folder]
            exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__ | {"__name__": "__main__"})
        case [script, *rest]:
            sys.argv, sys.path[:0] = [script, *rest], [os.path.dirname(script)]
            runpy.run_path(script, run_name="__main__")


class Program:
    """A program that runs, with what tests use of `subprocess.Popen`.

    Args:
        arguments: those of an interpreter: a script, `-m MODULE` or `-c CODE`, and the program's own behind it.
        cwd: folder to start in. environment: variables beside those of the tests.
        signal_when: a path and a signal, which the program gets in its first operation on files after that is there.
    """

    def __init__(self, arguments, cwd=None, signal_when=None, **environment):
        self.arguments = [str(argument) for argument in arguments]
        self._output = tempfile.TemporaryDirectory()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
        given = (self.arguments, environment, str(cwd or os.getcwd()), Path(self._output.name), signal_when)
        self.process = _context().Process(target=_main, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *self.read())
        return self.returncode

    def read(self):
        """What it has printed so far, and its errors."""
        files = (Path(self._output.name) / name for name in ("stdout", "stderr"))
        return tuple(file.read_text(errors="replace") if file.exists() else "" for file in files)

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.read()


def run(arguments, timeout=600, **options):
    """Runs a program to its end: `subprocess.CompletedProcess`, with what it printed."""
    program = Program(arguments, **options)
    return subprocess.CompletedProcess(program.arguments, program.wait(timeout), *program.read())


def run_ranks(count, arguments, timeout=600, **options):
    """A program in `count` processes that form a group, as torchrun starts them, and what all of them printed.

    When one fails the others are ended, which would wait for it.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    programs = [Program(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **group, **options) for rank in range(count)]
    running = {program.process.sentinel: program for program in programs}
    code = 0
    while running:
        ended = multiprocessing.connection.wait(list(running), timeout)
        codes = [running.pop(sentinel).wait() for sentinel in ended]
        code = code or next(filter(None, codes), 0)
        if not ended or code:
            for program in running.values():
                program.kill()
                program.wait()
            break
    stdout, stderr = ("".join(texts) for texts in zip(*(program.read() for program in programs)))
    return subprocess.CompletedProcess(arguments, code if not running or code else 124, stdout, stderr)
