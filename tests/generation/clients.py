"""What the tests of this folder share: an engine's clients, who wait for all of an answer."""

import threading

from transformers_dsv3.generation.requests import Request, SamplingSettings


class Answer:
    """What came back for one request."""

    def __init__(self):
        self.outputs, self._ended = [], threading.Event()

    def __call__(self, output):
        assert not self._ended.is_set(), "something was told behind the end"
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._ended.set()

    def wait(self):
        assert self._ended.wait(120), "no end was told"
        return self

    @property
    def last(self):
        return self.outputs[-1]

    @property
    def tokens(self):
        return [token for output in self.outputs for token in output.tokens]

    @property
    def text(self):
        return "".join(output.text for output in self.outputs)


def ask(engine, prompt, name="a", adapter=None, constraint=None, cache_salt="", priority=0, features=None, **fields):
    """Submits a request; its answer is waited for by whoever wants it."""
    fields = {"max_new_tokens": 8, "temperature": 0, **fields}
    answer = Answer()
    settings = SamplingSettings(**fields)
    request = Request(name, tuple(prompt), settings, priority, cache_salt, adapter, constraint, features)
    engine.submit(request, answer)
    return answer
