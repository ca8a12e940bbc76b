"""The process: a socket, uvicorn, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..option_error import OptionError
from .app import Service
from .errors import ApiError


logger = logging.getLogger(__name__)
HEADER_SECONDS = 30.0
# A proxy keeps connections open; one that is closed while it sends the next request gives an error to its client
KEEP_ALIVE_SECONDS = 75


class HttpProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for a client that connects and does not ask."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():  # no request has come yet
            self.transport.abort()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has its place and does not listen yet; port 0 takes a free one.

    Raises:
        OptionError: `--host` or `--port`, of what cannot be had.
    """
    if not 0 <= port <= 65535:
        raise OptionError("--port", f"{port} is not in [0, 65535]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OptionError("--host", f"{host!r} is no address of this machine: {error}") from None
    place = socket.socket(family, kind, protocol)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as error:
        place.close()
        taken = isinstance(error, PermissionError) or "in use" in str(error)
        raise OptionError("--port" if taken else "--host", f"{host}:{port}: {error.strerror or error}") from None
    return place


class DrainingServer(uvicorn.Server):
    """Ends at the first SIGTERM or SIGINT when running requests are done, at the second at once.

    Args:
        service: what is served. drain_seconds: in which running requests have to end.
        say: prints a line.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float, say: Callable[[str], None]):
        super().__init__(config)
        self.should_exit = False
        self.service, self.drain_seconds, self.say = service, drain_seconds, say
        self.drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.drain_until is None:
            self.drain_until = time.monotonic() + self.drain_seconds
            self.service.draining = True
        else:
            self.drain_until = 0.0
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self.drain_until is not None and not self.should_exit:
            calls = self.service.mailroom.calls
            if counter % 50 == 0 and calls:
                self.say(f"{len(calls)} requests are being finished; once more ends at once.")
            if not calls or time.monotonic() > self.drain_until:
                for call in list(calls):
                    call.stop(ApiError(503, "the server has ended before the text was done"))
                self.should_exit = True
        return await super().on_tick(counter)


def serve(
    service: Service, place: socket.socket, *, drain_seconds: float = 30.0, say: Callable[[str], None] = print
) -> None:
    """Serves until a signal ends it.

    Args:
        service: with a running engine. place: of `bound_socket`. drain_seconds: for running requests at the end.
        say: prints a line.
    """
    _many_files()
    config = uvicorn.Config(
        service.app(),
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    server = DrainingServer(config, service, drain_seconds, say)
    asyncio.run(server.serve(sockets=[place]))


def _many_files() -> None:
    """A thousand clients are a thousand open files, of which many systems give 1,024 unless asked."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
