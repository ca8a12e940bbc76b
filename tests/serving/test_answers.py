"""What is answered, whole and as a stream, over an engine that repeats the prompt."""

import json

import pytest


def test_a_completion(echo):
    answer = echo.complete("abc", max_tokens=5)
    assert answer.status == 200 and answer.headers["x-request-id"]
    told = answer.json
    assert told["object"] == "text_completion" and told["id"].startswith("cmpl-") and told["model"] == "echo"
    [choice] = told["choices"]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == ("abcab", "length", 0)
    assert told["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts_and_choices_are_numbered(echo):
    told = echo.complete(["ab", [66, 67]], n=2, max_tokens=2, echo=True).json
    texts = [(choice["index"], choice["text"]) for choice in told["choices"]]
    assert texts == [(0, "abab"), (1, "abab"), (2, "cdcd"), (3, "cdcd")]
    assert told["usage"]["prompt_tokens"] == 4 and told["usage"]["completion_tokens"] == 8


def test_choices_draw_with_seeds_of_their_own(echo):
    echo.engine.seen.clear()
    assert echo.complete(n=3, seed=7).status == 200
    assert [request.settings.seed for request in echo.engine.seen] == [7, 8, 9]


def test_logprobs_of_a_completion(echo):
    told = echo.complete("añ", max_tokens=2, logprobs=1, echo=True).json["choices"][0]
    logprobs = told["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xb1", "a", "bytes:\\xc3"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][3] == {"!": -1.0, "a": -0.5}
    assert len(logprobs["text_offset"]) == 5


def test_how_likely_a_text_is_without_more_of_it(echo):
    told = echo.complete("abc", max_tokens=0, logprobs=1, echo=True).json["choices"][0]
    assert told["text"] == "abc" and told["finish_reason"] == "length"
    assert told["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]


def test_a_chat(echo):
    told = echo.chat("abc", max_tokens=8, logprobs=True, top_logprobs=2).json
    [choice] = told["choices"]
    assert told["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "User: ab"}  # the plain template's beginning
    places = choice["logprobs"]["content"]
    assert len(places) == 8
    assert places[0] == {
        "token": "U",
        "logprob": -0.5,
        "bytes": [85],
        "top_logprobs": [
            {"token": "!", "logprob": -1.0, "bytes": [33]},
            {"token": '"', "logprob": -1.001, "bytes": [34]},
        ],
    }


def test_a_chat_without_max_tokens_takes_what_there_is_room_for(echo):
    told = echo.chat("a\nUser: b").json
    # The plain template's own stop
    assert (told["choices"][0]["finish_reason"], told["choices"][0]["stop_reason"]) == ("stop", "\nUser:")
    assert echo.engine.seen[-1].settings.max_new_tokens == 512 - told["usage"]["prompt_tokens"]
    assert echo.engine.seen[-1].settings.stop == ("\nUser:", "\nSystem:")


def test_a_stream_of_a_chat(echo):
    answer = echo.chat("abc", max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, usage, done = answer.events
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert all(one["object"] == "chat.completion.chunk" and one["usage"] is None for one in events)
    deltas = [one["choices"][0]["delta"] for one in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Use"
    assert [one["choices"][0]["finish_reason"] for one in events] == [None] * (len(events) - 1) + ["length"]


def test_a_stream_of_completions(echo):
    *events, done = echo.complete(["ab", "cd"], max_tokens=3, stream=True, echo=True, logprobs=0).events
    texts, tokens = ["", ""], [[], []]
    for one in events:
        for choice in one["choices"]:
            texts[choice["index"]] += choice["text"]
            tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    assert texts == ["ababa", "cdcdc"] and tokens == [list("ababa"), list("cdcdc")]
    assert done == "[DONE]"


def test_unknown_fields_are_ignored_with_a_warning(echo):
    answer = echo.complete(**{"guided_tree": 1, 'quo"te\né': 2})
    assert answer.status == 200
    assert answer.headers["warning"] == '299 - "ignored: guided_tree, quo?te??xe9"'
    assert "warning" not in echo.complete(user="me").headers


def test_a_text_that_the_engine_gives_up(echo):
    answer = echo.complete(cache_salt="make it fail")
    assert answer.status == 500 and "its logits are not finite" in answer.error["message"]
    *_, error, done = echo.complete(cache_salt="make it fail", stream=True).events
    assert error["error"]["type"] == "server_error" and done == "[DONE]"
    assert echo.complete().status == 200


def test_models_and_adapters(echo):
    told = echo.get("/v1/models").json["data"]
    assert [(one["id"], one["parent"], one["max_model_len"]) for one in told] == [
        ("echo", None, 512),
        ("poet", "echo", 512),
    ]
    assert echo.get("/v1/models/poet").json["id"] == "poet"
    assert echo.get("/v1/models/gpt-9").error["code"] == "model_not_found"
    assert echo.complete(model="poet").json["model"] == "poet"
    assert echo.engine.seen[-1].adapter == "poet"
    assert echo.complete(model="echo").status == 200 and echo.engine.seen[-1].adapter is None
    answer = echo.complete(model="gpt-9")
    assert answer.status == 404 and answer.error["param"] == "model"


def test_tokens_and_text(echo):
    told = echo.post("/tokenize", {"prompt": "aé", "return_token_strs": True}).json
    assert told == {"count": 3, "max_model_len": 512, "tokens": [64, 127, 102], "token_strs": told["token_strs"]}
    assert told["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert echo.post("/detokenize", {"tokens": told["tokens"]}).json == {"prompt": "aé"}
    chat = echo.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json["tokens"]
    assert echo.post("/detokenize", {"tokens": chat}).json["prompt"] == "User: a\n\nAssistant:"
    assert echo.post("/tokenize", {}).error["param"] == "prompt"
    assert echo.post("/detokenize", {"tokens": [999]}).error["param"] == "tokens[0]"


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, lambda text: text.isdigit() and len(text) == 4),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
        ({"response_format": {"type": "grammar", "grammar": 'start: "a" "b"'}}, lambda text: text == "ab"),
    ],
    ids=["json", "regex", "choice", "grammar"],
)
def test_texts_follow_their_grammar(echo, fields, check):
    told = echo.chat(max_tokens=50, n=2, **fields).json["choices"]
    assert all(check(choice["message"]["content"]) for choice in told)
    assert [choice["finish_reason"] for choice in told] == ["stop", "stop"]


def test_a_schema_is_followed(echo):
    properties = {"name": {"enum": ["ada"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}}
    schema = {"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": False}
    given = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    told = json.loads(echo.chat(max_tokens=90, response_format=given).json["choices"][0]["message"]["content"])
    assert told["name"] == "ada" and 1 <= told["age"] <= 9


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "[0-9"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(?<=a)b"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "http://elsewhere/x"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "start: oops"}}, "structured_outputs.grammar"),
    ],
    ids=str,
)
def test_grammars_that_are_none(echo, fields, param):
    answer = echo.complete(**fields)
    assert answer.status == 400 and answer.error["param"] == param


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]},
    },
}


