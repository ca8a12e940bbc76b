"""The engine's death, and an end that lets requests finish."""

import threading

from tests.serving.test_limits import body, head, wait_for


def asking(client, **fields):
    """A thread that asks for a completion, and a list for the answer."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.complete(**fields)))
    thread.start()
    return thread, answers


def test_the_engines_death_is_said_by_everything(serve, make_engine):
    engine = make_engine(step=0.01, max_sequence=100_000)
    client = serve(engine)
    whole, stream = asking(client, max_tokens=90_000), asking(client, max_tokens=90_000, stream=True)
    wait_for(lambda: len(engine.states) == 2)
    engine.fail_next_step = MemoryError("no more")
    for thread, _ in (whole, stream):
        thread.join(60)
    assert whole[1][0].status == 503 and "has failed" in whole[1][0].error["message"]
    *_, error, done = stream[1][0].events
    assert error["error"]["type"] == "service_unavailable_error" and done == "[DONE]"
    for path in ("/health", "/ready", "/v1/models"):
        assert client.get(path).status == 503
    assert client.complete().status == 503
    assert client.get("/metrics").status == 200


def test_at_its_end_the_server_finishes_what_it_has_begun(serve, make_engine):
    engine = make_engine(step=0.01)
    client = serve(engine, drain_seconds=60)
    thread, answers = asking(client, max_tokens=100)
    wait_for(lambda: engine.states)
    client.server.handle_exit(15, None)
    answer = client.complete()
    assert answer.status == 503 and answer.headers["retry-after"] == "5"
    assert client.get("/ready").status == 503 and client.get("/health").status == 200
    client.thread.join(60)
    thread.join()
    assert not client.thread.is_alive()
    assert answers[0].status == 200 and answers[0].json["usage"]["completion_tokens"] == 100


def test_at_its_end_the_server_waits_no_longer_than_it_may(serve, make_engine):
    engine = make_engine(step=0.01, max_sequence=100_000)
    client = serve(engine, drain_seconds=0.3)
    whole, stream = asking(client, max_tokens=90_000), asking(client, max_tokens=90_000, stream=True)
    with client.raw() as idle:
        data = body(max_tokens=1)
        idle.sendall(head(client, length=len(data)) + data)
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")
        wait_for(lambda: len(engine.states) == 2)
        client.server.handle_exit(15, None)
        client.thread.join(60)
    assert not client.thread.is_alive()
    for thread, _ in (whole, stream):
        thread.join()
    assert whole[1][0].status == 503
    assert "has ended" in stream[1][0].events[-2]["error"]["message"]
    wait_for(lambda: not engine.states)


def test_a_second_signal_ends_at_once(serve, make_engine):
    engine = make_engine(step=0.01, max_sequence=100_000)
    client = serve(engine, drain_seconds=1000)
    thread, _ = asking(client, max_tokens=90_000, stream=True)
    wait_for(lambda: engine.states)
    client.server.handle_exit(15, None)
    client.server.handle_exit(15, None)
    client.thread.join(60)
    assert not client.thread.is_alive()
    thread.join()
