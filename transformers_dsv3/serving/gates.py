"""What stands before the endpoints: who may ask, for how long, and what is said where something went wrong."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from .errors import ApiError
from .metrics import Metrics
from .settings import ServerSettings


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)
# These run the model, or tell of it; the page, health and metrics are for everyone who reaches the port
GUARDED = ("/v1/", "/tokenize", "/detokenize")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


class _Stalled(Exception):
    """The client does not read."""


class Patience:
    """Outermost: gives every answer a number, counts it, and gives up clients that do not take what they are sent.

    Args:
        app: what answers. settings: for `send_seconds`. metrics: where answers are counted.
    """

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            with anyio.move_on_after(self.settings.send_seconds) as limit:
                await send(message)
            if limit.cancelled_caught:
                # Closing would wait for the client to read what is on its way
                transport = getattr(getattr(send, "__self__", None), "transport", None)
                if transport is not None:
                    transport.abort()
                raise _Stalled

        try:
            await self.app(scope, receive, send_in_time)
        except _Stalled:
            logger.warning("a client took nothing for %g s and was given up", self.settings.send_seconds)


class Gate:
    """Lets those in who have a key, as long as the server takes requests.

    Args:
        app: what answers. settings: for the keys. refusal: why no request is taken just now, or None.
    """

    def __init__(self, app: App, settings: ServerSettings, refusal: Callable[[], ApiError | None]):
        self.app, self.refusal = app, refusal
        self.keys = [self._digest(key.encode()) for key in settings.api_keys]

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()  # one length, whatever was sent

    def _allowed(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = self._digest(key.strip().encode("latin-1", "replace"))
        found = [hmac.compare_digest(digest, known) for known in self.keys]  # all of them, in the same time
        return scheme.lower() == "bearer" and any(found)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS":
            error = None
            if self.keys and not self._allowed(Headers(scope=scope).get("authorization", "")):
                error = ApiError(
                    401,
                    "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            error = error or self.refusal()
            if error is not None:
                error.headers.setdefault("Connection", "close")  # the body is not read
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
