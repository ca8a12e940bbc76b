"""A GPU that is not there: tensors on "cuda" without memory, for which PyTorch computes shapes only.

Shows which operators a call would launch on a GPU, and that none of them makes the host wait for the device: reading a
value raises `DataDependentOutputException`.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_dsv3.kernels import selection


def _indexed(tensor, index):
    """`tensor[index]` by operators alone: the Python binding of it asks for a device that is there."""
    index = index if isinstance(index, tuple) else (index,)
    given = sum(part is not None and part is not Ellipsis for part in index)
    dim = 0
    for part in index:
        if part is Ellipsis:
            dim += tensor.dim() - dim - (given - sum(p is not None for p in index[: index.index(Ellipsis)]))
        elif part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            stop = torch.iinfo(torch.int64).max if part.stop is None else part.stop
            tensor, dim = torch.ops.aten.slice.Tensor(tensor, dim, part.start or 0, stop, part.step or 1), dim + 1
        elif isinstance(part, torch.Tensor):
            tensor, dim = torch.ops.aten.index.Tensor(tensor, [None] * dim + [part]), dim + 1
        else:
            tensor = tensor.select(dim, part)
    return tensor


class _WithoutDevice(TorchFunctionMode):
    """Replaces functions of PyTorch that ask for the device itself."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return _indexed(*args)
        if function is torch.Tensor.__setitem__:
            tensor, index, value = args
            place = _indexed(tensor, index)
            value = value if isinstance(value, torch.Tensor) else torch.full((), value, device=place.device)
            return torch.ops.aten.copy_.default(place, value)
        if function is torch.Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if function is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if function is torch.tensor:
            kwargs = dict(kwargs or {})
            device = kwargs.pop("device", "cpu")
            made = function(*args, **kwargs)
            made.constant = None  # operators on known values would be computed, on the device that is not there
            return made.to(device)
        return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Notes the operators that are called: `names`, views left out."""

    VIEWS = ("view", "transpose", "slice", "unsqueeze", "squeeze", "expand", "split", "alias", "detach", "select")
    VIEWS += ("as_strided", "unfold", "permute", ".t.default", "chunk", "unflatten", "empty", "lift_fresh", "prim.")
    VIEWS += ("aten.to.", "aten.reshape", "aten.flatten")  # made of others, which are noted

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not any(view in name for view in self.VIEWS):
            self.names.append(name.removesuffix(".default"))
        return function(*args, **(kwargs or {}))


# They count what the backends launch, and are not to make them step aside
selection.TRANSPARENT_MODES.update([Launches, _WithoutDevice])


@contextlib.contextmanager
def fake_gpu():
    """Within it tensors made on "cuda" have shapes and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), _WithoutDevice():
        yield


def on_gpu(module):
    """A module made on "meta", with weights on "cuda". Within `fake_gpu` only."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                weight = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                part._parameters[name] = torch.nn.Parameter(weight, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module
