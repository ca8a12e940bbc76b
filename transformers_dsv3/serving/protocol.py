"""What `/v1/chat/completions` and `/v1/completions` are asked, as OpenAI and vLLM name it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..generation.requests import RequestError, SamplingSettings
from .errors import refused
from .fields import Fields, kind_of
from .messages import Media, Reads, read_messages


# They change nothing of the answer here, and clients send them unasked
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
)
# As these are called by the engine, and by clients
NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "adapter": "model"}
CHOICES_LIMIT = 128
STOPS_LIMIT = 32


@dataclass(frozen=True)
class Constrained:
    """What an answer has to follow. `kind` is "json", "regex", "lark"; `param` the field that asked for it."""

    kind: str
    grammar: str | Mapping[str, Any]
    param: str


@dataclass(frozen=True)
class Asked:
    """What both endpoints take.

    Attributes:
        model: its name, or None for the one that is served.
        settings: without the number of tokens where none is given, which then depends on the prompt.
        max_tokens: None where none is given.
        n: choices for each prompt.
        stream, include_usage: events as text comes, and a last one with the usage.
        constrained: a grammar.
        priority, cache_salt: as the engine's.
        ignored: fields that were sent and are not known.
    """

    model: str | None
    settings: SamplingSettings
    max_tokens: int | None
    n: int
    stream: bool
    include_usage: bool
    constrained: Constrained | None
    priority: int
    cache_salt: str
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema, `given` the whole as it was sent."""

    name: str
    parameters: Mapping[str, Any]
    given: Mapping[str, Any]


