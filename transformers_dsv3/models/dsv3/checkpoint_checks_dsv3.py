"""What a checkpoint's headers must hold for a model, compared before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .checkpoint_files_dsv3 import StoredTensor, listing
from .checkpoint_scales_dsv3 import belongs_to, owners_of, sentences


# experts.{e}.gate_proj.weight and its FP8 scale
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
# What only MTP layers have
_DECODER = r"^(?:model\.)?(?:language_model\.)?(?:model\.)?"
_MTP_LAYER = re.compile(_DECODER + r"layers\.(\d+)\.(?:enorm|hnorm|eh_proj|shared_head)\.")
_LAYER = re.compile(_DECODER + r"layers\.(\d+)\.")
# After the name of an FP8 weight: its scales
SCALE = "_scale_inv"
_FP8 = "F8_E4M3"


def scale_grid(shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, ...]:
    """Shape of the FP8 scales of a matrix: the ceiling of rows and columns over the block (576 rows, 128: 5)."""
    return tuple(-(-size // block) for size, block in zip(shape, block_size, strict=True))


def mtp_layers_present(names: Sequence[str], num_hidden_layers: int, announced: int) -> int:
    """How many MTP layers to build: the announced ones, less the trailing ones of which no tensor is stored.

    A layer of the main model that a smaller `num_hidden_layers` leaves out may stand in such a place. It ends the
    count: MTP layers behind it go with the whole model.
    """
    stored = {int(match.group(1)) for match in map(_LAYER.match, names) if match}
    mtp = {int(match.group(1)) for match in map(_MTP_LAYER.match, names) if match}
    count = 0
    for depth in range(announced):
        if num_hidden_layers + depth in mtp:
            count = depth + 1
        elif num_hidden_layers + depth in stored:
            break
    return count


@dataclass
class CheckpointCheck:
    """Compares the tensors of a checkpoint with those of a model.

    Args:
        expected: shape of every parameter and persistent buffer of the model, experts fused.
        stored: the checkpoint's tensors by name, after the user's own renamings.
        base_prefix: name of the decoder inside a model with a head (`"model"`); empty for the decoder alone. A
            checkpoint of one is accepted by the other.
        optional: whether a tensor of the model may be missing (tied weights).
        compare_shapes: `False` with `ignore_mismatched_sizes=True` or where parameters are sharded.
        block_size: rows and columns of an FP8 block where FP8 tensors will be dequantised, else `None`.
    """

    expected: Mapping[str, Sequence[int]]
    stored: Mapping[str, StoredTensor]
    base_prefix: str = ""
    optional: Callable[[str], bool] = lambda name: False
    compare_shapes: bool = True
    block_size: Sequence[int] | None = None
    resolved: dict[str, StoredTensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.resolved = {self._align(name): tensor for name, tensor in self.stored.items()}

    def problems(self) -> list[str]:
        """One sentence for each kind of trouble, naming files and tensors; empty where the checkpoint fits."""
        wanted = self._per_expert(self.expected)
        return [
            *self._missing(wanted),
            *(self._wrong_shapes(wanted) if self.compare_shapes else []),
            *self._extra_experts(),
            *self._left_out(wanted),
            *self._bad_scales(wanted),
        ]

    def _align(self, name: str) -> str:
        """The model's name of a stored tensor: the decoder's prefix added or removed as Transformers does."""
        weight, scale = (name[: -len(SCALE)], SCALE) if name.endswith(SCALE) else (name, "")
        match = _EXPERT.match(weight)
        target = self._fused_name(match) if match else weight
        prefix = f"{self.base_prefix or 'model'}."
        if target not in self.expected:
            if target.startswith(prefix) and target.removeprefix(prefix) in self.expected:
                weight = weight.removeprefix(prefix)
            elif prefix + target in self.expected:
                weight = prefix + weight
        return weight + scale

    @staticmethod
    def _fused_name(match: re.Match[str]) -> str:
        return f"{match[1]}.{'down_proj' if match[3] == 'down_proj' else 'gate_up_proj'}"

    def _per_expert(self, expected: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Expected names and shapes as official checkpoints have them; a stored fused tensor stays fused."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, shape in expected.items():
            prefix, _, leaf = name.rpartition(".")
            if not prefix.endswith(".experts") or leaf not in ("gate_up_proj", "down_proj") or name in self.resolved:
                wanted[name] = tuple(shape)
                continue
            count, rows, columns = shape
            leaves = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
            for e in range(count):
                wanted |= {f"{prefix}.{e}.{part}.weight": (rows // len(leaves), columns) for part in leaves}
        return wanted

    def _missing(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        prefix = f"{self.base_prefix}." if self.base_prefix else ""
        if self.resolved.keys().isdisjoint(wanted):
            return []  # a file of something else: Transformers initialises all, and says so
        names = [
            name
            for name in wanted
            # What else is missing Transformers initialises, and says so. Of a stack of experts it would do so with
            # all, or fail without naming one, and a scale alone it cannot convert.
            if (_EXPERT.match(name) or name + SCALE in self.resolved)
            and name not in self.resolved
            and name.startswith(prefix)
            and not self.optional(name)
        ]
        if not names:
            return []
        # A missing tensor belongs beside the stored ones whose names share the most leading parts with its own
        places: dict[str, str] = {}
        for stored_name, tensor in self.resolved.items():
            while stored_name:
                stored_name = stored_name.rpartition(".")[0]
                places.setdefault(stored_name, tensor.path)
        missing: dict[str, list[str]] = {}
        for name in names:
            parent = name
            while parent and parent not in places:
                parent = parent.rpartition(".")[0]
            missing.setdefault(places.get(parent, "the checkpoint"), []).append(f"'{name}'")
        return [f"{place}: missing tensors {listing(names)}" for place, names in missing.items()]

    def _wrong_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        return [
            f"{tensor.path}: tensor '{tensor.name}' has shape {tensor.shape}, the config asks for {shape}"
            for name, shape in wanted.items()
            if (tensor := self.resolved.get(name)) is not None and tensor.shape != shape
        ]

    def _extra_experts(self) -> list[str]:
        extra: dict[str, list[str]] = {}
        for name, tensor in self.resolved.items():
            match = _EXPERT.match(name)
            fused = self._fused_name(match) if match else ""
            if match and fused in self.expected and int(match[2]) >= self.expected[fused][0]:
                extra.setdefault(tensor.path, []).append(f"'{tensor.name}'")
        count = next((shape[0] for name, shape in self.expected.items() if name.endswith(".experts.down_proj")), 0)
        return [f"{path}: more experts than the config's {count}: {listing(names)}" for path, names in extra.items()]

    def _bad_scales(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        problems = []
        for name in wanted:
            tensor, scale = self.resolved.get(name), self.resolved.get(name + SCALE)
            if tensor is None:
                continue
            if tensor.dtype_name == _FP8 and self.block_size is None:
                problems.append(
                    f"{tensor.path}: tensor '{tensor.name}' is {_FP8}, but the config has no `quantization_config` "
                    "with a `weight_block_size`"
                )
            elif tensor.dtype_name == _FP8 and scale is None:
                problems.append(f"{tensor.path}: FP8 tensor '{tensor.name}' has no scale '{tensor.name}{SCALE}'")
            elif self.block_size is not None and scale is not None:
                if tensor.dtype_name != _FP8:
                    problems.append(
                        f"{scale.path}: '{scale.name}' scales a tensor that is {tensor.dtype_name}, not {_FP8}"
                    )
                elif scale.shape != (grid := scale_grid(tensor.shape, self.block_size)):
                    problems.append(
                        f"{scale.path}: scale '{scale.name}' has shape {scale.shape}; '{tensor.name}' of shape "
                        f"{tensor.shape} in blocks of {tuple(self.block_size)} needs {grid}"
                    )
        return problems

    def _left_out(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Codes in integers, and scales that are none of DeepSeek's: INT8 repacks have the same names and shapes."""
        codes = [self.resolved[name] for name in wanted if name in self.resolved]
        codes = [tensor for tensor in codes if not tensor.dtype.is_floating_point]
        read = {name + SCALE for name in wanted} if self.block_size is not None else set()
        owners = owners_of([*wanted, *self.expected])
        prefix = f"{self.base_prefix or 'model'}."
        unread = [
            tensor
            for name, tensor in self.resolved.items()
            if name not in wanted
            and name not in read
            and any(belongs_to(other, owners) for other in (name, prefix + name, name.removeprefix(prefix)))
        ]
        return sentences(codes, unread)
