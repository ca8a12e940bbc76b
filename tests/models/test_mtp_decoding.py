"""Drafts and their verification by programs, beside the modules they stand for."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from transformers_dsv3 import quantize
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu import linear as cpu_linear
from transformers_dsv3.models.dsv3 import decoding_dsv3
from transformers_dsv3.models.dsv3.decoding_steps_dsv3 import Drafts
from transformers_dsv3.models.dsv3.mtp_decoding_dsv3 import MtpDecoding
from transformers_dsv3.models.dsv3.mtp_pacing_dsv3 import DraftPacing


pytestmark = pytest.mark.skipif(library.unavailable is not None, reason="no compiled CPU library")


@pytest.fixture(autouse=True)
def every_pass_drafts(monkeypatch):
    monkeypatch.setattr(DraftPacing, "next_drafts", lambda self: self.drafts)


@pytest.fixture
def by_program(monkeypatch):
    """A list that grows by one at each MTP layer that a program runs."""
    found, run = [], Drafts.run
    monkeypatch.setattr(Drafts, "run", lambda self, *arguments: found.append(1) or run(self, *arguments))
    return found


def write(model, rows=1, padded=0, tokens=12, by_layers=False, ids=None, **options):
    """A text with drafts, and all drafts that were made for it."""
    if ids is None:
        ids = torch.randint(1, model.config.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    drafts, drafted = [], MtpDecoding._drafted

    def watch(self, *arguments):
        draft = drafted(self, *arguments)
        drafts.append(draft[0].tolist())
        return draft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MtpDecoding, "_drafted", watch)
        if by_layers:
            patch.setattr(decoding_dsv3, "MOST_TOKENS", 0)
        options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0, **options}
        text = model.generate(ids, attention_mask=mask, use_mtp=True, **options)
    return text.tolist(), drafts


@pytest.fixture(scope="module")
def small_layers_too():
    """Linear layers that are smaller than the compiled backend's are its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "FEWEST_BYTES", 0)
        patch.setattr(cpu_linear, "MOST_ROWS", {})
        yield


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 4),
    slots=st.integers(1, 5),
    padded=st.integers(0, 6),
    hole=st.booleans(),
    depths=st.integers(1, 2),
    lora=st.sampled_from([None, 32]),
    dense=st.sampled_from([0, 4]),
    interleave=st.booleans(),
    bits=st.sampled_from([None, None, 8, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_programs_are_what_the_layers_compute(
    make_model, measured, small_layers_too, batch, slots, padded, hole, depths, lora, dense, interleave, bits, dtype
):
    model = make_model(
        num_nextn_predict_layers=depths, q_lora_rank=lora, first_k_dense_replace=dense, rope_interleave=interleave,
        moe_intermediate_size=32, intermediate_size=64,
    ).to(dtype)  # fmt: skip
    if bits is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that stay as they are
            quantize(model, bits=bits)
    decoder, rows = model.model, torch.arange(batch)
    assert decoder.decoding.refusal(decoder, dtype) is None
    generator = torch.Generator().manual_seed(batch + slots)
    ids = torch.randint(96, (batch, 9 + slots), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    mask[-1, 9 + slots // 2] = not hole
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = torch.randint(slots, (batch,), generator=generator)
    with torch.no_grad():
        cache = DynamicCache()
        decoder(ids[:, :9], attention_mask=mask[:, :9], past_key_values=DynamicCache(config=model.config))
        hidden = decoder.norm(torch.randn(batch, 9, model.config.hidden_size, generator=generator).to(dtype))
        given = decoder.attention_inputs(hidden, mask[:, :9], positions[:, :9], cache)
        for layer in decoder.mtp_layers:
            hidden = layer(hidden, decoder.embed_tokens(ids[:, :9]), **given)
        other = copy.deepcopy(cache)

        drafts = Drafts(model, False)
        hidden = expected = decoder.norm(torch.randn(batch, slots, 32, generator=generator).to(dtype))
        new, places = ids[:, 9:].contiguous(), positions[:, 9:].contiguous()
        takes = decoder.layers[0].self_attn.is_absorbed_cheaper(slots, 9 + slots)
        assert drafts.begin(new, cache, int(places.max())) == takes
        if not takes:
            return
        given = decoder.attention_inputs(expected, mask, places, other)
        worst = 0.0
        for depth, layer in enumerate(decoder.mtp_layers):
            expected = layer(expected, decoder.embed_tokens(new), **given)
            hidden, logits = drafts.run(depth, hidden, new, places, mask.bool(), rows * slots + last)
            plain = model.lm_head(expected[rows, last])
            for ours, theirs in ((hidden, expected), (logits, plain)):
                assert ours.shape == theirs.shape and ours.dtype is theirs.dtype is dtype
                worst = max(worst, float((ours - theirs).abs().max()))
        drafts.end(slots)
        for ours, plain in zip(cache.layers, other.layers, strict=True):
            assert ours.keys.shape == plain.keys.shape
            worst = max(worst, float((ours.keys - plain.keys).abs().max()))
            worst = max(worst, float((ours.values - plain.values).abs().max()))
    assert worst < (2e-5 if dtype is torch.float32 else 0.02)
    what = f"program beside MTP layers, {dtype}"
    measured[what] = max(measured.get(what, 0.0), worst)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "sampling": "exact", "temperature": 0.7}], ids=str)
def test_text_and_drafts_are_those_of_the_layers(trained_model, training_bytes, by_program, options):
    prompts = torch.stack([training_bytes[at : at + 30] for at in (0, 300, 700)])
    texts = []
    for by_layers in (False, True):
        torch.manual_seed(0)
        texts.append(write(trained_model, padded=7, tokens=40, by_layers=by_layers, ids=prompts, **options))
        taken = len(by_program)
        by_program.clear()
        assert taken == (0 if by_layers else len(texts[0][1]) - 1)  # all but the one that follows the prompt
    assert texts[0] == texts[1]


@pytest.mark.parametrize("depths, rows", [(1, 1), (3, 2)])
def test_room_grows_in_the_middle_of_a_text(make_model, by_program, depths, rows):
    model = make_model(num_nextn_predict_layers=depths)
    found = write(model, rows=rows, tokens=300)
    assert len(by_program) > 200
    assert found == write(model, rows=rows, tokens=300, by_layers=True)


def test_what_was_missed_in_a_pause_is_seen(make_model, by_program, monkeypatch):
    """A few tokens by the programs, more of them by the layers."""
    model = make_model(num_nextn_predict_layers=2)
    found = []
    for by_layers in (False, True):
        pattern = itertools.cycle([True] * 3 + [False] * 3 + [True] * 2 + [False] * 12)
        monkeypatch.setattr(DraftPacing, "next_drafts", lambda self, each=pattern: self.drafts * next(each))
        found.append(write(model, rows=2, tokens=80, by_layers=by_layers))
    assert found[0] == found[1] and 10 < len(by_program) < len(found[0][1]) - 2


class Changes(BaseStreamer):
    """Changes a model while its text is streamed."""

    def __init__(self, change):
        self.change, self.said = change, 0

    def put(self, value):
        self.said += 1
        if self.said == 5:
            self.change()

    def end(self):
        pass


def _replaced(layer, name):
    holder, _, last = name.rpartition(".")
    holder = layer.get_submodule(holder)
    setattr(holder, last, nn.Parameter(getattr(holder, last).detach().flip(0).clone()))


def _hook(layer, name):
    layer.get_submodule(name).register_forward_hook(lambda module, given, output: output.flip(-1))


def _other_layer(layers):
    layers[0] = copy.deepcopy(layers[0])
    layers[0].eh_proj.weight.data.neg_()


CHANGES = {
    "a hook of the layer": lambda model: _hook(model.model.mtp[0], ""),
    "a hook of the projection": lambda model: _hook(model.model.mtp[0], "eh_proj"),
    "a hook of a norm": lambda model: _hook(model.model.mtp[0], "embed_layernorm"),
    "a hook of the last norm": lambda model: _hook(model.model.mtp[0], "shared_head.norm"),
    "a hook of the head": lambda model: _hook(model, "lm_head"),
    "a hook of the embedding": lambda model: _hook(model, "model.embed_tokens"),
    "the projection": lambda model: _replaced(model.model.mtp[0], "eh_proj.weight"),
    "the projection in place": lambda model: model.model.mtp[0].eh_proj.weight.data.neg_(),
    "a norm": lambda model: _replaced(model.model.mtp[0], "hidden_layernorm.weight"),
    "a weight": lambda model: _replaced(model.model.mtp[0], "self_attn.o_proj.weight"),
    "a setting of a norm": lambda model: setattr(model.model.mtp[0].hidden_layernorm, "variance_epsilon", 3.0),
    "a forward": lambda model: setattr(model.model.mtp[0].eh_proj, "forward", lambda x: x[..., :32].flip(-1)),
    "the layer": lambda model: _other_layer(model.model.mtp),
    "the head": lambda model: _replaced(model, "lm_head.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_passes_is_seen(make_model, by_program, change):
    found = []
    for by_layers in (False, True):
        model = make_model(num_nextn_predict_layers=2)
        changes = Changes(lambda model=model: CHANGES[change](model))
        found.append(write(model, tokens=16, by_layers=by_layers, streamer=changes))
    unchanged = write(make_model(num_nextn_predict_layers=2), tokens=16, by_layers=True)
    assert found[0] == found[1] and found[0][1] != unchanged[1]
    assert by_program
