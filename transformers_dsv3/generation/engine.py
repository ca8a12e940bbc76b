"""Many requests at a time on one model: a thread that makes one step after another for all that run."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.dsv3.paged_dsv3 import PagedLatents, RaggedBatch, forward_pages
from .adapters import AdapterError, Adapters
from .memory import free_bytes
from .pages import PagePool
from .requests import Deliver, Features, FinishReason, Output, QueueFull, Request, RequestError, end_tokens
from .sampling import Drawn, draw, token_logprobs
from .scheduler import Chunk, Limits, Scheduler, Step
from .served import Served
from .settings import EngineSettings
from .text_stream import decoder_of


logger = logging.getLogger(__name__)
# Steps that failed altogether, one after another, before the engine takes itself for broken
_MOST_FAILURES = 16
# Tokens of prompts that a step may hold beside texts that are continued, whatever they cost
_FEWEST_PREFILLED = 64
# Of the memory that is free, on a CPU, where other programs live too, and on a GPU
_CPU_SHARE, _GPU_SHARE = 0.25, 0.8


class EngineStopped(RuntimeError):
    """The engine takes no requests: it was not started, or it ends, or it has failed."""


@dataclass
class EngineStatistics:
    """What an engine does and has done, for `/metrics`. Counts are of its whole life.

    Attributes:
        running, waiting: requests at the moment.
        pages_total, pages_used, pages_cached: of the pool; those that requests hold, and those that are kept for who
            begins with the same tokens.
        prompt_tokens, cached_tokens: of requests that began; how many of those were found in pages.
        generated_tokens: that were delivered.
        finished: requests by `finish_reason`.
        preemptions: how often a request's pages were taken for others.
        steps, step_seconds: how many steps there were, and how long they took together.
        failed_steps: steps in which nothing could be computed.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict)
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    failed_steps: int = 0


