"""What a request may ask, and that a mistake names its field."""

import math

import pytest

from transformers_dsv3.generation.requests import Request, RequestError, SamplingSettings


WRONG = [
    ("max_new_tokens", 0),
    ("max_new_tokens", 2.5),
    ("max_new_tokens", True),
    ("min_new_tokens", 17),
    ("temperature", -1),
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_p", 0),
    ("top_p", 1.1),
    ("min_p", math.inf),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", None),
    ("seed", 2**70),
    ("stop", ("",)),
    ("stop", (5,)),
    ("stop_token_ids", (-1,)),
    ("logit_bias", {1: 101}),
    ("logit_bias", {-1: 0.0}),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_mistake_names_its_field(field, value):
    with pytest.raises(RequestError, match=f"`{field}`") as raised:
        SamplingSettings(**{field: value})
    assert raised.value.field == field


def test_limits_themselves_are_allowed():
    SamplingSettings(
        max_new_tokens=1,
        min_new_tokens=1,
        temperature=0,
        top_p=1,
        min_p=1,
        presence_penalty=-2,
        seed=2**64 - 1,
        stop=("a",),
        logit_bias={0: -100},
        logprobs=0,
        prompt_logprobs=20,
    )


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="`prompt`"):
        Request("a", ())
