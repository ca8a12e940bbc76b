"""What the tests of compiled operators share."""

import contextlib
import platform

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from transformers_dsv3.kernels.cpu import library as cpu_library
from transformers_dsv3.kernels.selection import CHOICES

from . import served_library


# Compilation and page faults make single examples slow on a busy machine
settings.register_profile("kernels", deadline=None)
settings.load_profile("kernels")


def needs_library():
    if cpu_library.unavailable is not None:
        pytest.skip(f"the compiled CPU backend {cpu_library.unavailable}")


@pytest.fixture
def compiled():
    """Skips where there is no compiled library."""
    needs_library()


ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(scope="session")
def served_arm(shared_folder):
    """The command, built for ARM, that serves the library; skips where that cannot be built or run."""
    if (reason := served_library.arm_refusal()) is not None:
        pytest.skip(reason)
    folder = shared_folder / "served_arm"
    with FileLock(folder.with_suffix(".lock")):
        # Optimised just so far that vectors stay in registers: compiling as for use takes three times as long
        return served_library.build(folder, served_library.ARM_COMPILER, "-O1")


def _instruction_sets():
    for name in CHOICES["isa"]:
        emulated = name.startswith("neon") and not ARM
        yield pytest.param(name, marks=pytest.mark.slow if emulated else ())


@pytest.fixture(scope="module", params=_instruction_sets())
def isa(request):
    """Each instruction set that this machine runs or emulates. Of a module, since hypothesis runs many examples in one
    test."""
    if request.param.startswith("neon") and not ARM:
        with served_library.served(served_library.emulated(request.getfixturevalue("served_arm"))):
            cpu_library.instruction_set(request.param)
            yield request.param
        return
    needs_library()
    best = cpu_library.instruction_set()
    try:
        cpu_library.instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu_library.instruction_set(best)


@pytest.fixture(scope="module")
def poisoned():
    """Memory that PyTorch allocates holds NaN, so that a result which is not written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all() and torch.ones(1).new_empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def threads():
    """Context manager: PyTorch, and with it the library, uses that many threads."""

    @contextlib.contextmanager
    def use(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use


def _rms(values):
    return values.double().square().mean().sqrt().item()


@pytest.fixture(scope="session")
def rms_error():
    """Function from a result and the exact one to the root of the mean square error."""
    return lambda result, exact: _rms(result.double() - exact)


@pytest.fixture(scope="session")
def quantize():
    """Function from `(..., N, K)` and 8 or 4 bits to stored whole numbers and scales `(..., N, K / 32)`."""

    def to_groups(weight, bits):
        groups = weight.float().unflatten(-1, (-1, 32))
        largest = 127 if bits == 8 else 7
        scale = (groups.abs().amax(-1).clamp_min(1e-4) / largest).half()
        whole = (groups / scale.float()[..., None]).round().clamp(-largest, largest)
        if bits == 8:
            return whole.to(torch.int8).flatten(-2), scale
        first, second = (whole + 8).to(torch.uint8).chunk(2, -1)
        return (first + 16 * second).flatten(-2), scale

    return to_groups


@pytest.fixture(scope="session")
def stands_for():
    """Function from what `quantize` gives to `(..., N, K)` in float64."""

    def from_groups(values, scale):
        if values.dtype == torch.uint8:
            pairs = values.unflatten(-1, (-1, 16)).int()
            whole = torch.cat([pairs % 16, pairs // 16], -1) - 8
        else:
            whole = values.unflatten(-1, (-1, 32))
        return (whole.double() * scale.double()[..., None]).flatten(-2)

    return from_groups