class Engine:
    """Continues the texts of many requests at a time, on pages of latents.

    What a request asks stays its own: settings, seed, grammar, and errors. In fp32 its text does not depend on which
    others run beside it.

    Args:
        model: a `DeepseekV3ForCausalLM`, or one with a tower around it; put into evaluation mode.
        tokenizer: for texts and stop strings; without one only tokens are told.
        settings: what the engine may take of memory and time.
        adapters: folders of PEFT adapters by name, which requests choose by `adapter`.

    Attributes:
        model: the language model. tokenizer, settings: as given.
        max_sequence: tokens that a prompt and its text may have together.
        scheduler: what runs and waits, to be looked at: the engine's thread changes it.
        failure: what ended the engine's thread, if something did.

    Raises:
        ValueError: for a model that does not run over pages, or memory in which not one page fits.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        settings: EngineSettings | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ):
        self._adapters = Adapters(model.eval(), adapters or {})  # of the whole model, by whose names they were saved
        model = getattr(model, "causal_lm", model)
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings or EngineSettings()
        self.failure: BaseException | None = None
        self._decode = None if tokenizer is None else decoder_of(tokenizer)
        self._ends = _ends_of(model)
        longest = self.settings.max_sequence or model.config.max_position_embeddings
        longest = min(longest, model.config.max_position_embeddings)
        self._pages = _make_pages(model, self.settings, longest)
        limits = Limits(
            batch_tokens=self.settings.max_batch_tokens,
            running=self.settings.max_running,
            fewest_prefilled=min(_FEWEST_PREFILLED, self.settings.max_batch_tokens - self.settings.max_running),
            step_seconds=self.settings.target_tpot,
            sequence_tokens=longest,
        )
        self._pool = PagePool(self._pages.pages, self.settings.page_size)
        self.scheduler = Scheduler(self._pool, limits)
        self.max_sequence = self.scheduler.longest
        self._changed = threading.Condition()
        # Guarded by `_changed`
        self._known: dict[str, Served] = {}
        self._arrived: deque[Served] = deque()
        self._cancelled: list[Served] = []
        self._takes_requests = self._stops = False
        # Of the engine's thread
        self._thread: threading.Thread | None = None
        self._failures_in_a_row = 0
        self._totals = EngineStatistics(pages_total=self._pages.pages)
        self._finished: Counter[FinishReason] = Counter()
        self._began, self._seconds_a_request = time.perf_counter(), 1.0

    @property
    def is_running(self) -> bool:
        """Whether its thread lives."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Starts the engine's thread. Prefixes that were computed before are forgotten: weights may have changed."""
        if self.is_running:
            return
        self._pool.forget()
        self.failure, self._stops, self._takes_requests = None, False, True
        self._failures_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="dsv3-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the engine's thread after the step that it is in. Requests that are not finished are cancelled."""
        with self._changed:
            self._takes_requests, self._stops = False, True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, waits until those that it has are finished, and stops.

        Args:
            timeout: seconds after which those that are left are cancelled.

        Returns:
            Whether all were finished.
        """
        with self._changed:
            self._takes_requests = False
            finished = self._changed.wait_for(lambda: not self._known or not self.is_running, timeout)
            finished = finished and not self._known
        self.stop()
        return finished

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Takes a request, whose outputs are delivered from the engine's thread.

        Raises:
            RequestError: for what can never be served, naming the field.
            QueueFull: where too many requests wait.
            EngineStopped: where the engine takes none; its cause is `failure`.
        """
        self._check(request)
        served = Served(request, deliver, self._ends, self._decode)
        with self._changed:
            if self.failure is not None:
                raise EngineStopped("The engine has failed.") from self.failure
            if not self._takes_requests:
                raise EngineStopped("The engine takes no requests.")
            if request.request_id in self._known:
                raise RequestError("request_id", f"is that of a request that is being served: {request.request_id!r}")
            waiting = self._waiting()
            if waiting >= self.settings.max_waiting + max(0, self.settings.max_running - len(self.scheduler.running)):
                raise QueueFull(waiting, max(1.0, self._seconds_a_request))
            self._known[request.request_id] = served
            self._arrived.append(served)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Ends a request, if it is not finished yet; its last output says so."""
        with self._changed:
            if (served := self._known.get(request_id)) is not None and served not in self._cancelled:
                self._cancelled.append(served)
                self._changed.notify_all()

    def statistics(self) -> EngineStatistics:
        """What the engine does and has done."""
        scheduler, pool, totals = self.scheduler, self._pool, self._totals
        return EngineStatistics(
            running=len(scheduler.running),
            waiting=self._waiting(),
            pages_total=pool.total,
            pages_used=pool.used,
            pages_cached=pool.cached,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=totals.generated_tokens,
            finished=dict(self._finished),
            preemptions=scheduler.preemptions,
            steps=totals.steps,
            step_seconds=totals.step_seconds,
            failed_steps=totals.failed_steps,
        )

    def _waiting(self) -> int:
        return len(self._arrived) + len(self.scheduler.waiting)

    def _check(self, request: Request) -> None:
        """Refuses what can never be served."""
        vocabulary, asked = self.model.config.vocab_size, request.settings
        for name, tokens in (
            ("prompt", request.prompt),
            ("stop_token_ids", asked.stop_token_ids),
            ("logit_bias", asked.logit_bias),
        ):
            if not all(isinstance(token, int) and 0 <= token < vocabulary for token in tokens):
                wrong = next(token for token in tokens if not isinstance(token, int) or not 0 <= token < vocabulary)
                raise RequestError(name, f"has {wrong!r}, which is no token: they go from 0 to {vocabulary - 1}")
        if asked.stop and self._decode is None:
            raise RequestError("stop", "needs a tokenizer, and the engine has none")
        if request.features is not None and (reason := _features_refusal(self.model, request.features)) is not None:
            raise RequestError("features", reason)
        if request.adapter is not None and request.adapter not in self._adapters.names:
            known = ", ".join(self._adapters.names) or "there are none"
            raise RequestError("adapter", f"is {request.adapter!r}, which is none of: {known}")
        self.scheduler.check(request)

    def _run(self) -> None:
        try:
            while self._await_work():
                self._make_step()
        except BaseException as error:
            logger.exception("The engine has failed.")
            self.failure = error
        finally:
            with self._changed:
                self._takes_requests = False
                left = list(self._known.values())
            reason: FinishReason = "cancelled" if self.failure is None else "error"
            told = None if self.failure is None else f"The engine has failed: {self.failure}"
            for served in left:
                try:
                    self._finish(served, served.end(reason, told))
                except Exception:  # of the scheduler, say, where it was what failed: the others are told all the same
                    logger.exception("Request %r could not be ended.", served.request.request_id)
                    self._tell(served, served.end(reason, told))
            with self._changed:
                self._arrived.clear()
                self._cancelled.clear()
                self._changed.notify_all()

    def _await_work(self) -> bool:
        """Waits for something to do, and takes what has come in; False where the thread is to end."""
        scheduler = self.scheduler
        with self._changed:
            self._changed.wait_for(
                lambda: self._stops or self._arrived or self._cancelled or scheduler.running or scheduler.waiting
            )
            if self._stops:
                return False
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, []
            for served in arrived:
                served.sequence = scheduler.add(served.request)
        for served in cancelled:
            if self._known.get(served.request.request_id) is served:  # not finished meanwhile
                self._finish(served, served.end("cancelled"))
        return True

    def _make_step(self) -> None:
        step = self.scheduler.plan()
        if not step.chunks:
            return
        started = time.perf_counter()
        for source, target in step.copies:
            self._pages.copy_page(source, target)
        computed: list[tuple[Chunk, Served, Drawn | Exception | None]] = []
        with torch.no_grad():
            for adapter, chunks in self._by_adapter(step).items():
                try:
                    with self._adapters.active(adapter):
                        computed += self._compute(chunks)
                except AdapterError as error:
                    logger.exception("Requests of an adapter could not be computed.")
                    computed += [(*each, error) for each in chunks]
        seconds = time.perf_counter() - started
        self._totals.steps += 1
        self._totals.step_seconds += seconds
        self.scheduler.done(step, seconds)
        for chunk, served, result in computed:
            if isinstance(result, Exception):
                self._finish(served, served.end("error", str(result) or type(result).__name__), sound=False)
            elif result is not None:
                self.scheduler.drew(chunk.sequence, result.token)
                self._totals.generated_tokens += 1
                try:
                    output = served.take(result)
                except Exception as error:  # a grammar and a tokenizer are other libraries'
                    logger.exception("A token of request %r could not be told.", served.request.request_id)
                    output = served.end("error", str(error) or type(error).__name__)
                if output.finish_reason is not None:
                    self._finish(served, output)
                elif not self._tell(served, output):
                    self._finish(served, None)
        failed = all(isinstance(result, Exception) and not isinstance(result, AdapterError) for *_, result in computed)
        self._totals.failed_steps += failed
        self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0
        if self._failures_in_a_row >= _MOST_FAILURES:
            raise next(result for _, _, result in computed if isinstance(result, Exception))

    def _by_adapter(self, step: Step) -> dict[str | None, list[tuple[Chunk, Served]]]:
        groups: dict[str | None, list[tuple[Chunk, Served]]] = {}
        for chunk in step.chunks:
            request = chunk.sequence.request
            groups.setdefault(request.adapter, []).append((chunk, self._known[request.request_id]))
        return groups

    def _compute(self, chunks: list[tuple[Chunk, Served]]) -> list[tuple[Chunk, Served, Drawn | Exception | None]]:
        """What was drawn for each chunk, why nothing could be, or None where its prompt goes on."""
        try:
            return self._forward(chunks)
        except Exception as error:
            if len(chunks) == 1:
                logger.exception("A request could not be computed.")
                return [(*chunks[0], error)]
        # One of them is at fault, which is found by computing each for itself; pages are written as they were
        return [result for chunk in chunks for result in self._compute([chunk])]

    def _forward(self, chunks: list[tuple[Chunk, Served]]) -> list[tuple[Chunk, Served, Drawn | Exception | None]]:
        tokens: list[int] = []
        wanted: list[int] = []
        drawing: list[int] = []  # places among those that are wanted
        of_prompts: list[tuple[Served, range, int]] = []
        pictured: list[int] = []  # places in `tokens`
        features: list[torch.Tensor] = []
        for chunk, served in chunks:
            first, start, end = len(tokens), chunk.start, chunk.start + chunk.count
            tokens += chunk.sequence.ids(start, end)
            if (found := served.request.features) is not None:
                rows = slice(bisect_left(found.places, start), bisect_left(found.places, end))
                pictured += [first + place - start for place in found.places[rows]]
                features.append(found.rows[rows])
            if places := served.wanted_of_prompt(start, chunk.count):
                of_prompts.append((served, places, len(wanted)))
                wanted += [first + place - start for place in places]
            if chunk.draws:
                drawing.append(len(wanted))
                wanted.append(len(tokens) - 1)
        tables = [chunk.sequence.table.pages for chunk, _ in chunks if chunk.sequence.table is not None]
        longest = max(map(len, tables))
        device = self._pages.latent.device
        batch = RaggedBatch(
            tokens_T=torch.tensor(tokens, device=device),
            starts_B=[chunk.start for chunk, _ in chunks],
            counts_B=[chunk.count for chunk, _ in chunks],
            tables_BP=torch.tensor([table + [0] * (longest - len(table)) for table in tables]),
            wanted_W=torch.tensor(wanted, dtype=torch.int64, device=device),
            places_F=torch.tensor(pictured, device=device) if pictured else None,
            features_FD=torch.cat(features) if pictured else None,
        )
        logits_WV = forward_pages(self.model, self._pages, batch).logits
        for served, places, first in of_prompts:
            following = served.request.prompt[places.start + 1 : places.stop + 1]
            top = served.request.settings.prompt_logprobs or 0
            rows = logits_WV[first : first + len(places)]
            served.tell_of_prompt(places.start, token_logprobs(rows, following, top))
        rows_WV = logits_WV if len(drawing) == len(wanted) else logits_WV[drawing]
        drawn = iter(draw(rows_WV, [served.sampler for chunk, served in chunks if chunk.draws]))
        return [(chunk, served, next(drawn) if chunk.draws else None) for chunk, served in chunks]

    def _tell(self, served: Served, output: Output) -> bool:
        """Delivers an output; whether there is still somebody to deliver to."""
        try:
            served.deliver(output)
        except Exception:
            logger.exception("An output of request %r could not be delivered.", output.request_id)
            return False
        return True

    def _finish(self, served: Served, output: Output | None, sound: bool = True) -> None:
        """Gives a request's pages back and delivers its last output, None where nobody takes it."""
        if served.sequence is not None:
            self.scheduler.remove(served.sequence, keep=sound)
        with self._changed:
            del self._known[served.request.request_id]
            if not self._known:
                self._changed.notify_all()
        self._finished[(output and output.finish_reason) or "cancelled"] += 1
        now = time.perf_counter()
        self._seconds_a_request += 0.1 * (min(now - self._began, 60.0) - self._seconds_a_request)
        self._began = now
        if output is not None:
            self._tell(served, output)


