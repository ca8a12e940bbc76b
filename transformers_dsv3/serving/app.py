"""The endpoints: OpenAI's, vLLM's beside them, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from typing import Any

import anyio
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..generation.requests import Features, Output, end_tokens
from ..generation.requests import Request as EngineRequest
from .answers import DONE, ChatChoice, Head, TextChoice, Usage, event
from .calls import Call, Mailroom, engine_failed
from .chat import ChatTemplate, Conversations
from .constraints import GrammarConstraint, Grammars, fork, no_grammars
from .errors import ApiError, refused
from .fields import Fields, kind_of, read_json
from .gates import Gate, Patience, error_response
from .messages import Reads
from .metrics import Metrics
from .pictures import Pictures
from .protocol import Asked, ChatAsked, Limits, chat_asked, completion_asked, token_ids
from .reasoning import BEGIN, END
from .routing import TOKENS_LIMIT, expert_counts, language_model
from .settings import ServerSettings
from .texts import Texts


logger = logging.getLogger(__name__)
PAGE = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing from anywhere else, and nothing within the page that is not in these files but the reader's own pictures
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ROUTING_WAITING = 4


class Service:
    """One model behind HTTP.

    Args:
        engine: of `generation`, with a tokenizer, running.
        settings: names, keys, limits. template: of conversations.
        pictures: reads those of requests, where the model does.
    """

    def __init__(
        self, engine: Any, settings: ServerSettings, template: ChatTemplate, pictures: Pictures | None = None
    ):
        config = engine.model.config
        self.engine, self.settings, self.pictures = engine, settings, pictures
        reads = Reads() if pictures is None else pictures.reads
        self.limits = Limits(config.vocab_size, engine.max_sequence, settings.sampling, reads)
        self.texts = Texts(engine.tokenizer, engine.max_sequence)
        self.conversations = Conversations(
            engine.tokenizer, template, None if pictures is None else pictures.placeholders
        )
        self.metrics = Metrics(settings.model_name, engine)
        self.draining = False
        self.started = int(time.time())
        self.reading = 0
        self.mailroom: Mailroom
        ends = engine.model.generation_config.eos_token_id
        ends = end_tokens(engine.tokenizer.eos_token_id if ends is None else ends)
        try:
            self.grammars: Grammars | None = Grammars(engine.tokenizer, config.vocab_size, ends)
        except ValueError:
            self.grammars = None
        self.end_of_reasoning = engine.tokenizer.get_vocab().get(END)
        self.language_model = language_model(engine.model)
        self.routing_threads = ThreadPoolExecutor(1, thread_name_prefix="routing")
        self.routing_waiting = 0

    def app(self) -> Patience:
        """What uvicorn serves."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/routing", self.routing, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.prometheus),
            *(Route(f"/{name}", self.page) for name in PAGE),
        ]
        middleware = [Middleware(Gate, settings=self.settings, refusal=self.refusal)]
        if self.settings.allow_origins:
            cors = Middleware(
                CORSMiddleware,
                allow_origins=list(self.settings.allow_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Warning", "Retry-After", "X-Request-Id"],
            )
            middleware.insert(0, cors)
        app = Starlette(
            routes=routes,
            middleware=middleware,
            lifespan=self._lifespan,
            exception_handlers={
                ApiError: _said,
                HTTPException: _not_here,
                ClientDisconnect: _gone,
                Exception: _bug,
            },
        )
        return Patience(app, self.settings, self.metrics)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.mailroom = Mailroom(asyncio.get_running_loop(), self.engine)
        watch = asyncio.create_task(self.mailroom.watch())
        try:
            yield
        finally:
            watch.cancel()
            self.texts.threads.shutdown(wait=False, cancel_futures=True)
            self.routing_threads.shutdown(wait=False, cancel_futures=True)
            if self.pictures is not None:
                self.pictures.shutdown()

    def refusal(self) -> ApiError | None:
        """Why no request is taken."""
        if self.engine.failure is not None:
            return engine_failed()
        if self.draining:
            return ApiError(503, "the server is about to end and takes no more requests", headers={"Retry-After": "5"})
        return None

    # What is asked

    async def body(self, request: Request) -> tuple[dict[str, Any], int]:
        """The JSON object of a request, and its bytes."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which pages of other sites cannot send unasked
            raise ApiError(415, f"send `Content-Type: application/json`, not {kind_of(kind)}")
        limit, settings = self.settings.max_body, self.settings
        too_large = ApiError(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})
        length = request.headers.get("content-length", "")
        if length.isdigit() and (len(length) > 15 or int(length) > limit):
            raise too_large
        parts, size = [], 0
        try:
            with anyio.move_on_after(settings.body_seconds) as time_left:
                async for part in request.stream():
                    size += len(part)
                    self.reading += len(part)
                    parts.append(part)
                    if size > limit:
                        raise too_large
                    if self.reading > settings.max_reading:
                        headers = {"Retry-After": "1", "Connection": "close"}
                        raise ApiError(429, "too many large requests arrive at a time", headers=headers)
            if time_left.cancelled_caught:
                seconds = f"the body did not arrive in {settings.body_seconds:g} s"
                raise ApiError(408, seconds, headers={"Connection": "close"})
            return await self.texts.aside(size, read_json, b"".join(parts)), size
        finally:
            self.reading -= size

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a model's name stands for; None for the model itself."""
        if name is None or name == self.settings.model_name:
            return None
        if name in self.settings.adapters:
            return name
        known = ", ".join([self.settings.model_name, *self.settings.adapters])
        raise ApiError(404, f"there is no model {name[:80]!r} here: there is {known}", "model", "model_not_found")

    async def chat(self, request: Request) -> Response:
        values, size = await self.body(request)
        asked = await self.texts.aside(size, chat_asked, values, self.limits)
        adapter = self.adapter(asked.model)
        prompt, tokens, inputs = await self._conversation(asked, size)
        settings = asked.settings
        settings = replace(settings, stop=(*settings.stop, *self.conversations.template.stops))
        settings = self._within(settings, asked, tokens, "messages")
        tokens, features = await self._features(tokens, inputs)
        after = self.end_of_reasoning if prompt.rstrip().endswith(BEGIN) else None
        requests = await self._requests("chatcmpl", asked, [tokens], settings, adapter, after, features)
        tool_choice = asked.tool_choice if asked.tools else None
        choices = [ChatChoice(place, prompt, self.texts, tool_choice) for place in range(asked.n)]
        warnings = []
        if asked.tools and not self.conversations.template.shows_tools:
            warnings.append("the chat template tells the model of no tools")
        head = Head(
            requests[0].request_id.rpartition("-")[0], "chat.completion", asked.model or self.settings.model_name
        )
        return await self._answer(request, asked, head, requests, choices, warnings)

    async def completions(self, request: Request) -> Response:
        values, size = await self.body(request)
        asked = await self.texts.aside(size, completion_asked, values, self.limits)
        adapter = self.adapter(asked.model)
        prompts = []
        for place, prompt in enumerate(asked.prompts):
            param = "prompt" if len(asked.prompts) == 1 else f"prompt[{place}]"
            if isinstance(prompt, str):
                tokens = await self.texts.aside(
                    len(prompt), self.texts.encode, prompt, param, asked.add_special_tokens
                )
            else:
                tokens = prompt
            if not tokens:
                raise refused(param, "is empty: give one token or more")
            prompts.append(tokens)
        settings = asked.settings
        if asked.echo and settings.logprobs is not None:
            settings = replace(settings, prompt_logprobs=settings.logprobs)
        for place, tokens in enumerate(prompts):
            self._within(settings, asked, tokens, "prompt" if len(prompts) == 1 else f"prompt[{place}]")
        requests = await self._requests("cmpl", asked, prompts, settings, adapter)
        choices = []
        for place, engine_request in enumerate(requests):
            given = asked.prompts[place // asked.n]
            echoed = ""
            if asked.echo:
                echoed = given if isinstance(given, str) else self.texts.decode(given)
            choices.append(TextChoice(place, echoed, self.texts, engine_request.prompt, asked.empty))
        head = Head(
            requests[0].request_id.rpartition("-")[0], "text_completion", asked.model or self.settings.model_name
        )
        return await self._answer(request, asked, head, requests, choices, [])

    async def _conversation(self, asked: ChatAsked, size: int) -> tuple[str, tuple[int, ...], dict[str, Any]]:
        """The prompt as text and as tokens, and what the tower takes of its pictures."""
        prompt = await self.texts.aside(size, self.conversations.write, asked)
        if asked.media and self.pictures is not None:
            return prompt, *await self.pictures.prepare(prompt, asked.media)
        return prompt, await self.texts.aside(len(prompt), self.texts.encode, prompt, "messages", False), {}

    async def _features(
        self, tokens: tuple[int, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[int, ...], Features | None]:
        if not inputs or self.pictures is None:
            return tokens, None
        return await self.pictures.features(tokens, inputs)

    def _within(self, settings: Any, asked: Asked, tokens: Sequence[int], param: str) -> Any:
        """Settings whose tokens fit behind a prompt: as many as asked for, or as there is room."""
        room = self.limits.sequence - len(tokens)
        if room < 1:
            raise self.texts.too_long(param, len(tokens))
        if asked.max_tokens is None:
            return replace(settings, max_new_tokens=room, min_new_tokens=min(settings.min_new_tokens, room))
        if asked.max_tokens > room:
            raise refused(
                "max_tokens",
                f"is {asked.max_tokens}: behind a prompt of {len(tokens)} tokens there is room for {room}",
                "context_length_exceeded",
            )
        return settings

    async def _requests(
        self,
        kind: str,
        asked: Asked,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        adapter: str | None,
        after: int | None = None,
        features: Features | None = None,
    ) -> list[EngineRequest]:
        """One request of the engine for each prompt and choice."""
        constraint: GrammarConstraint | None = None
        if asked.constrained is not None:
            if self.grammars is None:
                raise no_grammars(asked.constrained)
            constraint = await self.texts.aside(2**30, self.grammars.constraint, asked.constrained, after)
        name = f"{kind}-{uuid.uuid4().hex}"
        requests: list[EngineRequest] = []
        for tokens in prompts:
            for choice in range(asked.n):
                seed = settings.seed
                requests.append(
                    EngineRequest(
                        request_id=f"{name}-{len(requests)}",
                        prompt=tuple(tokens),
                        settings=settings if seed is None else replace(settings, seed=(seed + choice) % 2**63),
                        priority=asked.priority,
                        cache_salt=asked.cache_salt,
                        adapter=adapter,
                        constraint=None if constraint is None else fork(constraint),
                        features=features,
                    )
                )
        return requests

    # What is answered

    async def _answer(
        self,
        request: Request,
        asked: Asked,
        head: Head,
        requests: list[EngineRequest],
        choices: Sequence[ChatChoice | TextChoice],
        warnings: list[str],
    ) -> Response:
        if asked.ignored:
            warnings = [f"ignored: {', '.join(asked.ignored)}", *warnings]
        headers = {"Warning": f'299 - "{_header_text("; ".join(warnings))}"'} if warnings else {}
        call = Call(self.mailroom, requests, self.settings.request_seconds, self.metrics.observer(len(requests)))
        call.start()
        if asked.stream:
            return EventStream(self._events(call, asked, head, choices), call, headers)
        try:
            return await _unless_gone(request, self._whole(call, asked, head, choices, headers))
        finally:
            call.close()

    async def _whole(
        self, call: Call, asked: Asked, head: Head, choices: Sequence[ChatChoice | TextChoice], headers: dict[str, str]
    ) -> Response:
        usage = Usage()
        async for outputs in call.outputs():
            for place, output in outputs:
                _check(call, place, output)
                usage.add(place // asked.n, output)
                choices[place].add(output)
        return JSONResponse(head.whole([choice.whole() for choice in choices], usage), headers=headers)

    async def _events(
        self, call: Call, asked: Asked, head: Head, choices: Sequence[ChatChoice | TextChoice]
    ) -> AsyncIterator[bytes]:
        usage = Usage()
        more: dict[str, Any] = {"usage": None} if asked.include_usage else {}
        try:
            if isinstance(asked, ChatAsked):
                role = {"role": "assistant", "content": ""}
                for place in range(len(choices)):
                    first = {"index": place, "delta": role, "logprobs": None, "finish_reason": None}
                    yield event(head.chunk([first], **more))
            async for outputs in call.outputs():
                events = []
                for place, output in outputs:
                    _check(call, place, output)
                    usage.add(place // asked.n, output)
                    events += [event(head.chunk([chunk], **more)) for chunk in choices[place].chunks(output)]
                if events:
                    yield b"".join(events)
            if asked.include_usage:
                yield event(head.chunk([], usage=usage.as_dict()))
        except ApiError as error:
            yield event(error.body)
        yield DONE

    # The others

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.adapter(name)
        return JSONResponse(self._model(name))

    def _names(self) -> list[str]:
        return [self.settings.model_name, *self.settings.adapters]

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "transformers-dsv3",
            "root": self.settings.model_name,
            "parent": None if name == self.settings.model_name else self.settings.model_name,
            "max_model_len": self.limits.sequence,
            "input_modalities": ["text", *self.limits.reads.kinds],
        }

    async def _tokens(self, values: dict[str, Any], size: int) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Of a request's `tokens`, `prompt` or `messages`, and what the tower takes of its pictures."""
        fields = Fields(values)
        self.adapter(fields.text("model"))
        if (tokens := token_ids(fields, "tokens", self.limits.vocabulary)) is not None:
            return tokens, {}
        if values.get("messages") is not None:
            asked = chat_asked({"max_tokens": None, **_chat_only(values)}, self.limits)
            _, tokens, inputs = await self._conversation(asked, size)
            return tokens, inputs
        text = fields.need("prompt", fields.text("prompt"))
        special = fields.flag("add_special_tokens", True)
        return await self.texts.aside(max(size, len(text)), self.texts.encode, text, "prompt", special), {}

    async def tokenize(self, request: Request) -> Response:
        values, size = await self.body(request)
        tokens, _ = await self._tokens(values, size)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self.limits.sequence,
            "tokens": list(tokens),
            "token_strs": None,
        }
        if Fields(values).flag("return_token_strs"):
            answer["token_strs"] = [self.texts.token_text(token) for token in tokens]
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        values, size = await self.body(request)
        fields = Fields(values)
        self.adapter(fields.text("model"))
        tokens = fields.need("tokens", token_ids(fields, "tokens", self.limits.vocabulary))
        return JSONResponse({"prompt": await self.texts.aside(size, self.texts.decode, tokens)})

    async def routing(self, request: Request) -> Response:
        """How often each expert of each layer is chosen on a text; of a long one, on its end."""
        values, size = await self.body(request)
        if self.language_model is None or not self.language_model.config.moe_layers:
            raise ApiError(404, "the model has no mixture-of-experts layers", code="no_experts")
        tokens, inputs = await self._tokens(values, size)
        if not tokens:
            raise refused("tokens", "is empty: give one token or more")
        if self.routing_waiting >= ROUTING_WAITING:
            raise ApiError(429, "others wait for their routing already", headers={"Retry-After": "2"})
        self.routing_waiting += 1
        try:
            tokens, features = await self._features(tokens, inputs)
            counted = tokens[-min(TOKENS_LIMIT, self.limits.sequence) :]
            loop = asyncio.get_running_loop()
            layers = await loop.run_in_executor(
                self.routing_threads, expert_counts, self.language_model, counted, features, len(tokens) - len(counted)
            )
        finally:
            self.routing_waiting -= 1
        config = self.language_model.config
        return JSONResponse(
            {
                "object": "routing",
                "tokens": len(counted),
                "experts": config.n_routed_experts,
                "experts_per_token": config.num_experts_per_tok,
                "layers": layers,
            }
        )

    async def health(self, request: Request) -> Response:
        """Whether it works: draining is no illness."""
        if self.engine.failure is not None:
            raise engine_failed()
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether requests are taken."""
        error = self.refusal()
        if error is not None:
            raise error
        return JSONResponse({"status": "ready"})

    async def prometheus(self, request: Request) -> Response:
        text, kind = self.metrics.render()
        return Response(text, media_type=kind)

    async def page(self, request: Request) -> Response:
        name, kind = PAGE[request.url.path.rpartition("/")[2]]
        content = resources.files(__package__).joinpath("page").joinpath(name).read_bytes()
        return Response(content, media_type=kind, headers=PAGE_HEADERS)


class EventStream(EventSourceResponse):
    """Events of one call, which ends with them, however they end."""

    def __init__(self, events: AsyncIterator[bytes], call: Call, headers: dict[str, str]):
        super().__init__(events, headers=headers, sep="\n", ping=15)
        self.call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


def _check(call: Call, place: int, output: Output) -> None:
    """Raises where the engine has given up on a text."""
    if output.finish_reason == "error":
        if call.mailroom.engine.failure is not None:
            raise engine_failed()
        constraint = call.requests[place].constraint
        if isinstance(constraint, GrammarConstraint) and constraint.failure is not None:
            raise refused(constraint.param, f"cannot be followed any further: {constraint.failure}")
        raise ApiError(500, f"the text could not be made: {output.error or 'the engine says no more'}")
    if output.finish_reason == "cancelled":
        raise ApiError(503, "the request was ended by the server", code="cancelled")


async def _unless_gone(request: Request, answer: Any) -> Response:
    """The answer, unless the client goes away before it is done.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def _chat_only(values: dict[str, Any]) -> dict[str, Any]:
    """What says how a conversation is written."""
    names = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    return {name: values[name] for name in names if name in values}


def _header_text(text: str) -> str:
    """What may stand between quotes in a header."""
    told = text.encode("ascii", "backslashreplace").decode()
    told = "".join(letter if letter.isprintable() and letter not in '"\\' else "?" for letter in told)
    return told[:400]


async def _said(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for it, for the metrics: nobody reads it


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server has made a mistake; its log says which"))
