"""The engine as Transformers' manager of continuous batching, for `generate_batch`, `transformers serve` and TRL.

They call the members of its `ContinuousBatchingManager`, which sizes its pages for keys and values of heads and gives
all requests the sampling settings of the first. What is public of those is here, and nothing else: no tensor
parallelism, no offloading, no pause.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from transformers.generation import GenerationConfig, logits_process
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ..models.dsv3.paged_dsv3 import PagedLatents
from .engine import Engine, EngineStopped
from .memory import free_bytes
from .pictures import with_pictures
from .requests import Features, Output, Request, RequestError, SamplingSettings, end_tokens
from .settings import EngineSettings


logger = logging.getLogger(__name__)
# What `generate` makes of settings that requests have too
_UNDERSTOOD = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
)
_OF_A_REQUEST = frozenset(field.name for field in fields(SamplingSettings)) - {"max_new_tokens", "stop"}


class ContinuousBatching:
    """What `model.init_continuous_batching()` gives.

    Args:
        model: a `DeepseekV3ForCausalLM`; put into evaluation mode.
        generation_config: settings of requests that bring none of their own.
        batching: Transformers' settings of continuous batching: those of memory, of a step's size, `seed`,
            `return_logprobs`, `allow_block_sharing` and `max_queue_size` count.
        workload: numbers and lengths of requests that are expected, to give them no more memory than they need.

    Raises:
        ValueError: for settings that an engine cannot follow.
    """

    def __init__(
        self, model: Any, generation_config: GenerationConfig, batching: ContinuousBatchingConfig, workload: Any
    ):
        self.model, self.generation_config, self.continuous_batching_config = (
            model.eval(),
            generation_config,
            batching,
        )
        self.num_return_sequences = generation_config.num_return_sequences or 1
        self._settings = _sampling_settings(model, generation_config, batching)
        self._engine_settings = _engine_settings(model, batching, workload)
        self.joined: Any = None  # the model with a tower around `model`, where there is one
        self._engine: Engine | None = None
        self.warmed_up = True  # nothing is compiled or recorded
        self._changed = threading.Condition()
        self._results: deque[GenerationOutput] = deque()
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], None], asyncio.AbstractEventLoop]] = {}
        self._counter = self._added = 0

    def warmup(self) -> None:
        """Does nothing: there is nothing to be compiled or recorded."""

    @property
    def background_thread_status(self) -> Any:
        """With what ended the engine's thread as `fatal_error`, None where nothing did."""
        return SimpleNamespace(fatal_error=self._engine.failure if self._engine is not None else None)

    @property
    def batch_processor(self) -> Any:
        """With the engine's `scheduler`; None before the start."""
        return None if self._engine is None else SimpleNamespace(scheduler=self._engine.scheduler)

    def is_running(self) -> bool:
        """Whether the engine's thread lives."""
        return self._engine is not None and self._engine.is_running

    def start(self) -> None:
        """Starts the engine. What it knew of texts is forgotten, since weights may have changed."""
        if self._engine is None:
            self._engine = Engine(self.model.eval(), settings=self._engine_settings)
        self._engine.start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Takes no more requests, finishes those that there are, and ends the engine's thread.

        Args:
            block: wait for the end.
            timeout: seconds after which requests that are not finished are given up.
            keep_for_next_session: keep the manager on the model, for the next `init_continuous_batching`.
            hard_stop: give up requests that are not finished at once.
        """
        engine = self._engine
        if engine is None:
            return
        ending = threading.Thread(target=engine.stop if hard_stop else lambda: engine.drain(timeout), daemon=True)
        ending.start()
        if block:
            ending.join()
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self
        elif block:
            self._engine = None  # and its memory

    def destroy(self) -> None:
        """Ends the engine, if it still runs."""
        self.stop(hard_stop=True)

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        pictures: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> str:
        """Adds a request, which fails with an error of its own if it cannot be served.

        Args:
            input_ids: the prompt.
            request_id: made up unless given.
            max_new_tokens: no more than fit; the generation config's unless given, and without one as many as fit.
            streaming: a result after every token, not only at the end.
            record_timestamps: note when each token came.
            eos_token_id: ends of sequence; the generation config's unless given, -1 for none.
            pictures: of a model that reads them, what its processor gives beside `input_ids`, by name; they go through
                the tower now.
            settings: of this request alone, any of [`SamplingSettings`].

        Returns:
            Its id.

        Raises:
            RequestError: the id is that of a request that is being served.
        """
        if request_id is None:
            request_id = self._new_ids(1)[0]
        prompt = tuple(int(token) for token in input_ids)
        features: Features | None = None
        refusal: RequestError | None = None
        if pictures:
            try:
                if self.joined is None:
                    raise RequestError("pictures", "need a model with a tower, and this one reads text alone")
                prompt, features = with_pictures(self.joined, prompt, pictures)
            except RequestError as error:
                refusal = error
        children = [f"{request_id}__child#{place}" for place in range(self.num_return_sequences - 1)]
        for name in (request_id, *children):
            result = GenerationOutput(name, list(prompt), timestamps=[] if record_timestamps else None)
            try:
                if refusal is not None:
                    raise refusal
                request = self._request(name, prompt, max_new_tokens, eos_token_id, settings, features)
                if self._engine is None:
                    raise EngineStopped("The manager was not started.")
                self._engine.submit(request, partial(self._take, result, streaming))
            except (RequestError, EngineStopped, RuntimeError) as error:
                if isinstance(error, RequestError) and error.field == "request_id":
                    raise  # as a result it would go to who asked by this name before
                result.error, result.status = str(error), RequestStatus.FAILED
                self._deliver(result)
        return request_id

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        pictures: Sequence[Mapping[str, Any] | None] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Adds a request for each prompt; their ids, in the order of the prompts. `pictures` has those of each."""
        names = self._new_ids(len(inputs))
        for name, prompt, own in zip(names, inputs, pictures or [None] * len(inputs), strict=True):
            self.add_request(prompt, name, max_new_tokens, streaming, record_timestamps, pictures=own, **settings)
        return names

    def cancel_request(self, request_id: str) -> None:
        """Ends a request, if it is not finished."""
        if self._engine is not None:
            self._engine.cancel(request_id)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next result that no handler takes, of one request or of any; None where there is none in time.

        Args:
            timeout: seconds; without one until there is a result, or the engine has ended.
        """

        def place() -> int | None:
            return next((i for i, each in enumerate(self._results) if request_id in (None, each.request_id)), None)

        with self._changed:
            self._changed.wait_for(lambda: place() is not None or not self.is_running(), timeout)
            found = place()
            if found is None:
                return None
            result = self._results[found]
            del self._results[found]
            return result

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, as long as the engine runs."""
        while self.is_running() or self._results:
            if (result := self.get_result(timeout=0.1)) is not None:
                yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Results of one request, up to its end."""
        while self.is_running() or self._results:
            if (result := self.get_result(request_id, timeout=0.1)) is not None:
                yield result
                if result.is_finished():
                    return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Has a request's results called back in the running event loop, those that are there already first."""
        loop = asyncio.get_running_loop()
        with self._changed:
            early = [result for result in self._results if result.request_id == request_id]
            self._results = deque(result for result in self._results if result.request_id != request_id)
            if not any(result.is_finished() for result in early):
                self._handlers[request_id] = callback, loop
            for result in early:
                loop.call_soon_threadsafe(callback, result)

    def _new_ids(self, count: int) -> list[str]:
        with self._changed:
            self._counter += count
            return [f"req_{number}" for number in range(self._counter - count, self._counter)]

    def _request(
        self,
        name: str,
        prompt: tuple[int, ...],
        max_new_tokens: int | None,
        eos_token_id: int | Sequence[int] | None,
        own: dict[str, Any],
        features: Features | None,
    ) -> Request:
        for field in own:
            if field not in _OF_A_REQUEST:
                raise RequestError(field, f"is none of a request's settings: {', '.join(sorted(_OF_A_REQUEST))}")
        config, longest = self.generation_config, self._engine.max_sequence if self._engine is not None else 2**31
        new = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if new is None:
            new = longest if config.max_length is None else config.max_length - len(prompt)
        # `generate` goes on behind the longest position, with a warning; who asks for more than fits gets what fits
        if new > longest - len(prompt) > 0:
            new = longest - len(prompt)
        settings = replace(self._settings, max_new_tokens=new, **own)
        if (seed := settings.seed) is not None and "seed" not in own:
            # One seed for all, as the config has it, would draw the same for the same prompt
            settings = replace(settings, seed=seed + self._added)
            self._added += 1
        if eos_token_id is not None:
            settings = replace(settings, stop_token_ids=_of_the_vocabulary(eos_token_id))
        salt = "" if self.continuous_batching_config.allow_block_sharing else name
        return Request(name, prompt, settings, cache_salt=salt, features=features)

    def _take(self, result: GenerationOutput, streaming: bool, output: Output) -> None:
        """Adds what came to a request's result, and delivers it where that is due."""
        now = time.perf_counter()
        if result.lifespan[0] < 0:
            result.lifespan = (now, -1)
        result.status = RequestStatus.DECODING
        result.generated_tokens += output.tokens
        if self.continuous_batching_config.return_logprobs:
            result.logprobs += [each.logprob for each in output.logprobs or ()]
        if result.timestamps is not None:
            result.timestamps += [now] * len(output.tokens)
        if output.finish_reason is not None:
            result.lifespan = (result.lifespan[0], now)
            failed = output.finish_reason == "error"
            result.status = RequestStatus.FAILED if failed else RequestStatus.FINISHED
            result.error = output.error
        if result.is_finished():
            self._deliver(result)
        elif streaming:
            self._deliver(replace(result, generated_tokens=list(result.generated_tokens)))

    def _deliver(self, result: GenerationOutput) -> None:
        with self._changed:
            handler = self._handlers.get(result.request_id)
            if handler is None:
                self._results.append(result)
                self._changed.notify_all()
                return
            if result.is_finished():
                del self._handlers[result.request_id]
            callback, loop = handler
            loop.call_soon_threadsafe(callback, result)


