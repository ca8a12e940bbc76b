"""Many clients at a time over a small model: nothing is lost, swapped or left behind."""

import contextlib
import os
import random
import threading
import time

import pytest
import torch

from tests.serving.test_abuse import abuse, resident
from tests.serving.test_limits import wait_for


@pytest.fixture
def make_server(make_model, byte_tokenizer, serve):
    """Function from settings of an engine to a server over a small model, and that model."""
    from transformers_dsv3.generation.engine import Engine
    from transformers_dsv3.generation.settings import EngineSettings

    with contextlib.ExitStack() as stack:

        def make(**settings):
            model = make_model(vocab_size=258, eos_token_id=257, pad_token_id=256, max_position_embeddings=128)
            model.generation_config.eos_token_id = 257
            engine = Engine(model, byte_tokenizer, EngineSettings(**{"page_size": 8, **settings}))
            engine.start()
            stack.callback(engine.stop)
            return serve(engine, model_name="tiny"), model

        yield make


def marked(model, count, lengths=(1, 5, 20, 40), seed=0):
    """Prompts that differ from each other, some with a beginning in common, and how the model continues each alone."""
    draw = random.Random(seed)
    shared = [draw.randrange(256) for _ in range(24)]
    pairs = []
    for number in range(count):
        mark = [draw.randrange(256) for _ in range(draw.choice([2, 9, 30]))]
        prompt = (shared if number % 2 else []) + mark
        length = draw.choice(lengths)
        with torch.inference_mode():
            made = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None)
        pairs.append((prompt, made[0, len(prompt) :].tolist()))
    return pairs


def told(client, prompt, count, **fields):
    """Token ids of a text, by the names that log-probabilities give them."""
    answer = client.complete(prompt, max_tokens=count, temperature=0, ignore_eos=True, logprobs=0, **fields)
    assert answer.status == 200, answer.body
    if fields.get("stream"):
        *events, done = answer.events
        assert done == "[DONE]"
        choices = [choice for event in events for choice in event["choices"]]
        return [name for choice in choices for name in (choice["logprobs"] or {"tokens": []})["tokens"]]
    return answer.json["choices"][0]["logprobs"]["tokens"]


def load(client, pairs, clients, seconds):
    """Clients that ask without a pause, some of which go away; every answer is checked. How many there were."""
    texts, wrong, counts = client.service.texts, [], [0] * clients
    until = time.monotonic() + seconds

    def ask(number):
        draw = random.Random(number)
        try:
            while time.monotonic() < until or counts[number] == 0:
                prompt, expected = draw.choice(pairs)
                if draw.random() < 0.1:  # goes away
                    with client.raw() as connection:
                        body = b'{"prompt": "abc", "max_tokens": 100, "stream": true, "ignore_eos": true}'
                        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                        connection.recv(64)
                    continue
                stream = draw.random() < 0.5
                got = told(client, prompt, len(expected), stream=stream)
                if got != [texts.token_text(token) for token in expected]:
                    wrong.append((prompt, expected, got))
                counts[number] += 1
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    wait_for(lambda: not client.engine.statistics().running and not client.engine.statistics().waiting)
    return sum(counts)


def test_every_client_gets_its_own_answer(make_server):
    client, model = make_server(cache_bytes=2**22, max_running=8)
    assert load(client, marked(model, 12), clients=12, seconds=1) >= 12
    statistics = client.engine.statistics()
    assert statistics.cached_tokens > 0 and statistics.pages_used == 0


def test_a_pool_of_pages_that_does_not_suffice(make_server):
    """One sequence of the longest and a little more fits: texts take pages from each other and still are right."""
    bytes_per_token = 2 * (16 + 8) * 4
    client, model = make_server(cache_bytes=(128 + 40) * bytes_per_token, max_running=8)
    assert load(client, marked(model, 12, lengths=(70,)), clients=12, seconds=1) >= 12
    statistics = client.engine.statistics()
    assert statistics.preemptions > 0 and statistics.pages_used == 0


@pytest.mark.slow
def test_two_thousand_mistakes_on_a_model(make_server):
    client, model = make_server(cache_bytes=2**22, max_running=8)
    pairs = marked(model, 6)
    abuse(client, 1250, seed=2)
    assert client.engine.statistics().pages_used == 0
    before = resident()
    abuse(client, 1250, seed=2)  # the same again, so that nothing is new to any cache
    assert resident() < 1.02 * before
    assert load(client, pairs, clients=4, seconds=1) >= 4


@pytest.mark.slow
def test_mixed_load(make_server):
    """As long as DSV3_LOAD_MINUTES says, a third of one unless given; mistakes are sent beside it."""
    seconds = 60 * float(os.environ.get("DSV3_LOAD_MINUTES", 1 / 3))
    client, model = make_server(cache_bytes=2**20, max_running=16)
    pairs = marked(model, 40)
    abuse_for(client, seconds / 8)
    load(client, pairs, clients=24, seconds=seconds / 8)
    before = resident()
    beside = threading.Thread(target=lambda: abuse_for(client, seconds / 2))
    beside.start()
    count = load(client, pairs, clients=24, seconds=3 * seconds / 4)
    beside.join()
    assert resident() < 1.05 * before
    assert client.engine.statistics().pages_used == 0
    print(f"{count} answers, none lost, none of another's")


def abuse_for(client, seconds):
    from tests.serving.mistakes import Mistakes

    mistakes = Mistakes(client, 3, 258, 128)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        mistakes.send()
