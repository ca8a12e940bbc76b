"""Requests, field by field: what is taken, and what is said of what is not."""

import json

import pytest

from transformers_dsv3.serving.errors import ApiError
from transformers_dsv3.serving.fields import DEPTH_LIMIT, Fields, read_json
from transformers_dsv3.serving.protocol import Constrained, Limits, chat_asked, completion_asked


LIMITS = Limits(vocabulary=258, sequence=512)
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def chat(**fields):
    return chat_asked({"messages": MESSAGES, **fields}, LIMITS)


def complete(**fields):
    return completion_asked({"prompt": "a", **fields}, LIMITS)


def test_fields_are_taken_by_the_names_of_openai_and_vllm():
    asked = complete(
        max_tokens=7.0,
        min_tokens=2,
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=1,
        logit_bias={"5": -100, "6": None},
        seed=3,
        stop="x",
        stop_token_ids=[4],
        ignore_eos=True,
        logprobs=5,
        n=2,
        priority=-3,
        cache_salt="tenant",
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    settings = asked.settings
    assert (settings.max_new_tokens, settings.min_new_tokens, settings.temperature, settings.top_k) == (7, 2, 0.5, 0)
    assert (settings.top_p, settings.min_p, settings.repetition_penalty) == (0.9, 0.1, 1.1)
    assert (settings.presence_penalty, settings.frequency_penalty, settings.logit_bias) == (-1, 1, {5: -100})
    assert (settings.seed, settings.stop, settings.stop_token_ids, settings.ignore_eos) == (3, ("x",), (4,), True)
    assert (settings.logprobs, asked.n, asked.priority, asked.cache_salt, asked.echo) == (5, 2, -3, "tenant", True)
    assert asked.stream and asked.include_usage and not asked.ignored


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", ("ab",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3], "c"], ((1,), (2, 3), "c"))],
)
def test_prompts_are_texts_and_token_ids(prompt, prompts):
    assert complete(prompt=prompt).prompts == prompts


def test_tokens_where_none_are_asked_for():
    assert complete().max_tokens == 16
    assert chat().max_tokens is None
    assert chat(max_tokens=3).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == 5
    nothing = complete(max_tokens=0, echo=True)
    assert nothing.empty and nothing.max_tokens == 1


def test_the_checkpoints_settings_stand_in_place_of_openais():
    limits = Limits(258, 512, {"temperature": 0.6, "top_p": 0.95})
    settings = completion_asked({"prompt": "a", "top_p": 0.5}, limits).settings
    assert (settings.temperature, settings.top_p) == (0.6, 0.5)


def test_more_than_all_tokens_are_all():
    assert complete(top_k=10**400).settings.top_k == 258


def test_unknown_fields_are_named_and_harmless_ones_are_not():
    assert chat(user="me", metadata={}, guided_tree="x", nothing=None).ignored == ("guided_tree",)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "abc"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e999}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": {"١": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [[1], [10**12]]}, "prompt[1][0]"),
        ({"prompt": [258]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a"] * 200, "n": 2}, "prompt"),
        ({"model": 5}, "model"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs.regex",
        ),
    ],
    ids=str,
)
def test_mistakes_are_said_of_their_field(fields, param):
    with pytest.raises(ApiError) as error:
        complete(**fields)
    assert error.value.status == 400
    assert error.value.param == param
    assert len(error.value.message) < 500


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice.function.name",
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
    ids=str,
)
def test_mistakes_in_conversations_are_said_of_their_field(fields, param):
    with pytest.raises(ApiError) as error:
        chat(**fields)
    assert (error.value.status, error.value.param) == (400, param)


def test_messages_become_what_templates_take():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
    )
    assert [message["role"] for message in asked.messages] == ["system", "user", "assistant", "tool"]
    assert asked.messages[1] == {"role": "user", "content": "ab"}
    assert asked.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_grammars_by_openais_fields_and_vllms():
    schema = {"type": "object"}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert chat(response_format=given).constrained == Constrained("json", schema, "response_format.json_schema.schema")
    assert chat(response_format={"type": "text"}).constrained is None
    assert chat(structured_outputs={"regex": "a+"}).constrained.grammar == "a+"
    assert chat(structured_outputs={"choice": ["yes", 'n"o']}).constrained.grammar == 'start: "yes" | "n\\"o"'


def test_calls_that_are_asked_for_are_json():
    asked = chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "add"}})
    assert asked.tool_choice == "function:add"
    assert asked.constrained.grammar == TOOL["function"]["parameters"]
    required = chat(tools=[TOOL], tool_choice="required").constrained.grammar
    assert required["items"]["anyOf"][0]["properties"]["name"] == {"const": "add"}
    assert chat(tools=[TOOL], tool_choice="none").tools == ()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "has to be a JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
        (b'{"a": ' + b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT + b"}", "deep"),
        (rb'{"a": [{"b": "x\ud800"}]}', "half of a surrogate pair"),
        (rb'{"\uDC00": 1}', "half of a surrogate pair"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bodies_that_are_no_request(body, says):
    with pytest.raises(ApiError, match=says) as error:
        read_json(body)
    assert error.value.status == 400
    json.dumps(error.value.body).encode()


def test_whole_pairs_of_surrogates_are_text():
    assert read_json(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}
    deep = b'{"a": ' + b"[" * (DEPTH_LIMIT - 1) + b"]" * (DEPTH_LIMIT - 1) + b"}"
    assert read_json(deep)


def test_fields_are_unknown_until_they_are_taken():
    fields = Fields({"a": 1, "b": None, "c": 2})
    assert fields.whole("a") == 1 and fields.unknown() == ["c"]
