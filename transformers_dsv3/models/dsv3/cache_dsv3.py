"""Appending to Transformers' dynamic cache without copying what it holds."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils.import_utils import is_torchdynamo_compiling


# Room is made for this many more tokens, or an eighth of those cached, whichever is more
SPARE_TOKENS = 256


def extend(
    cache: Cache, latent: torch.Tensor, k_rope: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cache.update(latent, k_rope, layer_idx)`, but a `DynamicCache` grows in place.

    `DynamicLayer` joins old and new at every step: at 32,000 tokens that is 38 MB written a layer and token, which
    takes longer than attention. Here its `keys` and `values` become the first part of larger tensors with room
    behind; cropping, reordering and copying work on them as before. Where other code put tensors of its own into the
    layer, these are copied once.

    Args:
        latent: `(B, 1, Q, R)`, k_rope: `(B, 1, Q, P)`.

    Returns:
        All that the layer holds, `(B, 1, S, R)` and `(B, 1, S, P)`.
    """
    if (
        is_torchdynamo_compiling()
        or torch.is_grad_enabled()
        or type(cache) is not DynamicCache
        or getattr(cache, "offloading", False)
        or layer_idx >= len(cache.layers)
        or type(layer := cache.layers[layer_idx]) is not DynamicLayer
        or not layer.is_initialized
        or layer.keys.numel() == 0
        or layer.keys.dtype != latent.dtype
        or layer.keys.device != latent.device
    ):
        return cache.update(latent, k_rope, layer_idx)
    length = layer.keys.shape[2]
    end = length + latent.shape[2]
    spare = getattr(layer, "spare_room", None)
    if (
        spare is None
        or spare[0].data_ptr() != layer.keys.data_ptr()
        or spare[1].data_ptr() != layer.values.data_ptr()
        or spare[0].shape[0] != latent.shape[0]
        or spare[0].shape[2] < end
    ):
        room = end + max(SPARE_TOKENS, end // 8)
        spare = tuple(old.new_empty(*old.shape[:2], room, old.shape[3]) for old in (layer.keys, layer.values))
        for new, old in zip(spare, (layer.keys, layer.values)):
            new[:, :, :length] = old
        layer.spare_room = spare
    spare[0][:, :, length:end] = latent
    spare[1][:, :, length:end] = k_rope
    layer.keys, layer.values = spare[0][:, :, :end], spare[1][:, :, :end]
    return layer.keys, layer.values
