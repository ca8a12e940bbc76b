"""RMSNorm, served by a backend where one takes the call."""

import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ...kernels.backends import NORM
from ...kernels.dispatch import serve
from ...kernels.selection import register_plain


class DeepseekV3RMSNorm(native.DeepseekV3RMSNorm):
    """Root mean square normalisation (arXiv 1910.07467) in fp32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        normalised = serve(NORM, self, hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states) if normalised is None else normalised


register_plain("norm", DeepseekV3RMSNorm, native.DeepseekV3RMSNorm)

Dsv3RMSNorm = DeepseekV3RMSNorm  # its name before