def _sampling_settings(model: Any, config: GenerationConfig, batching: ContinuousBatchingConfig) -> SamplingSettings:
    """What a generation config asks of each request, but how long it may be.

    Raises:
        ValueError: for what it asks and no request can have.
    """
    if (config.num_beams or 1) > 1:
        raise ValueError("`num_beams` cannot go with continuous batching: each request is continued by one token.")
    if config.stop_strings:
        raise ValueError("`stop_strings` need a tokenizer, which continuous batching is not given.")
    others = [type(each).__name__ for each in model._get_logits_processor(config) if not isinstance(each, _UNDERSTOOD)]
    if others:
        message = f"Continuous batching has nothing for what the generation config asks: {', '.join(others)}"
        if not batching.drop_unsupported_processors:
            raise ValueError(f"{message}.")
        logger.warning("%s. It is left out.", message)
    ends = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    sampled = bool(config.do_sample)

    def chosen(name: str, neutral: Any) -> Any:
        value = getattr(config, name, None)
        return neutral if value is None else value

    return SamplingSettings(
        max_new_tokens=2**31,
        min_new_tokens=chosen("min_new_tokens", 0),
        temperature=float(chosen("temperature", 1.0)) if sampled else 0.0,
        top_k=chosen("top_k", 0) if sampled else 0,
        top_p=float(chosen("top_p", 1.0)) if sampled else 1.0,
        min_p=float(chosen("min_p", 0.0)) if sampled else 0.0,
        repetition_penalty=float(chosen("repetition_penalty", 1.0)),
        seed=batching.seed,
        ignore_eos=True,  # those of the config are meant, not the model's
        stop_token_ids=_of_the_vocabulary(ends),
        logprobs=0 if batching.return_logprobs else None,
    )