@dataclass(frozen=True)
class ChatAsked(Asked):
    """
    Attributes:
        messages: as templates take them: `content` is one string or None, or where there are pictures a list of parts.
        media: pictures and videos, in the order of their places.
        tools: none where the model may not call any.
        tool_choice: "auto", "required", or the name of the one that it has to call behind "function:".
        template_arguments: for the template beside these.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    media: tuple[Media, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True)
class CompletionAsked(Asked):
    """
    Attributes:
        prompts: texts, or token ids.
        echo: the prompt is part of the answer. empty: nothing but it.
    """

    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False
    empty: bool = False
    add_special_tokens: bool = True


@dataclass(frozen=True)
class Limits:
    """Of the model that is served.

    Attributes:
        vocabulary: tokens. sequence: of prompt and text together.
        defaults: settings that the checkpoint's `generation_config.json` gives in place of OpenAI's.
        reads: what it reads beside text.
    """

    vocabulary: int
    sequence: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reads: Reads = Reads()


def chat_asked(values: Mapping[str, Any], limits: Limits) -> ChatAsked:
    """Raises `ApiError` for what cannot be done as it is asked."""
    fields = Fields(values)
    messages, media = read_messages(fields, limits.reads)
    tools = _tools(fields)
    choice = _tool_choice(fields, tools)
    if choice == "none":
        tools = ()
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, 20)
    if top is not None and not wanted:
        raise refused("top_logprobs", "needs `logprobs` to be true")
    constrained = _constrained(fields)
    if tools and choice not in ("auto", "none"):
        if constrained is not None:
            raise refused(constrained.param, "cannot be asked for together with a call by `tool_choice`")
        constrained = Constrained("json", _call_schema(tools, choice), "tool_choice")
    template = fields.object("chat_template_kwargs")
    add, keep_on = fields.flag("add_generation_prompt", True), fields.flag("continue_final_message")
    if keep_on and add:
        if fields.values.get("add_generation_prompt") is True:
            raise refused("continue_final_message", "cannot be true where `add_generation_prompt` is")
        add = False
    older, max_tokens = fields.whole("max_tokens", 1), fields.whole("max_completion_tokens", 1)
    return ChatAsked(
        **_common(fields, limits, (top or 0) if wanted else None, constrained, max_tokens or older),
        messages=messages,
        media=media,
        tools=tools,
        tool_choice=choice,
        template_arguments={} if template is None else dict(template.values),
        add_generation_prompt=add,
        continue_final_message=keep_on,
        ignored=_ignored(fields),
    )


def completion_asked(values: Mapping[str, Any], limits: Limits) -> CompletionAsked:
    """Raises `ApiError` for what cannot be done as it is asked."""
    fields = Fields(values)
    prompts = _prompts(fields, limits.vocabulary)
    echo = fields.flag("echo")
    logprobs = fields.whole("logprobs", 0, 20)
    if fields.text("suffix"):
        raise refused("suffix", "is not served: the model continues text, and fills no gap")
    # Nothing but the prompt is asked for: how likely a text is. A token is made all the same, and not told
    max_tokens = fields.whole("max_tokens", 0 if echo else 1)
    empty = max_tokens == 0
    most = 16 if max_tokens is None else max(max_tokens, 1)
    common = _common(fields, limits, logprobs, _constrained(fields), most)
    best_of = fields.whole("best_of", 1)
    if best_of is not None and best_of != common["n"]:
        raise refused("best_of", f"has to be `n`, {common['n']}: as many texts are made as are told")
    if len(prompts) * common["n"] > CHOICES_LIMIT * 2:
        raise refused("prompt", f"and `n` ask for {len(prompts) * common['n']} texts, above {CHOICES_LIMIT * 2}")
    return CompletionAsked(
        **common,
        prompts=prompts,
        echo=echo,
        empty=empty,
        add_special_tokens=fields.flag("add_special_tokens", True),
        ignored=_ignored(fields),
    )


def _ignored(fields: Fields) -> tuple[str, ...]:
    return tuple(name for name in fields.unknown() if name not in WITHOUT_EFFECT)


def _common(
    fields: Fields, limits: Limits, logprobs: int | None, constrained: Constrained | None, max_tokens: int | None
) -> dict[str, Any]:
    """The fields of `Asked` but `ignored`."""
    least = fields.whole("min_tokens", 0)
    if least is not None and max_tokens is not None and least > max_tokens:
        raise refused("min_tokens", f"is {least}, above the {max_tokens} of `max_tokens`")
    top_k = fields.whole("top_k")
    given = {
        "min_new_tokens": least,
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "seed": fields.whole("seed"),
        "logit_bias": _logit_bias(fields, limits.vocabulary),
        "stop": _stop(fields),
        "stop_token_ids": _tokens(fields.array("stop_token_ids"), "stop_token_ids", limits.vocabulary),
        "ignore_eos": fields.flag("ignore_eos"),
        "logprobs": logprobs,
    }
    if top_k is not None:
        # -1 is vLLM's for all; more than there are is all too, and would not fit into a tensor
        given["top_k"] = 0 if top_k == -1 else min(top_k, limits.vocabulary)
    values = {**limits.defaults, **{name: value for name, value in given.items() if value is not None}}
    settings = sampling_settings(max_new_tokens=max_tokens or limits.sequence, **values)
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise refused("stream_options", "needs `stream` to be true")
    n = fields.whole("n", 1, CHOICES_LIMIT)
    return {
        "model": fields.text("model"),
        "settings": settings,
        "max_tokens": max_tokens,
        "n": 1 if n is None else n,
        "stream": stream,
        "include_usage": options is not None and options.flag("include_usage"),
        "constrained": constrained,
        "priority": fields.whole("priority", -(2**31), 2**31) or 0,
        "cache_salt": fields.text("cache_salt") or "",
    }


def sampling_settings(**values: Any) -> SamplingSettings:
    """With errors by the names that clients use."""
    try:
        return SamplingSettings(**values)
    except RequestError as error:
        raise refused(NAMES.get(error.field, error.field), error.reason) from None


def _stop(fields: Fields) -> tuple[str, ...] | None:
    value = fields.any("stop")
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise refused("stop", f"has to be a string or a list of strings, none empty, not {kind_of(value)}")
    if len(texts) > STOPS_LIMIT:
        raise refused("stop", f"has {len(texts)} strings, above {STOPS_LIMIT}")
    return tuple(texts)


def _tokens(values: list[Any] | None, param: str, vocabulary: int) -> tuple[int, ...] | None:
    if values is None:
        return None
    for place, token in enumerate(values):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise refused(
                f"{param}[{place}]", f"has to be a token id, a whole number below {vocabulary}, not {kind_of(token)}"
            )
    return tuple(values)


def _logit_bias(fields: Fields, vocabulary: int) -> dict[int, float] | None:
    given = fields.object("logit_bias")
    if given is None:
        return None
    biases = {}
    for name in given.values:
        if not (name.isascii() and name.isdigit()) or len(name) > 12 or int(name) >= vocabulary:
            raise refused("logit_bias", f"maps token ids below {vocabulary} to numbers: {kind_of(name)} is none")
        bias = given.number(name)
        if bias is not None:
            biases[int(name)] = bias
    return biases


def token_ids(fields: Fields, name: str, vocabulary: int) -> tuple[int, ...] | None:
    """A list of token ids, each of which the model has."""
    return _tokens(fields.array(name), name, vocabulary)


def _prompts(fields: Fields, vocabulary: int) -> tuple[str | tuple[int, ...], ...]:
    value = fields.need("prompt", fields.any("prompt"))
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise refused("prompt", f"has to be a string, token ids, or a list of these, not {kind_of(value)}")
    if not isinstance(value[0], (str, list)):
        return (_tokens(value, "prompt", vocabulary) or (),)
    prompts: list[str | tuple[int, ...]] = []
    for place, prompt in enumerate(value):
        if isinstance(prompt, list):
            prompts.append(_tokens(prompt, f"prompt[{place}]", vocabulary) or ())
        elif isinstance(prompt, str):
            prompts.append(prompt)
        else:
            raise refused(f"prompt[{place}]", f"has to be a string or token ids, not {kind_of(prompt)}")
    return tuple(prompts)


def _tools(fields: Fields) -> tuple[Tool, ...]:
    tools: list[Tool] = []
    for place, given in enumerate(fields.array("tools") or []):
        tool = Fields(given, f"tools[{place}]")
        tool.need("type", tool.choice("type", "function"))
        function = tool.need("function", tool.object("function"))
        name = function.need("name", function.text("name"))
        if not name or any(tool.name == name for tool in tools):
            raise refused(function.name("name"), f"is {'empty' if not name else 'that of another tool'}")
        function.text("description")
        parameters = function.object("parameters")
        tools.append(Tool(name, {"type": "object"} if parameters is None else parameters.values, given))
    return tuple(tools)


def _tool_choice(fields: Fields, tools: tuple[Tool, ...]) -> str:
    value = fields.any("tool_choice")
    if value is None:
        return "auto"
    if isinstance(value, dict):
        choice = Fields(value, "tool_choice")
        choice.need("type", choice.choice("type", "function"))
        function = choice.need("function", choice.object("function"))
        name = function.need("name", function.text("name"))
        if name not in [tool.name for tool in tools]:
            raise refused(function.name("name"), f"names none of `tools`: {kind_of(name)}")
        return f"function:{name}"
    if value not in ("none", "auto", "required"):
        raise refused("tool_choice", f"has to be none, auto, required or a function, not {kind_of(value)}")
    if value == "required" and not tools:
        raise refused("tool_choice", "is required, and `tools` has none")
    return value


def _call_schema(tools: tuple[Tool, ...], choice: str) -> Mapping[str, Any]:
    """The schema of a call's arguments, or of a list of calls."""
    kind, _, name = choice.partition(":")
    if kind == "function":
        return next(tool.parameters for tool in tools if tool.name == name)
    call = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": tool.parameters},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "array", "minItems": 1, "items": {"anyOf": call}}


