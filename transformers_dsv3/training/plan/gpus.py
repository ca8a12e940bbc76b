"""GPUs as their makers' data sheets have them, and which share of that training reaches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...option_error import OptionError


@dataclass(frozen=True)
class Reached:
    """Shares of the data sheet that a training step reaches, the same for every GPU.

    Not measured: chosen once, within what authors of kernels publish, such that the runs of `published.py` lie around
    what is computed for them.

    Args:
        bf16, fp8: of the rate of matrix products, those of experts with few rows included.
        attention: of the bf16 rate, in fused attention.
        bandwidth: of memory's, in norms, activation functions and whatever else is not a product.
        network: of links and network.
        memory: of a GPU's memory that tensors may take; the rest is the driver's, the libraries' and lost between.
    """

    bf16: float = 0.7
    fp8: float = 0.36
    attention: float = 0.6
    bandwidth: float = 0.8
    network: float = 0.85
    memory: float = 0.92


@dataclass(frozen=True)
class Gpu:
    """One GPU in a machine of several.

    Args:
        memory: bytes.
        bf16, fp8: floating-point operations a second of dense matrix products; None where there are none.
        bandwidth: bytes a second of its memory.
        link: bytes a second to the others of its machine, one way.
        network: bytes a second to other machines, one way.
        per_node: GPUs of a machine.
        reached: shares of all that.
    """

    name: str
    memory: float
    bf16: float
    fp8: float | None
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    reached: Reached = Reached()

    @property
    def room(self) -> float:
        """Bytes that tensors may take."""
        return self.memory * self.reached.memory

    def rate(self, fp8: bool) -> float:
        """Floating-point operations a second that matrix products reach."""
        if fp8:
            assert self.fp8 is not None
            return self.fp8 * self.reached.fp8
        return self.bf16 * self.reached.bf16


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 312e12, None, 2.04e12, 300e9, 25e9),
        Gpu("h100", 80e9, 989e12, 1979e12, 3.35e12, 450e9, 50e9),
        # H100 with half the links; DeepSeek-V3's report counts on 160 GB/s of them
        Gpu("h800", 80e9, 989e12, 1979e12, 3.35e12, 200e9, 50e9),
        Gpu("h200", 141e9, 989e12, 1979e12, 4.8e12, 450e9, 50e9),
        Gpu("b200", 180e9, 2250e12, 4500e12, 8e12, 900e9, 50e9),
        Gpu("mi300x", 192e9, 1307e12, 2615e12, 5.3e12, 448e9, 50e9),
    )
}


def find_gpu(
    name: str, memory_gb: float | None = None, tflops: float | None = None, network_gbs: float | None = None
) -> Gpu:
    """A GPU of the table, with fields replaced where they are given.

    Raises:
        OptionError: for one that is not there, and numbers that are not above 0.
    """
    if name.lower() not in GPUS:
        raise OptionError("--gpu", f"is one of {', '.join(GPUS)}, not {name!r}")
    gpu = GPUS[name.lower()]
    for option, value in (("--gpu-memory", memory_gb), ("--gpu-tflops", tflops), ("--network", network_gbs)):
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(option, f"must be above 0, not {value}")
    if memory_gb is not None:
        gpu = replace(gpu, memory=memory_gb * 1e9)
    if tflops is not None:
        gpu = replace(gpu, bf16=tflops * 1e12, fp8=None if gpu.fp8 is None else 2e12 * tflops)
    if network_gbs is not None:
        gpu = replace(gpu, network=network_gbs * 1e9)
    return gpu
