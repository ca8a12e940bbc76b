"""Mixed load for a while: no answer is lost or another's, and everything is given back."""

import os
import random
import threading
import time

import pytest
import torch
from clients import ask

from transformers_dsv3.generation.engine import Engine
from transformers_dsv3.generation.requests import QueueFull
from transformers_dsv3.generation.settings import EngineSettings


SECONDS = float(os.environ.get("DSV3_LOAD_SECONDS", 60))  # 1800 for half an hour


@pytest.mark.slow
def test_no_answer_is_lost_or_swapped(make_model, byte_tokenizer):
    """Clients of all kinds on a pool too small for them; each greedy answer is the one that its prompt has alone."""
    model = make_model(vocab_size=258, eos_token_id=None)
    random_ = random.Random(0)
    shared = [random_.randrange(256) for _ in range(48)]
    prompts = []
    for place in range(40):
        own = [place, 255 - place, *(random_.randrange(256) for _ in range(random_.randint(1, 60)))]
        prompts.append(shared[: random_.choice([0, 16, 48])] + own)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected.append(model.generate(ids, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist())
    settings = EngineSettings(
        cache_bytes=60 * 4 * 2 * 4 * 24, page_size=4, max_batch_tokens=48, max_running=12, max_waiting=20
    )
    engine = Engine(model, byte_tokenizer, settings)
    engine.start()
    end = time.monotonic() + SECONDS
    counts = dict.fromkeys(("answered", "cancelled", "refused", "sampled"), 0)
    wrong = []

    def client(number):
        random_, asked = random.Random(number), 0
        while time.monotonic() < end and not wrong:
            asked += 1
            place, kind = random_.randrange(len(prompts)), random_.random()
            fields = {"max_new_tokens": random_.randint(1, 24), "priority": random_.randint(-1, 1)}
            if kind < 0.2:
                fields |= {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}
            elif kind < 0.3:
                fields |= {"prompt_logprobs": 1, "cache_salt": "tenant"}
            try:
                answer = ask(engine, prompts[place], f"{number} {asked}", **fields)
            except QueueFull:
                counts["refused"] += 1
                time.sleep(0.01)
                continue
            if 0.3 < kind < 0.45:
                engine.cancel(f"{number} {asked}")
            finish = answer.wait().last.finish_reason
            tokens = answer.tokens
            if finish == "cancelled":
                counts["cancelled"] += 1
            elif kind < 0.2:
                counts["sampled"] += 1
            else:
                counts["answered"] += 1
            greedy = kind >= 0.2 and tokens != expected[place][: len(tokens)]
            if greedy or (finish != "cancelled" and len(tokens) != fields["max_new_tokens"]):
                wrong.append((place, fields, finish, tokens, expected[place]))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(40)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    statistics = engine.statistics()
    engine.stop()
    assert not wrong, wrong[0]
    assert min(counts.values()) > 0 and statistics.preemptions > 0, (counts, statistics)
    assert statistics.pages_used == statistics.running == statistics.waiting == 0 and not engine._known
    assert sum(statistics.finished.values()) == counts["answered"] + counts["sampled"] + counts["cancelled"]
