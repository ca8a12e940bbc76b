"""LoRA adapters over layers with quantised weights, which stay as they are."""

from typing import Any

from peft.tuners import lora


# What adapters begin with that asks nothing of the weights they lie over
_STARTS = (True, False, "gaussian", "eva")


class QuantizedLora(lora.Linear):
    """PEFT's adapter of a linear layer, over a `QuantizedLinear`: it cannot be merged."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT warns of classes that it does not know

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
                f"`{asked}` computes with the weights, which a layer here has in {self.get_base_layer().bits} bits: "
                "leave it out, or load with `quantization_config=PackedWeightsConfig(dequantize=True)`."
            )
        return super().resolve_lora_variant(config=config, **kwargs)

    @property
    def merge_refusal(self) -> str:
        """Why it cannot be merged."""
        return (
            f"An adapter is not merged into weights of {self.get_base_layer().bits} bits, which would round it away: "
            "load the checkpoint by `quantization_config=PackedWeightsConfig(dequantize=True)`, merge there, and "
            "quantise again."
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(self.merge_refusal)
