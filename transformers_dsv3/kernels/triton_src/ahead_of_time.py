"""Compiles every Triton program for each family of GPUs, without one, and tells what the compilers made of it.

    python -m transformers_dsv3.kernels.triton_src.ahead_of_time --family sm90,gfx942 --json report.json

Every module of this folder that has a function `specimens(family)` gives the ways in which its programs are compiled
in use. Triton compiles them as it would on the device: for NVIDIA down to machine code by the `ptxas` of its own
wheel, whose log has registers and spills, for AMD by LLVM, whose assembly has them in its metadata. A program fails
that does not compile, spills registers, takes more shared memory than the family has, or leaves the matrix units
unused though it has products for them; so does one that no specimen compiles.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .tuned import FAMILIES, Family, Specimen


# Products of the matrix units in PTX and in AMD's assembly
MATRIX = {"cuda": re.compile(r"\b(mma\.sync|wgmma\.mma_async)"), "hip": re.compile(r"\bv_mfma_")}
MULTIPLE = ":16"


@dataclass(frozen=True)
class Report:
    """What became of one specimen on one family.

    Args:
        program: name of the `@triton.jit` function. label: the specimen's. module: that gave it.
        family: key of `FAMILIES`.
        problem: why it fails; None where it is fit for use.
        registers: a thread's; AMD: vector registers, those of the matrix units' accumulators included.
        spills: bytes a thread that registers did not hold, AMD: registers.
        shared: bytes of shared memory.
        matrix: whether matrix units are used.
        seconds: that compiling took.
    """

    program: str
    label: str
    module: str
    family: str
    problem: str | None = None
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    matrix: bool | None = None
    seconds: float | None = None


def modules(names: Sequence[str] = ()) -> list[ModuleType]:
    """The named modules, or all of this folder.

    Raises:
        ValueError: for a named module without `specimens`, or that cannot be imported.
    """
    if not names:
        package = importlib.import_module(__package__)
        own = f"{package.__name__}.ahead_of_time"
        found = sorted(info.name for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."))
        return [importlib.import_module(name) for name in found if name != own]
    asked = []
    for name in names:
        try:
            asked.append(importlib.import_module(name))
        except ImportError as error:
            raise ValueError(f"module {name!r} cannot be imported: {error}") from None
        if not hasattr(asked[-1], "specimens"):
            raise ValueError(f"module {name!r} has no function specimens(family)")
    return asked


def unlisted(found: Iterable[ModuleType], listed: Iterable[Specimen]) -> list[str]:
    """Programs of some modules that no specimen compiles, by itself or as part of another program."""
    programs = {
        f"{module.__name__}.{name}": each
        for module in found
        for name, each in vars(module).items()
        if isinstance(each, JITFunction) and each.fn.__module__ == module.__name__
    }
    sources = {name: inspect.getsource(each.fn) for name, each in programs.items()}
    compiled = {specimen.kernel.fn for specimen in listed}

    def is_part(name: str) -> bool:
        call = re.compile(rf"\b{name.rpartition('.')[2]}\(")
        return any(other != name and call.search(source) for other, source in sources.items())

    return sorted(name for name, each in programs.items() if each.fn not in compiled and not is_part(name))


def compile_specimen(specimen: Specimen, family: Family) -> Any:
    """Triton's compiled program, and the compiler's log.

    Raises:
        Exception: whatever the compilers raise.
    """
    names = specimen.kernel.arg_names
    given = {**specimen.signature, **dict.fromkeys(specimen.constexprs, "constexpr")}
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"the specimen says nothing of {', '.join(missing)}")
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"the program has no {', '.join(unknown)}")
    signature = {name: given[name].removesuffix(MULTIPLE) for name in names}
    multiples = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if given[name].endswith(MULTIPLE)
    }
    source = ASTSource(specimen.kernel, signature, dict(specimen.constexprs), multiples)
    target = GPUTarget(family.backend, family.arch, family.warp_size)
    return triton.compile(source, target=target, options=dict(specimen.options))


def nvidia_figures(log: str) -> dict[str, int]:
    """Registers and spilled bytes from what `ptxas -v` prints.

    Raises:
        ValueError: if it does not say so.
    """
    registers = re.findall(r"Used (\d+) registers", log)
    stores = re.findall(r"(\d+) bytes spill stores", log)
    if not registers or not stores:
        raise ValueError(f"ptxas does not tell the registers: {log[-500:]!r}")
    return {"registers": max(map(int, registers)), "spills": max(map(int, stores))}


def amd_figures(assembly: str) -> dict[str, int]:
    """Vector registers and spills from the metadata behind AMD's assembly.

    Raises:
        ValueError: if it does not say so.
    """
    found = {
        name: int(value)
        for name, value in re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count|sgpr_spill_count): +(\d+)", assembly, re.M)
    }
    if len(found) != 3:
        raise ValueError("the assembly's metadata does not tell the registers")
    # vgpr_count is of both kinds together, of vector registers and of the matrix units' accumulators
    return {"registers": found["vgpr_count"], "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"]}


def _reason(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong: what ptxas calls an error, or the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return next((line for line in lines if re.match(r"ptxas.*\b(error|fatal)\b", line)), lines[-1])


def examine(specimen: Specimen, family: str) -> dict[str, Any]:
    """Compiles a specimen; the fields of its `Report` that are learnt so."""
    target = FAMILIES[family]
    started = time.perf_counter()
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):  # where Triton prints the log of ptxas, and its own when that fails
            compiled = compile_specimen(specimen, target)
    except Exception as error:  # compilers have errors of their own
        return {"problem": f"does not compile: {type(error).__name__}: {_reason(error)}"}
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    figures: dict[str, Any] = nvidia_figures(log.getvalue()) if target.backend == "cuda" else amd_figures(assembly)
    figures["shared"] = compiled.metadata.shared
    figures["matrix"] = MATRIX[target.backend].search(assembly) is not None
    figures["seconds"] = round(time.perf_counter() - started, 2)
    if figures["spills"]:
        figures["problem"] = f"spills {figures['spills']} {'bytes' if target.backend == 'cuda' else 'registers'}"
    elif figures["shared"] > target.shared:
        figures["problem"] = f"takes {figures['shared']:,} bytes of shared memory, and there are {target.shared:,}"
    elif specimen.matrix and not figures["matrix"]:
        figures["problem"] = "does not use the matrix units"
    return figures


@triton.jit
def _nothing():
    pass


def _child(specimen: Specimen, family: str, connection: multiprocessing.connection.Connection) -> None:
    os.setsid()  # a group of its own, that ends with the compilers it started
    connection.send(examine(specimen, family))


@dataclass(frozen=True)
class _Run:
    """A specimen that is being compiled."""

    process: Any
    module: str
    family: str
    specimen: Specimen
    until: float

    def report(self, figures: dict[str, Any]) -> Report:
        return Report(self.specimen.kernel.fn.__name__, self.specimen.label, self.module, self.family, **figures)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def examine_all(listed: Sequence[tuple[str, str, Specimen]], jobs: int, limit: float) -> Iterator[Report]:
    """A report for each of (module, family, specimen), as they are done.

    Each is compiled in a process of its own: some errors of LLVM end the process that it runs in, and registers that
    do not suffice make ptxas take minutes.

    Args:
        limit: seconds that one may take.
    """
    # Triton reads its own libraries whole for the key of its cache, longer than most programs take: once, and not in
    # every process
    for family in {family for _, family, _ in listed}:
        examine(Specimen("nothing", _nothing, {}, {}), family)
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(listed))
    running: dict[Any, _Run] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                module, family, specimen = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(specimen, family, sender))
                process.start()
                sender.close()  # the child's alone, so that its end is seen here
                running[receiver] = _Run(process, module, family, specimen, time.monotonic() + limit)
            first = min(run.until for run in running.values())
            done = multiprocessing.connection.wait(list(running), max(0.0, first - time.monotonic()))
            for receiver in list(running):
                run = running[receiver]
                if receiver in done:
                    try:
                        figures = receiver.recv()
                    except EOFError:
                        run.process.join()
                        figures = {"problem": f"ends the compiler's process, with status {run.process.exitcode}"}
                elif time.monotonic() >= run.until:
                    figures = {"problem": f"takes more than {limit:g} s to compile"}
                else:
                    continue
                del running[receiver]
                run.end()
                yield run.report(figures)
    finally:
        for run in running.values():
            run.end()


def line(report: Report) -> str:
    """A row of the table."""
    limit = FAMILIES[report.family].shared // 1024
    figures = " " * 34
    if report.registers is not None and report.shared is not None:
        used = f"{report.shared / 1024:.0f} of {limit} KiB"
        figures = f"{report.registers:>4} {report.spills:>6} {used:>15}  {'yes' if report.matrix else '':<5}"
    return f"{report.family:<8}{figures} {report.label}" + (f": {report.problem}" if report.problem else "")


HEADINGS = f"{'family':<8}{'regs':>4} {'spills':>6} {'shared':>15}  {'mma':<5} program"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if anything failed, 2 for arguments that say nothing."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.ahead_of_time", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("modules", nargs="*", help="Modules with specimens. Default: all of this package.")
    parser.add_argument("--family", default=",".join(FAMILIES), help=f"Any of {', '.join(FAMILIES)}. Default: all.")
    parser.add_argument("--only", default="", metavar="TEXT", help="Specimens whose label has this in it.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Programs compiled at a time.")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="That one program may take.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="Write the reports there too.")
    options = parser.parse_args(arguments)
    families = options.family.split(",")
    for family in families:
        if family not in FAMILIES:
            parser.error(f"--family: {family!r} is none of {', '.join(FAMILIES)}")
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} is not at least 1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: programs would be interpreted, not compiled")
    try:
        found = modules(options.modules)
    except ValueError as error:
        parser.error(str(error))
    listed = [
        (module.__name__, family, specimen)
        for module in found
        if hasattr(module, "specimens")
        for family in families
        for specimen in module.specimens(family)
        if options.only in specimen.label
    ]
    if not listed:
        parser.error(f"nothing to compile: no specimen has {options.only!r} in its label")

    reports = []
    print(HEADINGS, flush=True)
    with tempfile.TemporaryDirectory() as cache:
        # Nothing that was compiled before is taken, since the log comes with compiling
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
        tempfile.tempdir = cache  # what compilers that are ended leave behind goes with it
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # of a default that is to change
        for report in examine_all(listed, options.jobs, options.limit):
            reports.append(report)
            print(line(report), flush=True)
    failed = [report for report in reports if report.problem]
    missing = [] if options.only else unlisted(found, [specimen for _, _, specimen in listed])
    for name in missing:
        print(f"{name} is compiled by no specimen")
    if options.json:
        record = {
            "triton": triton.__version__,
            "reports": [asdict(report) for report in reports],
            "unlisted": missing,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Triton {triton.__version__}: {len(reports)} compiled, {len(failed)} failed")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
