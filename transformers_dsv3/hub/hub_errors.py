"""What went wrong between this machine and the Hub, in a sentence."""

from __future__ import annotations

import os
from json import JSONDecodeError

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# Of the HTTP library under huggingface_hub, which is another one from version 2 on
HTTPError = HfHubHTTPError.__bases__[0]
LOGIN = "`hf auth login`, or set HF_TOKEN; tokens are made at https://huggingface.co/settings/tokens"


class HubError(RuntimeError):
    """An upload or a download that did not take place, or not to its end. The message says what is as it was."""


def reason(error: BaseException) -> str:
    """Why a call to the Hub failed, in one line without a full stop. Never holds an access token."""
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no access token. Log in with {LOGIN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is asked of the Hub"
    if isinstance(error, GatedRepoError):
        return "the repository is gated, and this account has not been let in"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token gives no access to it"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, HfHubHTTPError):
        return _http_reason(error)
    if isinstance(error, HTTPError):
        return f"the connection failed ({type(error).__name__}: {_first_line(error)})"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{os.strerror(error.errno)}"
    if isinstance(error, JSONDecodeError):
        return "an answer of the Hub's did not arrive whole"
    # huggingface_hub names the file, and keeps what happened as the cause
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return f"{_first_line(error).rstrip('.')}: {reason(error.__cause__)}"
    return _first_line(error)


def _http_reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.server_message or error.response.headers.get("X-Error-Message")
    what = {
        401: f"the access token is not valid, or no longer. Log in again with {LOGIN}",
        403: "the access token gives no right to do this",
        412: "somebody else changed the repository in the meantime",
        413: "a file is larger than the Hub takes",
        429: "the Hub takes no more requests from this account for now",
    }.get(status, "the Hub is out of order" if status >= 500 else "the Hub refused")
    return f"{what} (HTTP {status}{f': {_line(said)}' if said else ''})"


def _first_line(error: BaseException) -> str:
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].strip()
