"""RMSNorm, served by a backend where one takes the call."""

import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ...kernels.dispatch import NORM, serve


class DeepseekV3RMSNorm(native.DeepseekV3RMSNorm):
    """Root mean square normalisation (arXiv 1910.07467) in fp32."""

    is_plain_norm = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        normalised = serve(NORM, self, hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states) if normalised is None else normalised


Dsv3RMSNorm = DeepseekV3RMSNorm  # its name before
