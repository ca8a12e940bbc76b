"""Appending to Transformers' dynamic cache without copying what it holds, and what is known of its static one."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...kernels.pages import in_huge_pages


# Room is made for this many more tokens, or an eighth of those cached, whichever is more
SPARE_TOKENS = 256


# Where somebody has put functions of their own there, which compress or watch what is cached, these are called
UPDATE, LAYER_UPDATE = DynamicCache.update, DynamicLayer.update
STATIC_UPDATE, STATIC_LAYER_UPDATE = StaticCache.update, StaticLayer.update


@dataclass
class _Room:
    """Tensors larger than what a layer holds.

    Args:
        filled: tokens that were given out so far. owner: `id` of the layer that writes here.
    """

    keys: torch.Tensor
    values: torch.Tensor
    filled: int = 0
    owner: int = 0


def extend(
    cache: Cache, latent: torch.Tensor, k_rope: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cache.update(latent, k_rope, layer_idx)`, but a `DynamicCache` grows in place.

    `DynamicLayer` joins old and new at every step: at 32,000 tokens that is 38 MB written a layer and token, which
    takes longer than attention. Here its `keys` and `values` become the first part of larger tensors with room
    behind. What a layer ever gave out is not written to again: after a crop, after other code put tensors of its own
    into the layer, or in a copy of it, what it holds is copied once, and grows in place from there.

    Args:
        latent: `(B, 1, Q, R)`, k_rope: `(B, 1, Q, P)`.

    Returns:
        All that the layer holds, `(B, 1, S, R)` and `(B, 1, S, P)`.
    """
    layer = _growing(cache, latent, layer_idx)
    if layer is None:
        return cache.update(latent, k_rope, layer_idx)
    start, end = layer.keys.shape[2], layer.keys.shape[2] + latent.shape[2]
    room = _room_in(layer, end)
    room.keys[:, :, start:end], room.values[:, :, start:end] = latent, k_rope
    room.filled = end
    layer.keys, layer.values = room.keys[:, :, :end], room.values[:, :, :end]
    return layer.keys, layer.values


def _growing(cache: Cache, latent: torch.Tensor, layer_idx: int) -> DynamicLayer | None:
    """The layer that can grow in place by latents like these, if it can."""
    if (
        is_torchdynamo_compiling()
        or torch.is_grad_enabled()
        or type(cache) is not DynamicCache
        or "update" in cache.__dict__
        or DynamicCache.update is not UPDATE
        or DynamicLayer.update is not LAYER_UPDATE
        or getattr(cache, "offloading", False)
        or layer_idx >= len(cache.layers)
        or not only_grows(layer := cache.layers[layer_idx])
        or "update" in layer.__dict__
        or not layer.is_initialized
        or layer.keys.numel() == 0
        or layer.keys.dtype != latent.dtype
        or layer.keys.device != latent.device
    ):
        return None
    return layer


