"""Reasoning and calls of tools, told apart whatever pieces the text comes in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_dsv3.serving.reasoning import ReasoningSplitter, held_back
from transformers_dsv3.serving.tools import ToolCall, ToolSplitter


def cut(text, places):
    """A text in pieces."""
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends)]


def split(splitter, pieces):
    told = [one for piece in pieces for one in splitter.feed(piece)]
    return told + list(splitter.feed("", last=True))


def reasoning(prompt, pieces):
    told = {"reasoning": "", "content": ""}
    for part, text in split(ReasoningSplitter(prompt), pieces):
        told[part] += text
    return told["reasoning"], told["content"]


PLACES = st.lists(st.integers(0, 120), max_size=6)


@pytest.mark.parametrize(
    ("prompt", "text", "thought", "answer"),
    [
        ("<｜Assistant｜><think>\n", "Let me see.\n</think>\n\nYes.", "Let me see.\n", "Yes."),
        ("<｜Assistant｜>", "<think>\nLet me see.</think>Yes.", "Let me see.", "Yes."),
        ("<｜Assistant｜>", "\n\nYes: a < b, <think.", "", "\n\nYes: a < b, <think."),
        ("<｜Assistant｜></think>", "<think> is a tag", "", "<think> is a tag"),
        ("<think>", "It never ends </thin", "It never ends </thin", ""),
        ("<think>", "</think>Yes </think>", "", "Yes </think>"),
        ("", "<think>", "", ""),
        ("", "<th", "", "<th"),
        ("", "", "", ""),
    ],
)
@given(places=PLACES)
def test_reasoning(prompt, text, thought, answer, places):
    assert reasoning(prompt, cut(text, places)) == (thought, answer)


V3 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>sub\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31 = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
NOTHING = "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>x"
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"I add.{V3}", "I add.", [("add", {"a": 1}), ("sub", {})]),
        (V31, "", [("add", {"a": 1})]),
        (f"{KIMI} Done.", " Done.", [("add", {"a": 1})]),
        (V31.removesuffix("<｜tool▁calls▁end｜>"), "", [("add", {"a": 1})]),
        ("No <｜tool", "No <｜tool", []),
        (
            "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>x",
            "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>x",
            [],
        ),
        (V31.replace('"a"', "a"), V31.replace('"a"', "a"), []),
    ],
)
@given(places=PLACES)
def test_calls(text, said, calls, places):
    told = split(ToolSplitter(), cut(text, places))
    assert "".join(one for one in told if isinstance(one, str)) == said
    found = [one for one in told if isinstance(one, ToolCall)]
    assert [(one.name, json.loads(one.arguments)) for one in found] == calls
    assert len({one.call_id for one in found}) == len(found)


def test_calls_that_were_asked_for():
    [call] = split(ToolSplitter("function:add"), ['{"a"', ": 1}"])
    assert (call.name, call.arguments) == ("add", '{"a": 1}')
    told = split(ToolSplitter("required"), ['[{"name": "add", "parameters": {"a": 1}}]'])
    assert [(one.name, one.arguments) for one in told] == [("add", '{"a": 1}')]
    assert split(ToolSplitter("required"), ['[{"name"']) == ['[{"name"']  # cut off by the length


@given(st.text("ab<>/think", max_size=12))
def test_what_is_held_back_may_begin_a_mark(text):
    keep = held_back(text, "<think>", "</think>")
    ending = text[len(text) - keep :]
    assert not keep or any(mark.startswith(ending) for mark in ("<think>", "</think>"))
    longer = [text[place:] for place in range(len(text) - keep)]
    assert not any(mark.startswith(one) and mark != one for one in longer for mark in ("<think>", "</think>"))
