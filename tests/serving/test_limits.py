"""Keys, sizes, times, queues, and clients that go away."""

import json
import threading
import time

import pytest

from transformers_dsv3.generation.requests import Request
from transformers_dsv3.option_error import OptionError
from transformers_dsv3.serving.server import bound_socket


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def head(client, path="/v1/completions", length=None, **headers):
    lines = {"Host": "x", "Content-Type": "application/json", **headers}
    if length is not None:
        lines["Content-Length"] = length
    told = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{told}\r\n".encode()


def answer_of(connection):
    """Status and body of what comes back until the server closes."""
    data = b""
    while part := connection.recv(65536):
        data += part
    top, _, body = data.partition(b"\r\n\r\n")
    return int(top.split()[1]), body


def body(**fields):
    return json.dumps({"prompt": "abc", "max_tokens": 4, **fields}).encode()


def test_a_key_is_needed_where_there_are_keys(serve, make_engine):
    client = serve(make_engine(), api_keys=("secret", "other"))
    answer = client.complete()
    assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer \xe9", "Bearer secretother"):
        answer = client.post("/v1/completions", {"prompt": "a"}, Authorization=header)
        assert answer.status == 401
    for path in ("/v1/models", "/v1/models/echo", "/v1/anything"):
        assert client.get(path).status == 401
    for key in ("secret", "other"):
        assert client.post("/v1/completions", {"prompt": "a"}, Authorization=f"bearer {key}").status == 200
    assert [client.get(path).status for path in ("/health", "/ready", "/metrics", "/")] == [200] * 4


def test_pages_of_other_sites_may_ask_where_they_are_named(serve, make_engine):
    origin, other = "https://chat.example", "https://evil.example"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    closed = serve(make_engine())
    answer = closed.request("OPTIONS", "/v1/completions", Origin=origin, **preflight)
    assert answer.status == 405 and "access-control-allow-origin" not in answer.headers
    client = serve(make_engine(), allow_origins=(origin,), api_keys=("k",))
    answer = client.request("OPTIONS", "/v1/completions", Origin=origin, **preflight)
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == origin
    assert client.request("OPTIONS", "/v1/completions", Origin=other, **preflight).status == 400
    refused = client.post("/v1/completions", {"prompt": "a"}, Origin=origin)
    assert refused.status == 401 and refused.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_another_sites_form_could_send_is_refused(echo, kind):
    answer = echo.post("/v1/completions", {"prompt": "a"}, **{"Content-Type": kind})
    assert answer.status == 415 and "application/json" in answer.error["message"]


def test_bodies_have_a_limit(serve, make_engine):
    client = serve(make_engine(), max_body=1000)
    assert client.complete("a" * 100).status == 200
    assert client.complete("a" * 1000).status == 413
    with client.raw() as connection:  # which says nothing of its length
        connection.sendall(head(client, **{"Transfer-Encoding": "chunked"}) + b"400\r\n" + b" " * 1024 + b"\r\n")
        status, told = answer_of(connection)
    assert status == 413 and json.loads(told)["error"]["type"] == "invalid_request_error"
    with client.raw() as connection:
        connection.sendall(head(client, length=10**30))
        assert answer_of(connection)[0] in (400, 413)
    assert client.complete().status == 200 and client.service.reading == 0


def test_bodies_that_do_not_arrive(serve, make_engine):
    client = serve(make_engine(), body_seconds=0.3)
    with client.raw() as connection:
        connection.sendall(head(client, length=100) + b'{"prompt"')
        status, told = answer_of(connection)
    assert status == 408 and "did not arrive" in json.loads(told)["error"]["message"]
    for _ in range(5):
        with client.raw() as connection:
            connection.sendall(head(client, length=100) + b'{"prompt"')
    assert client.complete().status == 200
    wait_for(lambda: client.service.reading == 0)


