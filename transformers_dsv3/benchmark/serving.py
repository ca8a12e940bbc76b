"""Many clients at a time: the engine's dynamic batches beside static ones, on the same requests.

A client sends its next request when it has the answer to the last (a closed loop), so as many requests are under way
as there are clients. Static batches are what a server without an engine does: it takes the requests that wait, in the
order in which they came, as many as its batch size says, pads prompts on the left and generates until the longest text
ends.
"""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..generation.engine import Engine
from ..generation.requests import Output, Request, SamplingSettings
from ..generation.settings import EngineSettings
from .rounds import Turn, interleave, spread
from .settings import LONGEST_OF_MEAN, BenchSettings


ENGINE = "engine"
# Lengths are lognormal: this is the deviation of their logarithm, and how short they are
SIGMA, SHORTEST = 0.8, 4
# Requests of a turn for each client, and at least
REQUESTS_A_CLIENT, FEWEST_REQUESTS = 2, 16


@dataclass(frozen=True)
class Asked:
    """One request: a prompt, and how many tokens are wanted."""

    prompt: tuple[int, ...]
    tokens: int


@dataclass
class Answered:
    """When an answer was asked for, and when its tokens were there, in seconds of `time.perf_counter`."""

    asked_at: float
    tokens: int
    times: list[float] = field(default_factory=list)

    @property
    def a_token(self) -> float:
        """Seconds from asking to the end, for each token of the answer."""
        return (self.times[-1] - self.asked_at) / self.tokens


def make_requests(count: int, means: Sequence[int], vocabulary: int, seed: int) -> list[Asked]:
    """Random prompts of lognormal lengths, with lognormal numbers of tokens that are wanted."""
    generator = random.Random(seed)
    prompt_mean, output_mean = means

    def length(mean: int) -> int:
        drawn = mean * generator.lognormvariate(-(SIGMA**2) / 2, SIGMA)
        return min(max(round(drawn), min(SHORTEST, mean)), LONGEST_OF_MEAN * mean)

    return [
        Asked(tuple(generator.randrange(2, vocabulary) for _ in range(length(prompt_mean))), length(output_mean))
        for _ in range(count)
    ]


class Server(Protocol):
    """Answers requests of many threads."""

    def answer(self, asked: Asked) -> Answered: ...

    def close(self) -> None: ...


class EngineServer:
    """Dynamic batches, by the engine."""

    def __init__(self, model: PreTrainedModel, settings: EngineSettings):
        self.engine = Engine(model, settings=settings)
        self.engine.start()
        self._count = 0
        self._lock = threading.Lock()

    def answer(self, asked: Asked) -> Answered:
        with self._lock:
            self._count += 1
            name = str(self._count)
        ended = threading.Event()
        answered = Answered(time.perf_counter(), asked.tokens)
        failure: list[str] = []

        def take(output: Output) -> None:
            answered.times += [time.perf_counter()] * len(output.tokens)
            if output.finish_reason is not None:
                if output.finish_reason != "length":
                    failure.append(output.error or output.finish_reason)
                ended.set()

        settings = SamplingSettings(max_new_tokens=asked.tokens, temperature=0, ignore_eos=True)
        self.engine.submit(Request(name, asked.prompt, settings), take)
        ended.wait()
        if failure:
            raise RuntimeError(failure[0])
        return answered

    def close(self) -> None:
        self.engine.stop()


