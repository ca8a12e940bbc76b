"""An engine without a model for tests of the server: it repeats prompts, and fails, hangs or fills up on demand."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

from transformers_dsv3.generation.requests import Output, QueueFull, RequestError, TokenLogprobs


@dataclass
class Statistics:
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 1000
    preemptions: int = 0


@dataclass
class State:
    request: object
    deliver: object
    left: deque = field(default_factory=deque)
    made: int = 0
    text: str = ""


class EchoEngine:
    """Answers a prompt with its own tokens, over and over, until `max_new_tokens`, one a step.

    Args:
        tokenizer: of one token a byte, say. step: seconds of a step. max_waiting: requests at a time.
    """

    def __init__(self, tokenizer, step=0.0, max_sequence=256, max_waiting=512, vocabulary=None):
        self.tokenizer, self.step, self.max_sequence, self.max_waiting = tokenizer, step, max_sequence, max_waiting
        config = SimpleNamespace(vocab_size=vocabulary or len(tokenizer), max_position_embeddings=max_sequence)
        generation = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self.model = SimpleNamespace(config=config, generation_config=generation, modules=lambda: iter(()))
        self.failure = None
        self.held = threading.Event()
        self.held.set()
        self.seen = []
        self.cancelled = []
        self.states = {}
        self.lock = threading.Lock()
        self.stopping = False
        self.fail_next_step = None
        self.bad_requests = set()

    def start(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        self.stopping = True
        self.held.set()
        self.thread.join()

    def drain(self, timeout):
        until = time.monotonic() + timeout
        while self.states and time.monotonic() < until:
            time.sleep(0.01)

    def submit(self, request, deliver):
        if self.failure is not None:
            raise RuntimeError("the engine has ended") from self.failure
        settings = request.settings
        if len(request.prompt) + settings.max_new_tokens > self.max_sequence:
            raise RequestError("max_new_tokens", f"and the prompt are more than {self.max_sequence} tokens")
        with self.lock:
            if len(self.states) >= self.max_waiting:
                raise QueueFull(len(self.states), 1.6)
            assert request.request_id not in self.states
            self.seen.append(request)
            self.states[request.request_id] = State(request, deliver, deque(request.prompt))

    def cancel(self, request_id):
        with self.lock:
            state = self.states.pop(request_id, None)
            if state is not None:
                self.cancelled.append(request_id)

    def statistics(self):
        return Statistics(running=len(self.states), pages_used=len(self.states))

    def _run(self):
        while not self.stopping:
            self.held.wait()
            if self.fail_next_step is not None:
                self.failure = self.fail_next_step
                return
            with self.lock:
                states = list(self.states.values())
            for state in states:
                self._advance(state)
            time.sleep(self.step if states else 0.001)

    def _advance(self, state):
        request, settings = state.request, state.request.settings
        first = state.made == 0
        if request.request_id in self.bad_requests or request.cache_salt == "make it fail":
            self._end(state, Output(request.request_id, finish_reason="error", error="its logits are not finite"))
            return
        token = state.left[0]
        state.left.rotate(-1)
        if request.constraint is not None:
            token = self._constrained(state, token)
            if token is None:
                return
        state.made += 1
        text = self.tokenizer.decode([token], skip_special_tokens=True)
        state.text += text
        reason, stop = None, None
        ends = () if settings.ignore_eos else (self.tokenizer.eos_token_id,)
        if state.made >= settings.min_new_tokens:
            found = [string for string in settings.stop if string in state.text]
            if token in ends or token in settings.stop_token_ids or found:
                reason = "stop"
                stop = found[0] if found else (token if token in settings.stop_token_ids else None)
                text = "" if found else text
        if reason is None and state.made >= settings.max_new_tokens:
            reason = "length"
        places = None
        if settings.logprobs is not None:
            top = tuple((other, -1.0 - other / 1000) for other in range(settings.logprobs))
            places = (TokenLogprobs(token, -0.5, top),)
        prompt_places = None
        if first and settings.prompt_logprobs is not None:
            rest = [TokenLogprobs(one, -0.25, ((one, -0.25),)) for one in request.prompt[1:]]
            prompt_places = (None, *rest)
        output = Output(
            request.request_id, (token,), text, places, prompt_places, reason, stop, None, len(request.prompt), 0
        )
        if reason is None:
            with self.lock:
                if request.request_id not in self.states:
                    return
            state.deliver(output)
        else:
            self._end(state, output)

    def _constrained(self, state, token):
        import torch

        request = state.request
        try:
            if request.constraint.finished():
                token = self.tokenizer.eos_token_id
            else:
                scores = torch.zeros(self.model.config.vocab_size)
                request.constraint.allow(scores)
                allowed = (scores == 0).nonzero().flatten().tolist()
                # What can end it comes first, then digits and ends of strings, so that texts end
                preferred = [one for one in self._endings() if one in set(allowed)]
                token = (preferred or allowed)[0]
                if token != self.tokenizer.eos_token_id:
                    request.constraint.accept(token)
        except ValueError as error:
            self._end(state, Output(request.request_id, finish_reason="error", error=str(error)))
            return None
        return token

    def _endings(self):
        return [self.tokenizer.eos_token_id, *(self.tokenizer(letter)["input_ids"][0] for letter in '}]",1:{')]

    def _end(self, state, output):
        with self.lock:
            if self.states.pop(state.request.request_id, None) is None:
                return
        state.deliver(output)
