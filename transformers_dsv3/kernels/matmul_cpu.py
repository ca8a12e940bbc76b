"""Matrix products on the CPU by the faster of torch's two libraries.

`torch.mm` takes fp32 products to MKL, whose AVX-512 code runs on Intel's processors only, and bf16 ones to oneDNN.
oneDNN's fp32 products use AVX-512 wherever there is any: on Zen 5, 440 GFLOP/s against 200.
"""

import functools

import torch


@functools.cache
def _onednn_is_faster() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def uses_onednn(tensor: torch.Tensor) -> bool:
    """Whether `matmul` takes products of tensors like this one to oneDNN where `torch.mm` does not."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and _onednn_is_faster()
    )


def matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right`, without gradient and whatever autocast says.

    Args:
        left: `(M, K)`, right: `(K, N)`, of one dtype and any strides.
        out: `(M, N)` of any strides and dtype; made where not given.

    Returns:
        `(M, N)`, `out` where given.
    """
    if uses_onednn(left) and left.numel() and right.numel():
        # Multiplies by the transpose, as a linear layer does, and has no `out`
        product = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
        return product if out is None else out.copy_(product)
    if out is not None and out.dtype != left.dtype:
        return out.copy_(matmul(left, right))
    # With `out`, since autocast would change the dtype of a product that makes its own
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]) if out is None else out)
