"""The compiled CPU library beside the Python code; everything else about the package is in pyproject.toml.

The library is plain C, called through ctypes: it needs neither Python's headers nor torch to be built, and one wheel
serves every version of both. `python setup.py build_ext --inplace` builds it again after a change of the sources.

Environment: CC is the compiler, else the first of cc, gcc and clang; CFLAGS and LDFLAGS are added to its options.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


KERNELS = Path("transformers_dsv3", "kernels")
SOURCES = KERNELS / "csrc"
LIBRARY = "_cpu.so"
FAILURE = "_cpu_build_failure.txt"  # read by kernels/cpu_library.py

# No -march: each instruction set is one file that names it, and the processor's is chosen at run time
OPTIONS = ["-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
COMPILERS = ("cc", "gcc", "clang")
# Without the two options pip may take the wheel it made the first time
ADVICE = "`pip install --force-reinstall --no-cache-dir` of this package builds it again"


class BuildFailure(Exception):
    """The library cannot be built; the message says why."""


def find_compiler() -> list[str]:
    """The compiler's command.

    Raises:
        BuildFailure: if there is none.
    """
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildFailure(f"the C compiler that CC names, {asked[0]!r}, was not found")
        return asked
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildFailure(f"no C compiler was found ({', '.join(COMPILERS)}): install gcc or clang")


def run(command: list[str]) -> None:
    """
    Raises:
        BuildFailure: with the first errors that the command printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
        raise BuildFailure(f"`{command[0]}` failed with status {done.returncode}: {'; '.join(errors[:3])}")


def compile_library(sources: Path, library: Path) -> None:
    """Compiles the `.c` files of a folder into a shared library, which appears at its place complete or not at all.

    Raises:
        BuildFailure: with the compiler's first errors.
    """
    compiler = find_compiler()
    compile_only = [*compiler, *OPTIONS, *shlex.split(os.environ.get("CFLAGS", "")), "-c"]
    with tempfile.TemporaryDirectory() as temporary:
        objects = {source: Path(temporary, source.stem + ".o") for source in sorted(sources.glob("*.c"))}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: run([*compile_only, str(pair[0]), "-o", str(pair[1])]), objects.items()))
        linked = Path(temporary, LIBRARY)
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        run([*compiler, "-shared", *map(str, objects.values()), "-o", str(linked), *flags, "-lm"])
        # A new file and not new contents of the old one, which running programs have mapped
        beside = library.with_suffix(".new")
        shutil.copyfile(linked, beside)
        os.replace(beside, library)


def build(sources: Path, folder: Path) -> str | None:
    """Builds the library into a folder, or leaves a file there that says why there is none.

    Whatever an earlier build left is gone afterwards.

    Returns:
        The reason why there is no library, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob("_cpu*.so"), folder / FAILURE]:
        left.unlink(missing_ok=True)
    try:
        compile_library(sources, folder / LIBRARY)
    except (BuildFailure, OSError) as error:
        reason = f"{error}; {ADVICE}"
        (folder / FAILURE).write_text(reason + "\n", encoding="utf-8")
        return reason
    return None


class BuildLibrary(build_ext):
    """Builds without Python's own compiler options, in place for editable installations, and never fails."""

    def get_ext_filename(self, fullname: str) -> str:
        # Without the suffix that names a version of Python
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        reason = build(SOURCES, KERNELS if self.inplace else Path(self.build_lib) / KERNELS)
        if reason is not None:
            print(f"warning: the compiled CPU library was not built: {reason}", file=sys.stderr)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    library = Extension(
        "transformers_dsv3.kernels._cpu",
        sources=[path.as_posix() for path in sorted(SOURCES.glob("*.c"))],
        depends=[path.as_posix() for path in sorted(SOURCES.glob("*.h"))],
    )
    setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