def test_a_call_that_is_asked_for(echo):
    choice = {"type": "function", "function": {"name": "add"}}
    answer = echo.chat(max_tokens=60, tools=[TOOL], tool_choice=choice)
    assert "tells the model of no tools" in answer.headers["warning"]
    [told] = answer.json["choices"]
    assert told["finish_reason"] == "tool_calls" and told["message"]["content"] is None
    [call] = told["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"])["a"] == 1
    *events, _ = echo.chat(max_tokens=60, tools=[TOOL], tool_choice=choice, stream=True).events
    calls = [one for event in events for one in event["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["index"] == 0 and calls[0]["function"]["name"] == "add"
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_metrics_count_and_time(echo):
    before = echo.sample("vllm:generation_tokens_total", model_name="echo")
    ended = echo.sample("vllm:request_success_total", finished_reason="length")
    echo.complete("abcd", max_tokens=6)
    assert echo.sample("vllm:generation_tokens_total") == before + 6
    assert echo.sample("vllm:request_success_total", finished_reason="length") == ended + 1
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert echo.sample(f"vllm:{name}_count") > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert echo.sample(f"vllm:{name}") == 0
    assert echo.sample("dsv3:http_responses_total", status="200") > 0


def test_what_is_not_there_is_said_in_openais_form(echo):
    assert echo.get("/v1/nothing").status == 404 and echo.get("/v1/nothing").error["type"] == "not_found_error"
    answer = echo.get("/v1/completions")
    assert answer.status == 405 and answer.headers["allow"] == "POST" and answer.error["message"]
    assert echo.get("/ready").json == {"status": "ready"} and echo.get("/health").json == {"status": "ok"}
    assert echo.post("/v1/routing", {"prompt": "a"}).error["code"] == "no_experts"
