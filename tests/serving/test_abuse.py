"""Thousands of mistakes: each is the client's, is said in OpenAI's form, and leaves nothing behind."""

import contextlib
import ctypes
import gc
import json
import os

import pytest

from tests.serving.mistakes import Mistakes
from tests.serving.pictures import about
from tests.serving.test_limits import wait_for


def said_well(answer):
    """Whether an answer is one, or an error in OpenAI's form."""
    if answer.status == 200:
        return b'"error":' not in answer.body or all("param" in one["error"] for one in errors_in(answer))
    if not answer.body:  # of HEAD
        return 400 <= answer.status < 500
    error = answer.error
    return 400 <= answer.status < 500 and error["message"] and set(error) == {"message", "type", "param", "code"}


def errors_in(answer):
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return []
    found = [one for one in answer.events if one != "[DONE]" and "error" in one]
    assert all(one["error"]["type"] != "server_error" for one in found), found
    return found


def resident():
    """Bytes of memory that this process holds, after what it does not need was given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def abuse(client, count, seed, **options):
    """Sends mistakes, and something right between them."""
    engine = client.engine
    mistakes = Mistakes(client, seed, client.service.limits.vocabulary, client.service.limits.sequence, **options)
    statuses = {}
    for number in range(count):
        answer = mistakes.send()
        if answer is not None:
            assert said_well(answer), (number, answer.status, answer.body[:500])
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
        if number % 25 == 0:
            right = client.complete("abc", max_tokens=4, temperature=0)
            assert right.status == 200, (number, right.body)
    wait_for(lambda: not engine.statistics().running and not client.service.mailroom.calls)
    assert client.service.reading == 0
    assert client.get("/health").status == 200
    for status in ("500", "502", "503", "504"):
        assert not client.sample("dsv3:http_responses_total", status=status)
    print(json.dumps(statuses))
    return statuses


def test_three_hundred_mistakes(serve, make_engine):
    client = serve(make_engine(max_sequence=64), body_seconds=5)
    statuses = abuse(client, 300, seed=0)
    assert statuses[200] > 20 and statuses[400] > 60 and statuses[404] > 2 and statuses[415] > 2
    assert not client.engine.states


def test_mistakes_with_pictures(picture_server):
    statuses = abuse(picture_server, 150, seed=2, of_media=0.9)
    assert statuses[400] > 40
    picture = picture_server.chat(about(7), max_tokens=2)
    assert picture.status == 200 and picture_server.service.pictures.waiting == 0


@pytest.mark.slow
def test_two_thousand_mistakes_with_pictures(picture_server):
    abuse(picture_server, 1000, seed=3, of_media=0.9)
    before = resident()
    abuse(picture_server, 1000, seed=3, of_media=0.9)
    assert resident() < 1.02 * before


@pytest.mark.slow
def test_five_thousand_mistakes(serve, make_engine):
    client = serve(make_engine(max_sequence=64), body_seconds=5)
    abuse(client, 2500, seed=1)
    assert not client.engine.states
    before = resident()
    abuse(client, 2500, seed=1)  # the same again, so that nothing is new to any cache
    assert resident() < 1.02 * before