def _room_in(layer: DynamicLayer, end: int) -> _Room:
    """The room of a layer that grows in place to `end` tokens: what it has, where its tensors are the first part of
    that and nothing else was given out behind them."""
    length, latents, k_rope = layer.keys.shape[2], layer.keys, layer.values
    room = getattr(layer, "spare_room", None)
    if (
        room is not None
        and room.owner == id(layer)
        and room.filled == length
        and room.keys.shape[2] >= end
        and room.keys.data_ptr() == latents.data_ptr()
        and room.keys.stride() == latents.stride()
        and room.keys.shape[0] == latents.shape[0]
        and room.values.data_ptr() == k_rope.data_ptr()
        and room.values.stride() == k_rope.stride()
        and room.values.shape[0] == k_rope.shape[0]
        and (torch.is_inference_mode_enabled() or not room.keys.is_inference())
    ):
        return room
    size = end + max(SPARE_TOKENS, end // 8)
    room = _Room(*(in_huge_pages(old.new_empty(*old.shape[:2], size, old.shape[3])) for old in (latents, k_rope)))
    room.keys[:, :, :length], room.values[:, :, :length] = latents, k_rope
    room.owner = id(layer)
    layer.spare_room = room
    return room


@dataclass
class Place:
    """Where the next tokens' latents go in a layer of a cache.

    Args:
        keys, values: `(B, 1, S, R)` and `(B, 1, S, P)`, with room for them.
        start: the first position to write to, behind what `position`, a tensor `()` on their device, holds.
    """

    layer: DynamicLayer | StaticLayer
    keys: torch.Tensor
    values: torch.Tensor
    start: int = 0
    position: torch.Tensor | None = None

    def take(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All that the layer holds after so many tokens were written here, which it counts from now on."""
        if self.position is not None:
            self.position.add_(tokens)
            return self.keys, self.values
        end = self.start + tokens
        self.layer.spare_room.filled = end
        self.layer.keys, self.layer.values = self.keys[:, :, :end], self.values[:, :, :end]
        return self.layer.keys, self.layer.values


def next_place(cache: Cache | None, latent: torch.Tensor, layer_idx: int) -> Place | None:
    """Where a kernel may write the next tokens' latents itself, in place of `extend`; None where it may not.

    Args:
        latent: `(B, Q, ...)`, read for its shape, dtype and device.
    """
    if cache is None:
        return None
    layer = _static(cache, layer_idx)
    if layer is None:
        growing = _growing(cache, latent, layer_idx)
        if growing is None:
            return None
        start = growing.keys.shape[2]
        room = _room_in(growing, start + latent.shape[1])
        return Place(growing, room.keys, room.values, start)
    if not layer.is_initialized or layer.keys.dtype != latent.dtype or layer.keys.device != latent.device:
        return None
    return Place(layer, layer.keys, layer.values, position=layer.cumulative_length)


def _static(cache: Cache | None, layer_idx: int) -> StaticLayer | None:
    """A layer of Transformers' static cache itself, which is not offloaded either."""
    if cache is None or type(cache) is not StaticCache or getattr(cache, "offloading", False):
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is not StaticLayer or "update" in layer.__dict__ or "update" in cache.__dict__:
        return None
    own = StaticCache.update is STATIC_UPDATE and StaticLayer.update is STATIC_LAYER_UPDATE
    return layer if own else None


def filled_positions(cache: Cache | None, layer_idx: int) -> torch.Tensor | None:
    """How many positions of a static cache's layer hold something, from the first on: integer `()` on its device.

    Transformers counts them there, in place, so that nobody waits for the device to know. None for other caches.
    """
    layer = _static(cache, layer_idx)
    return None if layer is None else layer.cumulative_length


def take_back(cache: Cache, tokens: int) -> None:
    """Crops the last tokens, whose places are then written to again: for drafts, which nothing else has seen."""
    shared = _shared.get(cache)
    if shared is not None and all(shared.is_of(layer) for layer in cache.layers):
        shared.filled -= min(tokens, shared.filled)
        return
    cache.crop(-tokens)
    for layer in cache.layers:
        spare = getattr(layer, "spare_room", None)
        if spare is not None:
            spare.filled = min(spare.filled, layer.keys.shape[2])
    if shared is not None:
        shared.filled = min(shared.filled, cache.get_seq_length())


@dataclass(eq=False)
class SharedRoom:
    """What all layers of a cache hold, in one tensor each, for a program that writes to all of them at once.

    Args:
        latent: `(layers, B, 1, size, R)`. k_rope: `(layers, B, 1, size, P)`.
        filled: tokens that the layers hold.
    """

    latent: torch.Tensor
    k_rope: torch.Tensor
    filled: int = 0

    def is_of(self, layer: DynamicLayer) -> bool:
        """Whether a layer holds what is here, and nothing else was put into it since."""
        state = layer.__dict__
        return type(layer) is SharedLayer and state["room"] is self and "keys" not in state and "values" not in state

    def take_in(self, layer: DynamicLayer, index: int) -> None:
        """Makes a layer hold the first `filled` tokens of what is here."""
        layer.__class__ = SharedLayer
        state = layer.__dict__
        for name in ("keys", "values", "spare_room"):
            state.pop(name, None)
        state["room"], state["index"] = self, index


class SharedLayer(DynamicLayer):
    """A layer of `DynamicCache` whose latents and rotary keys are the first part of a [`SharedRoom`].

    `keys` and `values` are made when they are asked for: a step of decoding asks for none, and two tensors a layer and
    step, made and let go, are a good part of what Python does in it. What is put into the layer is what it holds from
    then on.
    """

    def _held(self, name: str, whole: str) -> torch.Tensor | None:
        """What was put into the layer under a name, or else its part of a tensor of the room."""
        state = self.__dict__
        if name in state:
            return state[name]
        room = state["room"]
        return getattr(room, whole)[state["index"]].narrow(2, 0, room.filled)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._held("keys", "latent")

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self.__dict__["keys"] = tensor

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._held("values", "k_rope")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self.__dict__["values"] = tensor

    def get_seq_length(self) -> int:
        state = self.__dict__
        return super().get_seq_length() if "keys" in state else state["room"].filled

    def __reduce__(self) -> tuple:
        """Copies and pickles are plain layers of Transformers', with what this one holds now."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("room", "index")}
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            state[name] = None if tensor is None else tensor.clone()
        return DynamicLayer, (), state


def only_grows(layer: Any) -> bool:
    """Whether a layer of a cache is one that keeps what it is given, behind what it holds, and nothing else."""
    return type(layer) in (DynamicLayer, SharedLayer)


_shared: WeakKeyDictionary[Cache, SharedRoom] = WeakKeyDictionary()


def shared_room(cache: Cache, count: int, like: torch.Tensor) -> SharedRoom | None:
    """The room of the first `count` layers of a cache, with place behind what they hold; None where there can be none.

    What a layer ever gave out is not written to again, as in `extend`; what it holds is copied where it is not in this
    room already, one layer after another.

    Args:
        like: `(B, Q, ...)`, the tokens that follow, read for their shape, dtype and device.
    """
    if (
        type(cache) is not DynamicCache
        or len(cache.layers) < count
        or "update" in cache.__dict__
        or DynamicCache.update is not UPDATE
        or DynamicLayer.update is not LAYER_UPDATE
        or getattr(cache, "offloading", False)
    ):
        return None
    layers = cache.layers[:count]
    room = _shared.get(cache)
    if room is not None and len(room.latent) != count:
        room = None
    if room is not None:
        for layer in layers:
            if not room.is_of(layer) or "update" in layer.__dict__:
                room = _found_again(room, layers)
                break
    if room is None and any(_growing(cache, like, index) is None for index in range(count)):
        return None
    length = room.filled if room is not None else layers[0].keys.shape[2]
    end = length + like.shape[1]
    if room is not None and room.latent.shape[3] >= end:
        return room if room.latent.shape[1] == like.shape[0] and room.latent.dtype is like.dtype else None
    return _move_in(cache, layers, length, end, like)


def _found_again(room: SharedRoom, layers: list[DynamicLayer]) -> SharedRoom | None:
    """The room, if the layers hold the first part of it, and nothing was given out behind that."""
    latent, k_rope = room.latent, room.k_rope
    for index, layer in enumerate(layers):
        if "update" in layer.__dict__ or not only_grows(layer):
            return None
        for whole, tensor in ((latent, layer.keys), (k_rope, layer.values)):
            if (
                tensor is None
                or tensor.shape != (*whole.shape[1:3], room.filled, whole.shape[4])
                or tensor.stride() != whole.stride()[1:]
                or tensor.data_ptr() != whole.data_ptr() + index * whole.stride(0) * whole.element_size()
            ):
                return None
    for index, layer in enumerate(layers):
        room.take_in(layer, index)
    return room


def _move_in(cache: Cache, layers: list[DynamicLayer], length: int, end: int, like: torch.Tensor) -> SharedRoom | None:
    batch, size = like.shape[0], end + max(SPARE_TOKENS, end // 8)
    widths = layers[0].keys.shape[-1], layers[0].values.shape[-1]
    for layer in layers:
        for held, width in ((layer.keys, widths[0]), (layer.values, widths[1])):
            if held.shape != (batch, 1, length, width) or held.dtype is not like.dtype or held.device != like.device:
                return None
    shapes = [(len(layers), batch, 1, size, width) for width in widths]
    latent, k_rope = (in_huge_pages(layers[0].keys.new_empty(shape)) for shape in shapes)
    room = SharedRoom(latent, k_rope, length)
    for index, layer in enumerate(layers):
        room.latent[index, :, :, :length], room.k_rope[index, :, :, :length] = layer.keys, layer.values
        room.take_in(layer, index)  # what it held is let go before the next one is copied
    _shared[cache] = room
    return room
