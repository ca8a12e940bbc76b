"""Pictures at foreign addresses: fetched from hosts that are allowed, and never from within a private network.

A name is resolved once, what it resolves to is checked, and the connection goes to just that address; the same again
for each redirect. So neither a name nor a redirect leads to this machine, to its neighbours, or to a cloud's metadata.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit


REDIRECTS = 3
# RFC 6052: addresses of IPv4 within IPv6, which translators turn back
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


class FetchError(ValueError):
    """Why nothing comes from an address, for whoever asked."""


def fetch(url: str, hosts: tuple[str, ...], most_bytes: int, seconds: float) -> bytes:
    """What is at an address.

    Args:
        hosts: that may be asked; "*" is all of them.
        seconds: for all of it, redirects included.

    Raises:
        FetchError: for other hosts, private addresses, more bytes than allowed, and whatever goes wrong on the way.
    """
    until = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        target = _target(url, hosts)
        try:
            with _answer(target, until) as (answer, expired):
                if answer.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, answer.headers.get("Location", ""))
                    continue
                if answer.status != 200:
                    raise FetchError(f"is answered with {answer.status}")
                content = answer.read(most_bytes + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, FetchError):
                raise
            if time.monotonic() >= until:
                raise FetchError(f"did not arrive in {seconds:g} s") from None
            raise FetchError(f"cannot be fetched: {type(error).__name__}") from None
        if expired.is_set():
            raise FetchError(f"did not arrive in {seconds:g} s")
        if len(content) > most_bytes:
            raise FetchError(f"is larger than {most_bytes:,} bytes")
        return content
    raise FetchError(f"redirects more than {REDIRECTS} times")


def _target(url: str, hosts: tuple[str, ...]) -> SplitResult:
    try:
        target = urlsplit(url)
        host, _ = target.hostname, target.port  # a port that is none raises
    except ValueError:
        raise FetchError("is no address") from None
    if target.scheme not in ("http", "https") or not host:
        raise FetchError("is no address of http or https")
    if target.username is not None or target.password is not None:
        raise FetchError("has a user or a password, which is not sent")
    if "*" not in hosts and host not in hosts:
        raise FetchError(f"is at {host[:80]!r}, a host from which this server fetches nothing")
    return target


def is_public(address: str) -> bool:
    """Whether an address is everybody's: none of this machine, of a private network, or of a link."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if found in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def _place(host: str, port: int) -> tuple[Any, ...]:
    """The family and address of a host, all of whose addresses are public."""
    try:
        found = socket.getaddrinfo(host.encode("idna").decode(), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError("is at a host that is not known") from None
    if not all(is_public(str(place[4][0])) for place in found):
        raise FetchError("is at a private address, from which nothing is fetched")
    return found[0][0], found[0][4]


class _Connection(http.client.HTTPConnection):
    """To one address, whatever the name of the host resolves to by now."""

    def __init__(self, target: SplitResult, until: float):
        self.is_secure = target.scheme == "https"
        if self.is_secure:
            self.default_port = 443
        assert target.hostname is not None
        super().__init__(target.hostname.encode("idna").decode(), target.port or self.default_port)
        self.place, self.until = _place(target.hostname, self.port), until

    def connect(self) -> None:
        family, address = self.place
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(max(0.01, self.until - time.monotonic()))
        self.sock.connect(address)
        if self.is_secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


@contextlib.contextmanager
def _answer(target: SplitResult, until: float) -> Iterator[tuple[http.client.HTTPResponse, threading.Event]]:
    """The answer of a host, and what is set when its time is over, which ends it."""
    connection, expired = _Connection(target, until), threading.Event()
    timer = None
    try:
        connection.connect()
        held = connection.sock  # which the connection gives up as soon as it knows the answer's head

        def end() -> None:
            expired.set()
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

        # A timeout of the socket begins anew with every byte
        timer = threading.Timer(max(0.0, until - time.monotonic()), end)
        timer.daemon = True
        timer.start()
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        connection.request("GET", path, headers={"Accept": "image/*, video/*", "Connection": "close"})
        yield connection.getresponse(), expired
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()
