"""RMSNorm, served by a compiled backend where it takes the call."""

import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ...kernels import rows_cpu, rows_triton


class DeepseekV3RMSNorm(native.DeepseekV3RMSNorm):
    """Root mean square normalisation (arXiv 1910.07467) in fp32."""

    is_plain_norm = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        if not self.training:
            arguments = (hidden_states, self.weight, self.variance_epsilon)
            if rows_cpu.rms_norm_refusal(hidden_states, self.weight) is None:
                return torch.ops.transformers_dsv3.rms_norm(*arguments)
            if rows_triton.rms_norm_refusal(hidden_states, self.weight) is None:
                return torch.ops.transformers_dsv3.rms_norm_triton(*arguments)
        return super().forward(hidden_states)


Dsv3RMSNorm = DeepseekV3RMSNorm  # its name before
