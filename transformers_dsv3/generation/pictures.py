"""Pictures of a prompt, as requests carry them: through the tower once, before anything waits for a place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .requests import Features, RequestError


# Keys of pages are beyond all tokens
_BEYOND = 1 << 256


@torch.no_grad()
def with_pictures(
    model: Any, prompt: Sequence[int], pictures: Mapping[str, Any]
) -> tuple[tuple[int, ...], Features | None]:
    """A prompt and the features of its pictures, for a [`Request`].

    Features that the model has kept are not computed again. May be called by several threads.

    Args:
        model: with a tower, an `InternVLForConditionalGeneration` say, in evaluation mode.
        prompt: token ids, with the places of pictures.
        pictures: what the processor gives beside them: `pixel_values` and the like.

    Returns:
        The prompt, in which a token that the embedding does not have stands for pictures no more, and the features;
        None without pictures.

    Raises:
        RequestError: `pictures`, for those that do not fit the prompt.
    """
    given = {name: value for name, value in pictures.items() if name in model.picture_inputs and value is not None}
    if not given:
        return tuple(prompt), None
    ids_1S = torch.tensor([list(prompt)], device=model.device)
    try:
        given = {name: torch.as_tensor(value).to(model.device) for name, value in given.items()}
        model.check_pictures(ids_1S, given)
        standing = [getattr(model.config, field) for field in model.picture_tokens(**given)]
    except ValueError as error:
        raise RequestError("pictures", f"do not fit: {error}") from None
    embeds_SD = model.merged(ids_1S, keep=True, **given)[0]
    is_picture = torch.isin(ids_1S[0], torch.tensor(standing, device=model.device))
    places = is_picture.nonzero()[:, 0]
    words = ids_1S[0].masked_fill(is_picture & (ids_1S[0] >= model.config.text_config.vocab_size), 0)
    return tuple(words.tolist()), features_of(places.tolist(), embeds_SD[places])


def features_of(places: Sequence[int], rows_FD: torch.Tensor) -> Features:
    """Features of a request, with keys of what they hold.

    Args:
        places: of the prompt, ascending. rows_FD: `(places, D)`, on the model's device, of its dtype.
    """
    held = rows_FD.detach().cpu().contiguous().view(torch.uint8)
    keys = tuple(
        _BEYOND + int.from_bytes(hashlib.blake2b(row, digest_size=32).digest(), "big") for row in held.numpy()
    )
    return Features(tuple(places), rows_FD, keys)