def _of_the_vocabulary(ends: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ends of sequence without -1, which stands for none."""
    return tuple(token for token in end_tokens(ends) if token >= 0)


def _engine_settings(model: Any, batching: ContinuousBatchingConfig, workload: Any) -> EngineSettings:
    """Memory and sizes of steps."""
    settings = EngineSettings(max_waiting=batching.max_queue_size or 2**31)
    running = batching.max_requests_per_batch or settings.max_running
    tokens = batching.max_batch_tokens or max(settings.max_batch_tokens, 4 * running)
    running = max(1, min(running, tokens // 2))
    one = PagedLatents(model, 1, settings.page_size)
    memory = None
    if batching.max_memory_percent is not None:
        memory = int(batching.max_memory_percent * free_bytes(one.latent.device))
    if batching.num_blocks is not None:
        # Of a size that has had two names
        size = getattr(batching, "page_size", None) or batching.block_size
        memory = -(-batching.num_blocks * size // settings.page_size) * one.bytes_per_page
    elif workload is not None and workload.num_requests and workload.max_generated_length:
        longest = workload.max_prompt_length + workload.max_generated_length
        pages = min(workload.num_requests, running) * -(-longest // settings.page_size)
        memory = min(pages * one.bytes_per_page, 2**62 if memory is None else memory)
    return replace(settings, cache_bytes=memory, max_running=running, max_batch_tokens=max(tokens, 2))
