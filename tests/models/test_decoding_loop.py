"""The short loop of `generate` beside Transformers' own: the same calls, texts, caches; and `sampling=`."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from transformers_dsv3.models.dsv3 import generation_dsv3


class Records(BaseStreamer, StoppingCriteria, LogitsProcessor):
    """Writes down what it is told as a streamer, as a criterion or as a processor."""

    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(("put", value.tolist()))

    def end(self):
        self.said.append(("end",))


class StopsAt(Records):
    def __call__(self, input_ids, scores, **kwargs):
        self.said.append((input_ids.tolist(), scores))
        return input_ids[:, -1] % 5 == 0


class StopsAllAt(Records):
    """Returns one answer for the batch, as some do."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] > 15])


class Forbids(Records):
    def __call__(self, input_ids, scores):
        self.said.append((input_ids.tolist(), scores.tolist()))
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


PAD = 0
KINDS = {
    "plain": {},
    "ends": {"eos_token_id": [5, 11, 20, 44, 60, 71, 80]},
    "a criterion": {"stopping_criteria": StopsAt},
    "a criterion for all": {"stopping_criteria": StopsAllAt},
    "a criterion and ends": {"stopping_criteria": StopsAt, "eos_token_id": [4, 12, 30]},
    "a processor": {"logits_processor": Forbids},
    "time": {"max_time": 1000.0},
    "penalty": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "eos_token_id": [7, 8]},
    "chunks of the prompt": {"prefill_chunk_size": 4, "past_key_values": DynamicCache},
    "past the positions": {"max_length": 40},
}


def run(model, tokens, mask, sampling, **options):
    said = []

    def look(module, args, kwargs):
        shown = {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name, value in kwargs.items()
            if name != "past_key_values"
        }
        said.append(({name: value for name, value in shown.items() if value is not None}, args))

    streamer = Records() if len(tokens) == 1 else None
    others = []
    for name in ("stopping_criteria", "logits_processor"):
        if name in options:
            others.append(options[name]())
            options[name] = [others[-1]]
    if "past_key_values" in options:
        options["past_key_values"] = options["past_key_values"](config=model.config)
    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    torch.manual_seed(3)
    length = {} if "max_length" in options else {"max_new_tokens": 14}
    output = model.generate(
        tokens,
        attention_mask=mask,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        streamer=streamer,
        sampling=sampling,
        **length,
        **options,
    )
    hook.remove()
    cache = [(layer.keys.tolist(), layer.values.tolist()) for layer in output.past_key_values.layers]
    kept = {name: value for name, value in output.items() if name not in ("sequences", "past_key_values")}
    return said, output.sequences.tolist(), cache, kept, [one.said for one in others], streamer and streamer.said


@pytest.fixture
def own_loop(monkeypatch):
    """Function that makes `generate` run Transformers' loop from then on."""
    return lambda: monkeypatch.setattr(generation_dsv3, "loop_refusal", lambda *args: "asked for")


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_everything_is_as_in_transformers_loop(make_model, own_loop, monkeypatch, options, do_sample):
    """Calls of the model, criteria, processors and streamer; the output, its cache; draws with `sampling="exact"`."""
    model = make_model(num_nextn_predict_layers=0, eos_token_id=None, max_position_embeddings=32)
    decoded = []
    decode = generation_dsv3.decode
    monkeypatch.setattr(generation_dsv3, "decode", lambda *args: decoded.append(1) or decode(*args))
    cases = []
    for rows, padding in ((1, 0), (3, 0), (3, 4)):
        tokens = torch.randint(2, 96, (rows, 9), generator=torch.Generator().manual_seed(rows))
        mask = torch.ones_like(tokens)
        mask[0, :padding] = 0
        cases.append((tokens, mask))
    warpers = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.9} if do_sample else {"do_sample": False}
    short = [run(model, *case, "exact", **warpers, **options) for case in cases]
    assert len(decoded) == len(cases)
    own_loop()
    for case, found in zip(cases, short, strict=True):
        for part, expected in zip(found, run(model, *case, "exact", **warpers, **options), strict=True):
            assert part == expected


def test_a_second_turn_and_embeddings(make_model, own_loop):
    model = make_model(num_nextn_predict_layers=0, eos_token_id=None)
    tokens = torch.randint(2, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    texts = []
    for turn in range(2):
        if turn:
            own_loop()
        cache = DynamicCache(config=model.config)
        text = model.generate(tokens, past_key_values=cache, **settings)
        text = model.generate(torch.cat([text, tokens[:, :3]], dim=1), past_key_values=cache, **settings)
        embeds = model.get_input_embeddings()(tokens).detach()
        texts.append(
            (text.tolist(), model.generate(inputs_embeds=embeds, **settings).tolist(), cache.get_seq_length())
        )
    assert texts[0] == texts[1]


REFUSED = {
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "logits": {"return_dict_in_generate": True, "output_logits": True},
    "attentions": {"output_attentions": True},
    "no cache": {"use_cache": False},
    "static cache": {"past_key_values": StaticCache},
    "what it does not know": {"output_router_logits": True},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_the_short_loop_does_not_do_is_left_to_transformers(make_model, monkeypatch, options):
    model = make_model(num_nextn_predict_layers=0, eos_token_id=None, attn_implementation="eager")
    monkeypatch.setattr(generation_dsv3, "decode", lambda *args: pytest.fail("ran the short loop"))
    options = dict(options)
    if "past_key_values" in options:
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
    tokens = torch.randint(2, 96, (1, 6), generator=torch.Generator().manual_seed(0))
    model.generate(tokens, max_new_tokens=3, do_sample=True, pad_token_id=PAD, **options)


def test_replaced_preparation_of_inputs_is_called(make_model, monkeypatch):
    model = make_model(num_nextn_predict_layers=0, eos_token_id=None)
    calls, prepare = [], model.prepare_inputs_for_generation
    monkeypatch.setattr(model, "prepare_inputs_for_generation", lambda *a, **k: calls.append(1) or prepare(*a, **k))
    model.generate(torch.full((1, 4), 7), max_new_tokens=3, do_sample=False, pad_token_id=PAD)
    assert len(calls) == 3


def test_sampling_is_an_argument_and_a_field(make_model, own_loop, tmp_path):
    model = make_model(num_nextn_predict_layers=0, eos_token_id=None, pad_token_id=PAD)
    tokens = torch.randint(2, 96, (4, 6), generator=torch.Generator().manual_seed(0))

    def text(**options):
        torch.manual_seed(0)
        return model.generate(tokens, max_new_tokens=8, **options).tolist()

    options = {"do_sample": True, "top_p": 0.9}
    drawn, exact = text(**options), text(sampling="exact", **options)
    assert text(sampling="fast", **options) == text(sampling=None, **options) == drawn != exact
    config = GenerationConfig(max_new_tokens=8, sampling="exact", pad_token_id=PAD, **options)
    config.save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    assert model.generate(tokens, generation_config=config).tolist() == exact
    model.generation_config.sampling = "exact"
    assert text(**options) == exact and text(sampling="fast", **options) == drawn
    # What is to be returned with its scores is drawn by Transformers
    model.generation_config.sampling = None
    torch.manual_seed(0)
    scored = model.generate(tokens, max_new_tokens=8, return_dict_in_generate=True, output_scores=True, **options)
    assert scored.sequences.tolist() == exact
    own_loop()
    assert text(**options) == exact


def test_other_ways_of_sampling_are_refused(make_model):
    with pytest.raises(ValueError, match="`sampling` must be 'fast' or 'exact', not 'quick'"):
        make_model().generate(torch.full((1, 4), 7), max_new_tokens=2, sampling="quick")
