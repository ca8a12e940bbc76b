"""The compiled library in another process: built for ARM and run by qemu, or with a sanitizer that Python cannot have.

A `ServedLibrary` stands where ctypes' library does (`loaded` of `kernels/cpu/library.py`), so that whatever calls
operators runs on it, whole models too. Each call takes along the memory that its arguments point to.
"""

import collections
import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import struct
import subprocess
from pathlib import Path
from unittest import mock

import torch

from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.kernels.cpu import step


ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "transformers_dsv3" / "kernels" / "csrc"
ARM_COMPILER = "aarch64-linux-gnu-gcc"
ARM_EMULATOR = "qemu-aarch64"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"
# Of what qemu emulates: everything it can, and phones' first 64-bit cores, without dot products
ALL, CORTEX_A53 = "max", "cortex-a53"
KEPT = 2**28  # bytes of storages whose places are remembered

WHOLE, REAL = 40, 8  # of serve.c
REQUEST = struct.Struct(f"64s{WHOLE}q{WHOLE}q{REAL}f2q")
ANSWER = struct.Struct("q32s")


def arm_refusal():
    """The reason why nothing can be built and run for ARM here, or None."""
    for program, package in (
        (ARM_COMPILER, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
        (ARM_EMULATOR, "qemu-user"),
    ):
        if shutil.which(program) is None:
            return f"needs {program} (Debian: {package})"
    return None if (ROOT / "setup.py").exists() else "needs the source tree"


@functools.cache
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, compiler, flags=""):
    """Builds, into a folder, the library as setup.py does and the program that serves it, unless they are there.

    Returns:
        The command that serves it.
    """
    program = folder / "serve"
    if program.exists():
        return [str(program), str(folder / "_cpu.so")]
    with mock.patch.dict(os.environ, {"CC": compiler, "CFLAGS": flags, "LDFLAGS": flags}):
        reason = setup_py().build(SOURCES, folder)
    assert reason is None, reason
    command = [
        compiler,
        "-O1",
        *shlex.split(flags),
        Path(__file__).with_name("serve.c"),
        "-o",
        program,
        "-ldl",
        "-pthread",
    ]
    subprocess.run(command, check=True)
    return [str(program), str(folder / "_cpu.so")]


def emulated(command, processor=ALL):
    """The command that runs another one, built for ARM, on this machine."""
    if platform.machine() == "aarch64":
        return command
    return [ARM_EMULATOR, "-cpu", processor, "-L", ARM_LIBRARIES, *command]


class ServedLibrary:
    """The functions of the library that a process started by a command serves."""

    def __init__(self, command):
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Storages by their address: torch's tensors tell theirs before every call
        self._storages, self._bytes = collections.OrderedDict(), 0

    def close(self):
        """Ends the process; returns its exit status."""
        self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()

    def know(self, tensor):
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address and address not in self._storages:
            self._bytes += storage.nbytes()
            self._storages[address] = storage  # which keeps the memory from being given to another
        while self._bytes > KEPT and len(self._storages) > 1:
            self._bytes -= self._storages.popitem(last=False)[1].nbytes()

    def _region(self, address):
        for start, storage in reversed(self._storages.items()):
            if start <= address < start + max(storage.nbytes(), 1):
                return start, storage.nbytes()
        raise LookupError(f"{address:#x} belongs to no tensor whose address was asked for")

    def __getattr__(self, name):
        return functools.partial(self._call, name)

    def _call(self, name, *arguments):
        kinds = cpu_library.SIGNATURES.get(name, [])
        assert len(arguments) == len(kinds)
        regions, slots, kept, whole, pointers, reals = {}, [], [], [], [], []

        def include(address, structure=None):
            """The memory at an address: of a structure or an array of them, or of a tensor."""
            if structure is None:
                start, size = self._region(address)
                regions[start] = size
                return
            regions[address] = ctypes.sizeof(structure)
            follow(structure)

        def follow(structure):
            """Notes the pointers within a structure, and includes what they point to."""
            if isinstance(structure, ctypes.Array):
                for each in structure:
                    follow(each)
                return
            for field, kind in structure._fields_:
                value = getattr(structure, field)
                if isinstance(value, ctypes.Structure):
                    follow(value)
                elif kind is ctypes.c_void_p and value:
                    slots.append(ctypes.addressof(structure) + getattr(type(structure), field).offset)
                    layers = field == "layer" and (step._Layer * structure.layers).from_address(value)
                    include(value, layers or None)

        cached_batch = [step.Cache, step.Batch]
        structures = {"dsv3_step": [step._Model, *cached_batch], "dsv3_attention_cached": cached_batch}.get(name, [])
        for value, kind in zip(arguments, kinds):
            if kind is ctypes.c_float:
                reals.append(value)
                continue
            pointer = kind in (ctypes.c_void_p, ctypes.c_char_p) and bool(value)  # of no elements: 0
            if isinstance(value, bytes):
                value = ctypes.create_string_buffer(value)
            if isinstance(value, ctypes.Array):
                kept.append(value)
                regions[ctypes.addressof(value)] = ctypes.sizeof(value)
                value = ctypes.addressof(value)
            elif pointer:
                include(value, structures.pop(0).from_address(value) if structures else None)
            whole.append(0 if value is None else int(value))
            pointers.append(int(pointer))
        return self._exchange(name, whole, pointers, reals, regions, slots)

    def _exchange(self, name, whole, pointers, reals, regions, slots):
        numbers = [
            each + [0] * (length - len(each)) for each, length in ((whole, WHOLE), (pointers, WHOLE), (reals, REAL))
        ]
        to, back = self._process.stdin, self._process.stdout
        to.write(REQUEST.pack(name.encode(), *numbers[0], *numbers[1], *numbers[2], len(regions), len(slots)))
        for address, size in regions.items():
            to.write(struct.pack("2q", address, size) + ctypes.string_at(address, size))
        to.write(struct.pack(f"{len(slots)}q", *slots))
        to.flush()
        found = self._read(back, ANSWER.size)
        value, text = ANSWER.unpack(found)
        for address, size in regions.items():
            (changed,) = struct.unpack("q", self._read(back, 8))
            if changed:
                ctypes.memmove(address, self._read(back, size), size)
        if name == "dsv3_use_isa":
            return text.rstrip(b"\0") or None
        return ctypes.c_int64(value).value if name == "dsv3_size_of" else ctypes.c_int(value & 0xFFFFFFFF).value

    def _read(self, file, size):
        found = file.read(size)
        if len(found) < size:
            raise RuntimeError(f"the process that serves the library ended with status {self._process.wait()}")
        return found


@contextlib.contextmanager
def served(command):
    """Operators are computed by the library that a command serves, within a block.

    Models run there that ran nowhere before, or tensors' addresses would not be known.
    """
    library = ServedLibrary(command)
    ask = torch.Tensor.data_ptr

    def data_ptr(tensor):
        library.know(tensor)
        return ask(tensor)

    with mock.patch.object(cpu_library, "loaded", library), mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
        library.dsv3_use_isa(None)
        try:
            yield library
        finally:
            status = library.close()
    assert status == 0
