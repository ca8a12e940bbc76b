"""Steps of `generate` from token ids to logits in one call, beside calls of the model."""

import copy
import sys
import threading

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from transformers_dsv3 import quantize
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.models.dsv3 import decoding_dsv3, decoding_loop_dsv3
from transformers_dsv3.models.dsv3.decoding_steps_dsv3 import Steps


pytestmark = pytest.mark.skipif(library.unavailable is not None, reason="no compiled CPU library")


@pytest.fixture
def made(monkeypatch):
    """A list of whether each step was made without calling the model."""
    found, logits = [], Steps.logits

    def count(self, *arguments):
        given = logits(self, *arguments)
        found.append(given is not None)
        return given

    monkeypatch.setattr(Steps, "logits", count)
    return found


@pytest.fixture
def compared(monkeypatch):
    """A list that grows by one where a program's grounds are compared."""
    found, hold = [], decoding_dsv3._Grounds.hold
    monkeypatch.setattr(decoding_dsv3._Grounds, "hold", lambda self, roots: found.append(1) or hold(self, roots))
    return found


def write(model, rows=1, padded=0, tokens=10, by_calls=False, **options):
    """A greedy text, and the cache that it leaves."""
    ids = torch.randint(1, model.config.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    cache = DynamicCache(config=model.config)
    with pytest.MonkeyPatch.context() as patch:
        if by_calls:
            patch.setattr(decoding_loop_dsv3, "_steps_of", lambda *arguments: None)
        text = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
    return text, cache


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("rows, padded", [(1, 0), (3, 0), (3, 4)])
def test_text_and_cache_are_those_of_calls(make_model, made, rows, padded, bits):
    model = make_model(moe_intermediate_size=32, intermediate_size=64, q_lora_rank=32, num_nextn_predict_layers=0)
    if bits is not None:
        with pytest.warns(UserWarning, match="not a multiple of 32"):
            quantize(model, bits=bits)
    text, cache = write(model, rows, padded)
    assert len(made) == 9 and all(made)
    expected, other = write(model, rows, padded, by_calls=True)
    assert torch.equal(text, expected)
    for ours, plain in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(ours.keys, plain.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, plain.values, rtol=1e-4, atol=1e-5)


class Changes(BaseStreamer):
    """Changes a model while its text is streamed."""

    def __init__(self, change):
        self.change, self.said = change, 0

    def put(self, value):
        self.said += 1
        if self.said == 4:
            self.change()

    def end(self):
        pass


class ChangesIt(Changes, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def other_head(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())


CHANGES = {
    "the head": other_head,
    "the head in place": lambda model: model.lm_head.weight.data.copy_(model.lm_head.weight.flip(0)),
    "a hook of the head": lambda model: model.lm_head.register_forward_hook(lambda m, i, output: -output),
    "a hook of the embedding": lambda model: model.model.embed_tokens.register_forward_hook(lambda m, i, x: -x),
    "a hook of the model": lambda model: model.register_forward_hook(
        lambda m, i, output: output.__setitem__("logits", -output.logits)
    ),
    "a hook of the decoder": lambda model: model.model.register_forward_hook(
        lambda m, i, output: output.__setitem__("last_hidden_state", -output.last_hidden_state)
    ),
    "a hook of a layer": lambda model: model.model.layers[1].register_forward_hook(lambda m, i, x: x.flip(-1)),
    "a weight of a layer": lambda model: setattr(
        model.model.layers[0].self_attn.o_proj,
        "weight",
        torch.nn.Parameter(-3 * model.model.layers[0].self_attn.o_proj.weight.detach()),
    ),
    "a forward": lambda model: setattr(
        model.lm_head, "forward", lambda x: -torch.nn.functional.linear(x, model.lm_head.weight)
    ),
    "the embedding": lambda model: model.set_input_embeddings(torch.nn.Embedding(96, 32)),
}


@pytest.mark.parametrize("where", ["streamer", "criterion"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_steps_is_seen(make_model, made, change, where):
    texts = []
    for by_calls in (False, True):
        model = make_model(num_nextn_predict_layers=0)
        kind = Changes if where == "streamer" else ChangesIt
        changes = kind(lambda model=model: torch.manual_seed(1) and CHANGES[change](model))
        option = {"streamer": changes} if where == "streamer" else {"stopping_criteria": [changes]}
        texts.append(write(model, tokens=12, by_calls=by_calls, **option)[0])
    unchanged, _ = write(make_model(num_nextn_predict_layers=0), tokens=12)
    assert torch.equal(*texts) and not torch.equal(texts[0], unchanged)
    assert made[0]


def test_grounds_are_compared_where_other_code_may_run(make_model, compared, made, monkeypatch):
    model = make_model(num_nextn_predict_layers=0)
    with monkeypatch.context() as patch:
        # What runs tests may have threads of its own
        patch.setattr(sys, "_current_frames", lambda: {threading.get_ident(): None})
        write(model)
    alone = len(compared)
    compared.clear()
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        write(model)
    finally:
        over.set()
        thread.join()
    among_others = len(compared)
    assert alone <= 4 and among_others >= 2 * 9 and all(made)
    compared.clear()
    write(model, streamer=Changes(lambda: None))
    assert len(compared) >= 2 * 9


def test_what_looks_at_calls_of_the_model_sees_them(make_model, made):
    model = make_model(num_nextn_predict_layers=0)
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    write(model)
    handle.remove()
    assert len(calls) == 10 and not any(made)


def test_room_grows_in_the_middle_of_a_text(make_model, made):
    model = make_model(num_nextn_predict_layers=0)
    text, cache = write(model, tokens=300)
    assert all(made) and cache.get_seq_length() == 308
    assert torch.equal(text, write(model, tokens=300, by_calls=True)[0])


def test_two_heads_over_one_decoder(make_model, made):
    """Each gives its own logits, whoever was asked last."""
    first = make_model(num_nextn_predict_layers=0)
    second = copy.deepcopy(first)
    second.model = first.model
    second.lm_head.weight = torch.nn.Parameter(first.lm_head.weight.detach().flip(0).clone())
    texts = [write(model)[0] for model in (first, second, first)]
    assert all(made) and torch.equal(texts[0], texts[2]) and not torch.equal(*texts[:2])
    assert torch.equal(texts[1], write(second, by_calls=True)[0])
