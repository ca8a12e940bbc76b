"""Addresses of pictures: which hosts are asked, and that none of a private network is, however it is named."""

import http.server
import socket
import threading

import pytest

from tests.serving.pictures import file_of, part, shade
from transformers_dsv3.serving import fetching
from transformers_dsv3.serving.fetching import FetchError, fetch, is_public


PICTURE = file_of(shade(50))


class Host(http.server.BaseHTTPRequestHandler):
    release = threading.Event()

    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        where = {
            "/private": "http://10.0.0.1/a.png", "/cloud": "http://169.254.169.254/latest", "/round": "/round",
            "/again": "/a.png", "/file": "file:///etc/passwd",
        }.get(self.path)  # fmt: skip
        if where is not None:
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(PICTURE)
        if self.path == "/slow":
            self.wfile.flush()
            self.release.wait(60)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        Host.release.set()
        server.shutdown()


@pytest.fixture
def address(host, monkeypatch):
    """Of that host, which is taken for a public one."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    host.asked.clear()
    return f"http://127.0.0.1:{host.server_address[1]}"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
        ("224.0.0.1", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
        ("ff02::1", False), ("255.255.255.255", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, expected):
    assert is_public(address) == expected


def test_a_picture_is_fetched_from_an_allowed_host(host, address):
    for hosts in (("127.0.0.1",), ("*",)):
        assert fetch(f"{address}/a.png?size=1", hosts, 10_000, 20) == PICTURE
        assert fetch(f"{address}/again", hosts, 10_000, 20) == PICTURE
    assert host.asked[0] == (address.removeprefix("http://"), "/a.png?size=1")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/private", "private address"),
        ("/cloud", "private address"),
        ("/file", "no address of http"),
        ("/round", "redirects more than 3 times"),
        ("/none", "answered with 404"),
    ],
)
def test_what_a_host_may_not_answer(address, path, reason):
    with pytest.raises(FetchError, match=reason):
        fetch(address + path, ("*",), 10_000, 20)


def test_bytes_and_seconds_are_bounded(address):
    with pytest.raises(FetchError, match="larger than 10 bytes"):
        fetch(f"{address}/a.png", ("*",), 10, 20)
    with pytest.raises(FetchError, match=r"did not arrive in 0\.3 s"):
        fetch(f"{address}/slow", ("*",), 10_000, 0.3)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://other.example/a.png", "'other.example', a host from which"),
        ("http://images.example@127.0.0.1/a.png", "user or a password"),
        ("http://127.0.0.1/a.png", "a host from which"),
        ("http://[::1/a.png", "no address"),
        ("http://images.example:99999/a.png", "no address"),
        ("http:///a.png", "no address of http"),
        ("ftp://images.example/a.png", "no address of http"),
    ],
)
def test_addresses_that_are_not_asked(url, reason):
    with pytest.raises(FetchError, match=reason):
        fetch(url, ("images.example",), 10_000, 20)


@pytest.mark.parametrize("name", ["localhost", "127.1", "0x7f.1", "2130706433", "[::1]", "0"])
def test_names_of_this_machine_lead_nowhere(name):
    with pytest.raises(FetchError, match="private address|not known"):
        fetch(f"http://{name}/a.png", ("*",), 10_000, 20)


def test_a_name_is_resolved_once_and_the_connection_goes_there(host, address, monkeypatch):
    """What a name stands for may have changed by the time of the connection."""
    told = []

    def resolve(name, port, **options):
        told.append(name)
        found = "127.0.0.1" if len(told) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, host.server_address[1]))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert fetch("http://images.example/a.png", ("images.example",), 10_000, 20) == PICTURE
    assert told == ["images.example"] and host.asked == [("images.example", "/a.png")]
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: both)
    with pytest.raises(FetchError, match="private address"):
        fetch("http://images.example/a.png", ("images.example",), 10_000, 20)


def test_the_server_fetches_where_it_is_told_to(joined, serve, picture_server, address):
    from transformers_dsv3.serving.pictures import Pictures
    from transformers_dsv3.serving.settings import MediaLimits

    client = serve(picture_server.engine, pictures=Pictures(*joined, MediaLimits(hosts=("127.0.0.1",))))
    assert client.chat([part(f"{address}/a.png")], max_tokens=2).status == 200
    answer = client.chat([part("http://other.example/a.png")], max_tokens=2)
    assert answer.status == 400 and answer.error["param"] == "messages[0].content[0].image_url.url"
