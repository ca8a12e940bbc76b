"""What Transformers asks of a model's weights that is answered otherwise where they are quantised."""

from typing import Any

import torch
from torch import nn

from ...kernels.selection import QUANTIZED


def _held(parameter: nn.Parameter) -> int:
    """Weights that a parameter holds: of 4 bits, two lie in a byte."""
    return parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)


class Dsv3QuantizedMixin:
    """Of models some of whose layers hold quantised weights, see `compression/quantized_weights.py`."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As native's; of quantised layers the weights count, not what they are stored in."""
        count = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        if only_trainable:
            return count  # type: ignore[no-any-return]
        assert isinstance(self, nn.Module)
        count += sum(_held(p) - p.numel() for p in self.parameters() if p.dtype in QUANTIZED)
        if exclude_embeddings:
            embedding = self.get_input_embeddings()  # type: ignore[operator]
            if not isinstance(embedding, nn.Embedding):
                count -= sum(_held(p) for p in embedding.parameters() if p.dtype in QUANTIZED)
        return count  # type: ignore[no-any-return]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """As native's.

        Raises:
            ValueError: embedding or head are quantised.
        """
        ends = {"embedding": self.get_input_embeddings(), "head": self.get_output_embeddings()}  # type: ignore[attr-defined]
        weights = {name: getattr(part, "weight", None) for name, part in ends.items()}
        quantized = [name for name, weight in weights.items() if weight is not None and weight.dtype in QUANTIZED]
        is_asked = new_num_tokens is not None or pad_to_multiple_of is not None
        size = len(weights["embedding"]) if weights["embedding"] is not None else None
        if is_asked and quantized and (new_num_tokens != size or pad_to_multiple_of is not None):
            raise ValueError(
                f"resize_token_embeddings: the {' and the '.join(quantized)} hold quantised weights, to which no rows "
                "are added. Load with `quantization_config=PackedWeightsConfig(dequantize=True)` and resize that, or "
                "resize the checkpoint that was compressed and compress it again."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)  # type: ignore[misc,no-any-return]
