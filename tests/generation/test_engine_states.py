"""The engine's steps in any order with what its clients do, whatever fails: pages are held by who runs, each request
ends once, and what was not disturbed has the text that it has alone.
"""

import pytest
import torch
from clients import Answer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from transformers_dsv3.generation.engine import Engine
from transformers_dsv3.generation.requests import Request, SamplingSettings
from transformers_dsv3.generation.settings import EngineSettings


PROMPTS = [tuple(range(place, place + length)) for place, length in ((0, 3), (0, 9), (0, 14), (40, 1), (60, 22))]
LONGEST = 12
FAILURES = ("allow", "accept", "finished", "deliver")


class FailsAt:
    """A grammar that allows all, and a client, one of whose calls raises at a token."""

    def __init__(self, what, token):
        self.what, self.left = what, token

    def _call(self, name):
        if name == self.what:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError(name)

    def allow(self, scores):
        self._call("allow")

    def accept(self, token):
        self._call("accept")

    def finished(self):
        self._call("finished")
        return False


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(eos_token_id=None)


@pytest.fixture(scope="module")
def texts(model):
    """What `generate` continues each prompt with."""
    options = {"max_new_tokens": LONGEST, "do_sample": False}
    return {prompt: model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS}


def test_engine_in_any_order(model, texts):
    class Steps(RuleBasedStateMachine):
        requests = Bundle("requests")

        def __init__(self):
            super().__init__()
            limits = {"page_size": 4, "max_batch_tokens": 24, "max_running": 4, "max_sequence": 36}
            self.engine = Engine(model, settings=EngineSettings(cache_bytes=2 * 4 * 24 * 4 * 12, **limits))
            self.engine._takes_requests = True  # its steps are made here, not by a thread
            self.asked = {}

        @rule(
            target=requests,
            prompt=st.sampled_from(PROMPTS),
            new=st.integers(1, LONGEST),
            failure=st.none() | st.tuples(st.sampled_from(FAILURES), st.integers(0, 5)),
            priority=st.integers(-1, 1),
        )
        def submit(self, prompt, new, failure, priority):
            name, answer = str(len(self.asked)), Answer()
            fails = FailsAt(*failure) if failure else None

            def deliver(output):
                if fails is not None and output.finish_reason is None:
                    fails._call("deliver")
                answer(output)

            sampling = SamplingSettings(max_new_tokens=new, temperature=0)
            self.engine.submit(Request(name, prompt, sampling, priority, constraint=fails), deliver)
            self.asked[name] = (prompt, new, failure, answer)
            return name

        @rule(name=requests)
        def cancel(self, name):
            self.engine.cancel(name)

        @rule(count=st.integers(1, 6))
        def step(self, count):
            for _ in range(count):
                if self.engine._known:
                    self.engine._await_work()
                    self.engine._make_step()

        @invariant()
        def pages_are_held_by_who_runs(self):
            scheduler, known = self.engine.scheduler, self.engine._known
            held = {page for sequence in scheduler.running for page in sequence.table.pages}
            assert scheduler.pool.used == len(held)
            assert len(scheduler.running) + self.engine._waiting() == len(known)
            for name, (prompt, new, failure, answer) in self.asked.items():
                last = answer.outputs[-1] if answer.outputs else None
                reason = last and last.finish_reason
                assert answer.tokens == texts[prompt][: len(answer.tokens)]
                if name in known:
                    assert reason is None
                elif reason == "length":
                    assert len(answer.tokens) == new
                elif reason == "error":
                    assert last.error == failure[0]
                else:  # its client is gone, or was cancelled
                    assert reason == "cancelled" or failure[0] == "deliver"

        def teardown(self):
            for _ in range(500):
                self.step(1)
            self.pages_are_held_by_who_runs()
            assert not self.engine._known and self.engine.statistics().pages_used == 0
            assert sum(self.engine.statistics().finished.values()) == len(self.asked)

    run_state_machine_as_test(Steps, settings=settings(max_examples=25, stateful_step_count=25, deadline=None))