def _ends_of(model: Any) -> tuple[int, ...]:
    """The model's own ends of sequence."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return end_tokens(model.config.eos_token_id if ends is None else ends)


def _features_refusal(model: Any, features: Features) -> str | None:
    """Why they cannot stand in place of embeddings."""
    like = model.model.norm.weight
    shape, dtype = (len(features.places), model.config.hidden_size), like.dtype
    rows = features.rows
    if tuple(rows.shape) != shape or rows.dtype != dtype or rows.device != like.device:
        found = f"{rows.dtype} of shape {tuple(rows.shape)} on {rows.device}"
        return f"are {found}, not {dtype} of shape {shape} on {like.device}"
    return None


def _make_pages(model: Any, settings: EngineSettings, longest: int) -> PagedLatents:
    """The memory of the pool."""
    one = PagedLatents(model, 1, settings.page_size)
    device = one.latent.device
    given = settings.cache_bytes
    if given is None:
        given = int((_CPU_SHARE if device.type == "cpu" else _GPU_SHARE) * free_bytes(device))
    most = settings.max_running * -(-longest // settings.page_size)
    pages = min(given // one.bytes_per_page, most)
    if pages < 1:
        raise ValueError(
            f"`cache_bytes` is {given:,}, and a page of {settings.page_size} tokens takes {one.bytes_per_page:,}"
        )
    return PagedLatents(model, pages, settings.page_size)
