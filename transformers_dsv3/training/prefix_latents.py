"""PEFT's prefix tuning and cartridges (arXiv 2101.00190) on latent attention: the learned prefix is one of latents.

PEFT makes keys and values of `num_key_value_heads` heads of `head_dim` for each layer, whatever its config says, which
a cache of latents cannot hold: there is one latent of `kv_lora_rank` numbers and one rotary key of `qk_rope_head_dim`
for all heads. Native fails on the shapes. Here the numbers that PEFT learns for a virtual token and layer are read in
their order as the latent and the rotary key. Those that are left over are not used, and stay as they started.
"""

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as POSTPROCESS
from transformers.cache_utils import DynamicCache, DynamicLayer


MODEL_TYPES = ("deepseek_v3", "kimi_k2")


class PrefixLayer(DynamicLayer):
    """A cache layer that holds a prefix, whose shapes follow those of the first tensors that are put behind it.

    Args:
        prefix: `(B, V, N)`, what was learned for each virtual token.
    """

    def __init__(self, prefix: torch.Tensor):
        super().__init__()
        self.prefix: torch.Tensor | None = prefix

    def get_seq_length(self) -> int:
        if self.prefix is not None:
            return self.prefix.shape[1]
        return super().get_seq_length()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.prefix is None:
            return
        prefix, start = self.prefix, 0
        sizes = [heads * width for _, heads, _, width in (key_states.shape, value_states.shape)]
        if sum(sizes) > prefix.shape[-1]:
            raise ValueError(
                f"Prefix tuning: this model caches {sum(sizes)} numbers a token and layer, more than the "
                f"{prefix.shape[-1]} that PEFT makes of its config, 2 * num_key_value_heads * head_dim. Prompt tuning "
                "and p-tuning have no such bound."
            )
        parts = []
        for states, size in zip((key_states, value_states), sizes, strict=True):
            part = prefix[..., start : start + size].unflatten(-1, (states.shape[1], -1)).transpose(1, 2)
            parts.append(part.to(states.device, states.dtype))
            start += size
        self.keys, self.values = parts
        self.prefix = None

    def reset(self) -> None:
        self.prefix = None
        super().reset()


def prefix_cache(past_key_values: tuple[torch.Tensor, ...]) -> DynamicCache:
    """A cache that begins with PEFT's prefix.

    Args:
        past_key_values: for each layer keys and values, `(2, B, heads, V, width)`.
    """
    cache = DynamicCache()
    cache.layers = [PrefixLayer(layer.permute(1, 3, 0, 2, 4).flatten(2)) for layer in past_key_values]
    return cache


def register() -> None:
    """Has PEFT make prefixes of these models by `prefix_cache`."""
    POSTPROCESS.update(dict.fromkeys(MODEL_TYPES, prefix_cache))


def unregister() -> None:
    """Leaves these models to PEFT."""
    for model_type in MODEL_TYPES:
        POSTPROCESS.pop(model_type, None)
