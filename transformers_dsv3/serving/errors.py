"""What is answered where a request is not served: OpenAI's error object, with the field at fault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


# Longer ones would send back what was sent
MESSAGE_LIMIT = 400
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that gets an error in place of an answer.

    Args:
        status: of HTTP. message: one line. param: the field at fault, "messages[0].role" say.
        code: OpenAI's, where it has one for this. headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        message = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
        if len(message) > MESSAGE_LIMIT:
            message = f"{message[:MESSAGE_LIMIT]}…"
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode()[:MESSAGE_LIMIT]
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, reason: str, code: str | None = None) -> ApiError:
    """A field of the request that cannot be taken as it is."""
    return ApiError(400, f"`{param}` {reason}", param, code)
