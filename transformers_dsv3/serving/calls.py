"""Requests on their way to the engine's thread, and its outputs on their way back to the server's loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ..generation.requests import Output, QueueFull, Request, RequestError
from .errors import ApiError, refused
from .protocol import NAMES


class Mailroom:
    """Takes the engine's outputs from its thread into the loop, all of a step by one call.

    Args:
        loop: of the server. engine: of `generation`, running.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Any):
        self.loop, self.engine = loop, engine
        self.letters: deque[tuple[Call, int, Output]] = deque()
        self.called = False
        self.calls: set[Call] = set()

    def post(self, call: Call, choice: int, output: Output) -> None:
        """From the engine's thread."""
        self.letters.append((call, choice, output))
        if not self.called:
            self.called = True
            try:
                self.loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

    def _hand_out(self) -> None:
        self.called = False
        while self.letters:
            call, choice, output = self.letters.popleft()
            call.receive(choice, output)

    async def watch(self, seconds: float = 0.25) -> None:
        """Ends calls whose engine has died: nothing would come to them any more."""
        while True:
            await asyncio.sleep(seconds)
            if self.engine.failure is not None:
                for call in list(self.calls):
                    call.stop(engine_failed())


def engine_failed() -> ApiError:
    return ApiError(503, "the engine has failed; this server has to be started again")


class Call:
    """The texts that one HTTP request has asked for.

    Iterating gives the outputs in the order they came, with the number of the text each belongs to.

    Args:
        mailroom: of the server. requests: one a text. seconds: in which all of it has to be done, or None.
        observe: told of each output as it comes, for metrics.
    """

    def __init__(
        self,
        mailroom: Mailroom,
        requests: Sequence[Request],
        seconds: float | None,
        observe: Callable[[int, Output, float], None],
    ):
        self.mailroom, self.requests, self.seconds, self.observe = mailroom, requests, seconds, observe
        self.arrived: list[tuple[int, Output]] = []
        self.news = asyncio.Event()
        self.open = set(range(len(requests)))
        self.error: ApiError | None = None
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Hands the requests to the engine: all of them or none.

        Raises:
            ApiError: 400 for a request that can never be served, 429 where too many wait, 503 where the engine died.
        """
        engine = self.mailroom.engine
        if engine.failure is not None:
            raise engine_failed()
        self.mailroom.calls.add(self)
        try:
            for choice, request in enumerate(self.requests):
                engine.submit(request, lambda output, choice=choice: self.mailroom.post(self, choice, output))
        except BaseException as error:
            self.close()
            match error:
                case RequestError():
                    raise refused(NAMES.get(error.field, error.field), error.reason) from None
                case QueueFull():
                    seconds = str(max(1, round(error.retry_after)))
                    raise ApiError(429, str(error), headers={"Retry-After": seconds}) from None
                case Exception() if engine.failure is not None:
                    raise engine_failed() from None
                case RuntimeError():  # it has been stopped
                    raise ApiError(503, str(error)) from None
            raise
        if self.seconds is not None:
            late = ApiError(504, f"the request was not done in {self.seconds:g} s", code="timeout")
            self.timer = self.mailroom.loop.call_later(self.seconds, self.stop, late)

    def receive(self, choice: int, output: Output) -> None:
        """In the loop."""
        if choice not in self.open:
            return
        if output.finish_reason is not None:
            self.open.discard(choice)
        self.observe(choice, output, time.monotonic())
        self.arrived.append((choice, output))
        self.news.set()

    def stop(self, error: ApiError) -> None:
        """Ends it with an error, whatever has come so far."""
        self.error = self.error or error
        self.news.set()

    async def outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """All that has come since the last, until every text has ended.

        Raises:
            ApiError: time is out, the server ends, the engine died, or it gave up on one of the texts.
        """
        while True:
            if self.error is not None:
                raise self.error
            arrived, self.arrived = self.arrived, []
            if arrived:
                yield arrived
                continue
            if not self.open:
                return
            self.news.clear()
            await self.news.wait()

    def close(self) -> None:
        """Ends what still runs; has to be called, however the request ended."""
        if self.timer is not None:
            self.timer.cancel()
        self.mailroom.calls.discard(self)
        for choice in self.open:
            self.mailroom.engine.cancel(self.requests[choice].request_id)
        self.open.clear()
