"""LoRA adapters over layers with quantised weights, which stay as they are."""

from typing import Any

from peft.tuners import lora


class QuantizedLora(lora.Linear):
    """PEFT's adapter of a linear layer, over a `QuantizedLinear`: it cannot be merged."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT warns of classes that it does not know

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