def test_all_bodies_together_have_a_limit(serve, make_engine):
    client = serve(make_engine(), max_body=1000, max_reading=1500)
    with client.raw() as first:
        first.sendall(head(client, length=1000) + b" " * 900)
        wait_for(lambda: client.service.reading == 900)
        answer = client.complete("a" * 800)
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
    wait_for(lambda: client.service.reading == 0)
    assert client.complete("a" * 100).status == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a" * 300}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a" * 300]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "a" * 100_000}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 300}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 250}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused_at_once(serve, make_engine, path, fields, param):
    client = serve(make_engine())
    answer = client.post(path, fields)
    assert answer.status == 400 and answer.error["param"] == param
    assert not client.engine.seen


def test_a_full_queue(serve, make_engine):
    engine = make_engine(max_waiting=3)
    client = serve(engine)
    engine.held.clear()
    waiting = [threading.Thread(target=client.complete) for _ in range(2)]
    for thread in waiting:
        thread.start()
    wait_for(lambda: len(engine.states) == 2)
    answer = client.complete(n=2)  # all of its texts or none
    assert answer.status == 429 and answer.headers["retry-after"] == "2"
    assert answer.error["type"] == "rate_limit_error" and len(engine.states) == 2
    engine.held.set()
    for thread in waiting:
        thread.join()
    assert client.complete(n=2).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(serve, make_engine, stream):
    engine = make_engine(step=0.01, max_sequence=100_000)
    client = serve(engine)
    with client.raw() as connection:
        data = body(max_tokens=90_000, n=2, stream=stream)
        connection.sendall(head(client, length=len(data)) + data)
        wait_for(lambda: len(engine.states) == 2 and all(state.made for state in engine.states.values()))
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    wait_for(lambda: not engine.states)
    assert len(engine.cancelled) == 2 and not client.service.mailroom.calls
    assert client.complete().status == 200


def test_a_client_that_does_not_read_is_given_up(serve, make_engine):
    engine = make_engine(max_sequence=4_000_000)
    client = serve(engine, send_seconds=0.3)
    with client.raw() as connection:
        data = body(max_tokens=3_000_000, stream=True)
        connection.sendall(head(client, length=len(data)) + data)
        wait_for(lambda: engine.cancelled)
    assert client.complete().status == 200
    wait_for(lambda: not client.server.server_state.connections)


def test_requests_have_a_time(serve, make_engine):
    engine = make_engine(step=0.01, max_sequence=100_000)
    client = serve(engine, request_seconds=0.2)
    answer = client.complete(max_tokens=90_000)
    assert answer.status == 504 and answer.error["code"] == "timeout"
    *_, error, done = client.complete(max_tokens=90_000, stream=True).events
    assert error["error"]["code"] == "timeout" and done == "[DONE]"
    wait_for(lambda: not engine.states)
    assert client.complete().status == 200


def test_ids_of_clients_are_theirs_alone(serve, make_engine):
    engine = make_engine(step=0.01)
    client = serve(engine)
    answers = []
    request = {"prompt": "a", "max_tokens": 9, "request_id": "1"}

    def post():
        answers.append(client.post("/v1/completions", request, **{"X-Request-Id": "1"}))

    ask = [threading.Thread(target=post) for _ in range(3)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert [(answer.status, answer.headers["x-request-id"]) for answer in answers] == [(200, "1")] * 3
    assert len({request.request_id for request in engine.seen}) == 3
    assert len(client.get("/health", **{"X-Request-Id": "x" * 1000}).headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("host", "port", "option"),
    [("127.0.0.1", 70_000, "--port"), ("no.such.host.invalid", 0, "--host"), ("192.0.2.1", 0, "--host")],
)
def test_addresses_that_cannot_be_had(host, port, option):
    with pytest.raises(OptionError) as error:
        bound_socket(host, port)
    assert error.value.option == option


def test_a_port_that_is_taken():
    with bound_socket("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OptionError) as error:
            bound_socket("127.0.0.1", first.getsockname()[1])
    assert error.value.option == "--port"


def test_requests_are_what_the_engine_takes(echo):
    echo.complete("ab", priority=-2, cache_salt="tenant", min_tokens=2)
    request = echo.engine.seen[-1]
    assert isinstance(request, Request)
    assert (request.prompt, request.priority, request.cache_salt) == ((64, 65), -2, "tenant")
