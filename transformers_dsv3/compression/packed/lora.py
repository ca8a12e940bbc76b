"""LoRA adapters over layers with quantised weights, which stay as they are until an adapter is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge

from ...models.dsv3.adapted_experts_dsv3 import factors_of
from .merging import MergeCost, merged_matrix


# What adapters begin with that asks nothing of the weights they lie over
_STARTS = (True, False, "gaussian", "eva")


class _OverQuantized:
    """What both kinds have in common.

    Attributes:
        merge_costs: what rounding cost when adapters were merged, by the weight's name within the layer.
    """

    merge_costs: dict[str, MergeCost]

    def resolve_lora_variant(self, *, config: Any = None, **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: for adapters that compute with the weights themselves: DoRA, and starts such as PiSSA's.
        """
        asked = "use_dora=True" if getattr(config, "use_dora", False) else None
        if asked is None and (start := getattr(config, "init_lora_weights", True)) not in _STARTS:
            asked = f"init_lora_weights={start!r}"
        if asked is not None:
            raise ValueError(
                f"`{asked}` computes with the weights, which a layer here has in {self.get_base_layer().bits} bits: "  # type: ignore[attr-defined]
                "leave it out, or load with `quantization_config=PackedWeightsConfig(dequantize=True)`."
            )
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        """
        Raises:
            ValueError: where something was merged: rounding cannot be taken back.
        """
        if self.merged_adapters:  # type: ignore[attr-defined]
            raise ValueError("What was merged into quantised weights was rounded, and cannot be taken out again.")

    def _merge_into(self, name: str, change: Callable[[int], torch.Tensor]) -> None:
        """Adds to the base layer's weight of that name and rounds it anew, one matrix after another.

        Args:
            change: from the number of a matrix to what is added to it, fp32 `(N, K)`.
        """
        base = self.get_base_layer()  # type: ignore[attr-defined]
        values, scale = getattr(base, name).data, getattr(base, f"{name}_scale")
        stacks = (values, scale) if values.dim() == 3 else (values[None], scale[None])
        cost = MergeCost()
        for i, matrix in enumerate(zip(*stacks)):
            cost += merged_matrix(*matrix, change(i), base.stored_bits)
        self.merge_costs = {name: cost}


class QuantizedLora(_OverQuantized, lora.Linear):
    """PEFT's adapter of a linear layer, over a `QuantizedLinear`."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT warns of classes that it does not know

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the weights, rounded anew to as many bits as a checkpoint has them in.

        Raises:
            ValueError: for sums that are not finite or too large.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        added = sum(self.get_delta_weight(name).float() for name in names)
        self._merge_into("weight", lambda i: added)
        self.merged_adapters.extend(names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`(N, K)` fp32."""
        a, b = self.lora_A[adapter].weight.detach(), self.lora_B[adapter].weight.detach()
        return (b.float() @ a.float()) * self.scaling[adapter]


class ParamWrapper(_OverQuantized, PeftParamWrapper):
    """PEFT's adapter of a stack of weights, over one of `QuantizedExperts`. PEFT knows such wrappers by their name."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        base = self.get_base_layer()
        self.num_experts, rows, columns = base.shape_of(self.parameter_name)
        self._param_ndim = 3
        return rows, columns  # PEFT takes them in this order, and turns them round

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """The experts add the factors' products to theirs while this one calls them."""
        names = [name for name in active_adapters if name in self.lora_A]
        added = self.get_base_layer().added
        if names:
            added[self.parameter_name] = factors_of(self, names)
        try:
            yield
        finally:
            added.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `QuantizedLora.merge`, expert by expert."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        with torch.no_grad():
            down, up = (factor.float() for factor in factors_of(self, names))
        self._merge_into(self.parameter_name, lambda i: up[i] @ down[i])
        self.merged_adapters.extend(names)