class StaticServer:
    """Static batches, by `generate`."""

    def __init__(self, model: PreTrainedModel, batch: int):
        self._model, self._batch = model, batch
        self._waiting: queue.SimpleQueue[tuple[Asked, Answered, threading.Event] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def answer(self, asked: Asked) -> Answered:
        answered, ended = Answered(time.perf_counter(), asked.tokens), threading.Event()
        self._waiting.put((asked, answered, ended))
        ended.wait()
        if self._failure is not None:
            raise self._failure
        return answered

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._batch and not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    self._waiting.put(None)
                    break
                batch.append(following)
            try:
                if self._failure is None:
                    self._generate([asked for asked, _, _ in batch])
            except Exception as error:
                self._failure = error
            now = time.perf_counter()
            for _, answered, ended in batch:
                answered.times.append(now)
                ended.set()

    def _generate(self, batch: Sequence[Asked]) -> None:
        longest = max(len(asked.prompt) for asked in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, asked in enumerate(batch):
            ids[row, longest - len(asked.prompt) :] = torch.tensor(asked.prompt)
            mask[row, longest - len(asked.prompt) :] = 1
        device = self._model.device
        self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(asked.tokens for asked in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


def closed_loop(server: Server, requests: Sequence[Asked], clients: int) -> tuple[float, list[Answered]]:
    """Seconds until all requests were answered, by so many clients, and the answers."""
    todo = iter(requests)
    lock = threading.Lock()
    answers: list[Answered] = []
    failures: list[BaseException] = []

    def client() -> None:
        while not failures:
            with lock:
                asked = next(todo, None)
            if asked is None:
                return
            try:
                answers.append(server.answer(asked))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - started, answers


def figures_of(seconds: float, answers: Sequence[Answered]) -> dict[str, Any]:
    """What a run of the closed loop tells: times are in seconds."""
    found: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(answers),
        "tokens": sum(answered.tokens for answered in answers),
        "latency_a_token": _percentiles([answered.a_token for answered in answers]),
    }
    found["tokens_per_second"] = found["tokens"] / seconds
    streamed = [answered for answered in answers if len(answered.times) > 1]
    if streamed:
        found["first_token"] = _percentiles([each.times[0] - each.asked_at for each in streamed])
        found["between_tokens"] = _percentiles(
            [(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in streamed]
        )
    return found


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("p50", "p90", "p99"), values[0])
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def measure_serving(
    settings: BenchSettings, model: PreTrainedModel, dtype: str, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """One entry of the results for each number of clients.

    Static batches of all sizes take the first turn; the best of them, by latency, goes on beside the engine.
    """
    for clients in sorted(settings.clients):
        yield _measure(settings, model, dtype, clients, say)


def _measure(
    settings: BenchSettings, model: PreTrainedModel, dtype: str, clients: int, say: Callable[[str], None]
) -> dict[str, Any]:
    count = max(FEWEST_REQUESTS, REQUESTS_A_CLIENT * clients)
    requests = make_requests(count, settings.lengths, model.config.vocab_size, settings.seed)
    entry: dict[str, Any] = {
        "what": "serving",
        "title": f"{clients} client{'s' if clients > 1 else ''}, {dtype}",
        "clients": clients,
        "dtype": dtype,
        "requests": count,
        "contenders": {},
        "failed": {},
    }
    static = [f"static {batch}" for batch in sorted({min(batch, clients) for batch in settings.static_batches})]
    taken: dict[str, list[dict[str, Any]]] = {}

    def server(name: str) -> Server:
        if name == ENGINE:
            return EngineServer(model, EngineSettings(max_waiting=2**31))
        return StaticServer(model, int(name.split()[1]))

    def turn(name: str) -> Turn:
        say(f"{entry['title']}: {name}")
        serving = server(name)
        try:
            figures = figures_of(*closed_loop(serving, requests, clients))
        finally:
            serving.close()
        taken.setdefault(name, []).append(figures)
        return Turn(figures["latency_a_token"]["p50"])

    def nothing(*arguments: Any) -> None:
        pass

    closed_loop_of_few(server(ENGINE), requests)
    turns, failed = interleave([ENGINE, *static], turn, 1, nothing, nothing)
    best = min((name for name in static if name in turns), key=lambda name: turns[name][0].seconds, default=None)
    going_on = [name for name in (ENGINE, best) if name in turns]
    if settings.rounds > 1:
        _, later = interleave(going_on, turn, settings.rounds - 1, nothing, nothing)
        failed |= later
    entry["failed"] = failed
    entry["best_static"] = best
    for name, runs in taken.items():
        if name not in failed:
            entry["contenders"][name] = _together(runs)
    return entry


def closed_loop_of_few(server: Server, requests: Sequence[Asked]) -> None:
    """Warms a server up with two requests."""
    try:
        closed_loop(server, requests[:2], 2)
    finally:
        server.close()


def _together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several runs, with what each gave."""
    seconds = [run["latency_a_token"]["p50"] for run in runs]
    found: dict[str, Any] = {"seconds": seconds, **spread(seconds), "runs": list(runs)}
    found["tokens_per_second"] = statistics.median(run["tokens_per_second"] for run in runs)
    for what in ("latency_a_token", "first_token", "between_tokens"):
        if what in runs[0]:
            found[what] = {
                share: statistics.median(run[what][share] for run in runs) for share in ("p50", "p90", "p99")
            }
    return found