def _constrained(fields: Fields) -> Constrained | None:
    found = [one for one in (_response_format(fields), _structured(fields)) if one is not None]
    if len(found) > 1:
        raise refused(found[1].param, "and `response_format` cannot both be asked for")
    return found[0] if found else None


def _response_format(fields: Fields) -> Constrained | None:
    wanted = fields.object("response_format")
    if wanted is None:
        return None
    kind = wanted.need("type", wanted.choice("type", "text", "json_object", "json_schema", "regex", "grammar"))
    match kind:
        case "text":
            return None
        case "json_object":
            return Constrained("json", {"type": "object"}, "response_format")
        case "json_schema":
            schema = wanted.need("json_schema", wanted.object("json_schema"))
            given = schema.need("schema", schema.object("schema"))
            return Constrained("json", given.values, "response_format.json_schema.schema")
        case "regex":
            name = "pattern" if "pattern" in wanted.values else "regex"
            return Constrained("regex", wanted.need(name, wanted.text(name)), f"response_format.{name}")
    return Constrained("lark", wanted.need("grammar", wanted.text("grammar")), "response_format.grammar")


def _structured(fields: Fields) -> Constrained | None:
    wanted = fields.object("structured_outputs")
    if wanted is None:
        return None
    found = []
    schema = wanted.any("json")
    if schema is not None:
        if not isinstance(schema, (dict, str)):
            raise refused("structured_outputs.json", f"has to be a schema, not {kind_of(schema)}")
        found.append(Constrained("json", schema, "structured_outputs.json"))
    if (regex := wanted.text("regex")) is not None:
        found.append(Constrained("regex", regex, "structured_outputs.regex"))
    if (choices := wanted.array("choice")) is not None:
        if not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise refused("structured_outputs.choice", "has to hold strings, none empty")
        found.append(Constrained("lark", _one_of(choices), "structured_outputs.choice"))
    if (grammar := wanted.text("grammar")) is not None:
        found.append(Constrained("lark", grammar, "structured_outputs.grammar"))
    if wanted.flag("json_object"):
        found.append(Constrained("json", {"type": "object"}, "structured_outputs.json_object"))
    if len(found) != 1:
        raise refused("structured_outputs", "has to have one of json, regex, choice, grammar and json_object")
    return found[0]


def _one_of(choices: list[str]) -> str:
    """A grammar of these strings; JSON writes strings as Lark does."""
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
