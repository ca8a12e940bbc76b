"""How long the Hub is waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError

from .hub_errors import HTTPError


# How long a connection may be silent, s. huggingface_hub waits for ever for some answers, and for uploads to be taken
SILENCE = 120.0


@contextlib.contextmanager
def bounded_silence() -> Iterator[None]:
    """Lets a request fail when its connection is silent for `SILENCE`, where huggingface_hub sets no limit."""

    def bound(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            **dict.fromkeys(("connect", "read", "write", "pool"), SILENCE),
            **{kind: seconds for kind, seconds in limits.items() if seconds is not None},
        }

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], bound]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def may_pass(error: BaseException) -> bool:
    """Whether what made a request fail may be over in a while: a lost connection, a Hub out of order or too busy.

    Whatever huggingface_hub raises in place of it, it keeps as the cause.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return seen.response.status_code >= 500 or seen.response.status_code in (408, 429)
        if isinstance(seen, (HTTPError, JSONDecodeError)):
            return True
        seen = seen.__cause__
    return False
