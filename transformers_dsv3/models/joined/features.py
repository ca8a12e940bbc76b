"""Features of pictures that are asked about more than once, kept by what the pictures hold."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch


# Features that a model keeps, in bytes: of 448 x 448 pixels and a width of 2,048, about 250 tiles in bf16
MOST_BYTES = 2**28


def _digest(picture: torch.Tensor) -> bytes:
    values = picture.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{values.dtype}{tuple(values.shape)}".encode(), digest_size=20)
    digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.digest()


def _state(weights: Iterable[torch.Tensor]) -> tuple:
    """Where weights lie, and how often they were written to."""
    return tuple((w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights)


class FeatureCache:
    """Features by the content of pictures, the most recently used ones.

    They are forgotten when the weights that made them have changed. Not a part of a model's state, nor of its copies.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._weights: tuple = ()
        self._lock = threading.RLock()  # so that who asks for the same at the same time waits for it

    def __deepcopy__(self, memo: dict) -> FeatureCache:
        return FeatureCache(self.most_bytes)

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.most_bytes,)

    def features(
        self,
        pictures: Sequence[torch.Tensor],
        weights: Iterable[torch.Tensor],
        compute: Callable[[list[int]], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The features `(tokens, D)` of each picture, of which `compute` makes those that are not here.

        Threads take turns.

        Args:
            pictures: tensors of pixels. weights: of the tower and the projector.
            compute: from the places of some pictures in that list to their features.
        """
        with self._lock:
            return self._features(pictures, weights, compute)

    def _features(
        self,
        pictures: Sequence[torch.Tensor],
        weights: Iterable[torch.Tensor],
        compute: Callable[[list[int]], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        if (state := _state(weights)) != self._weights:
            self._kept.clear()
            self._bytes, self._weights = 0, state
        keys = [_digest(picture) for picture in pictures]
        missing = {key: place for place, key in enumerate(keys) if key not in self._kept}  # each content once
        made = dict(zip(missing, compute(list(missing.values())))) if missing else {}
        found = [made[key] if key in made else self._kept[key] for key in keys]
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
        for key, features in made.items():
            self._kept[key] = features.clone()  # its own memory, not a part of the batch's
            self._bytes += features.nbytes
        while self._bytes > self.most_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found
