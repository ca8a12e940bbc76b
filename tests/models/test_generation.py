"""Generation: self-speculation against plain decoding, prompts padded on either side, the sampled distribution."""

import ast
import inspect

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessor, StoppingCriteria, logits_process

from transformers_dsv3.models.dsv3.mtp_decoding_dsv3 import REMEMBERING_PROCESSORS
from transformers_dsv3.models.dsv3.mtp_pacing_dsv3 import DraftPacing


@pytest.fixture(autouse=True)
def every_pass_drafts(monkeypatch):
    """Whatever the time says: what is tested here are drafts."""
    monkeypatch.setattr(DraftPacing, "next_drafts", lambda self: self.drafts)


def prompts(batch, length, vocab=96, seed=0):
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(tokens, side, amounts):
    mask = torch.ones_like(tokens)
    for row, amount in enumerate(amounts):
        if side == "left":
            mask[row, :amount] = 0
        elif side == "right" and amount:
            mask[row, -amount:] = 0
    return mask


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_greedy_mtp_equals_plain_decoding(make_model, depths, side):
    model = make_model(num_nextn_predict_layers=depths)
    for batch in (1, 3):
        tokens = prompts(batch, 10, seed=batch)
        mask = padding_mask(tokens, side, [5, 0, 2][:batch])
        settings = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(tokens, **settings)
        fast = model.generate(tokens, use_mtp=True, **settings)
        assert fast.tolist() == plain.tolist()
        assert fast[:, :10].tolist() == tokens.tolist()


def test_greedy_mtp_on_a_trained_model_accepts_drafts(trained_model, training_bytes, measured):
    rows = torch.stack([training_bytes[start : start + 40] for start in (0, 500, 1500, 1000)])
    mask = padding_mask(rows, "left", [0, 7, 20, 3])
    settings = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
    plain = trained_model.generate(rows, **settings)
    fast = trained_model.generate(rows, use_mtp=True, return_dict_in_generate=True, **settings)
    assert fast.sequences.tolist() == plain.tolist()
    assert fast.mtp_acceptance_rate == fast.mtp_accepted_tokens / fast.mtp_drafted_tokens
    measured["MTP acceptance on text learned by heart"] = fast.mtp_acceptance_rate
    # It learned this text, so most drafts hold; an untrained layer accepts one in a hundred
    assert fast.mtp_acceptance_rate > 0.5


class CountPasses:
    def __init__(self, model):
        self.passes = 0
        model.model.register_forward_hook(self)

    def __call__(self, *args):
        self.passes += 1


def test_mtp_makes_fewer_passes(trained_model, training_bytes):
    counter = CountPasses(trained_model)
    output = trained_model.generate(
        training_bytes[None, :64], use_mtp=True, max_new_tokens=60, do_sample=False, return_dict_in_generate=True
    )
    assert counter.passes == 60 - output.mtp_accepted_tokens
    assert counter.passes < 45


def test_rows_end_on_their_own(trained_model, training_bytes):
    """Rows that meet the end token at different places are padded behind it, as in plain decoding."""
    rows = torch.stack([training_bytes[start : start + 40] for start in (0, 500, 1500)])
    plain = trained_model.generate(rows, max_new_tokens=40, do_sample=False)
    ends = sorted({int(plain[0, 45]), int(plain[1, 60])})
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ends, "pad_token_id": 256}
    plain = trained_model.generate(rows, **settings)
    assert (plain == 256).any()
    assert trained_model.generate(rows, use_mtp=True, **settings).tolist() == plain.tolist()


def test_logits_and_scores_equal_plain_decoding(trained_model, training_bytes):
    rows = torch.stack([training_bytes[start : start + 30] for start in (100, 900)])
    settings = {
        "max_new_tokens": 20,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    plain = trained_model.generate(rows, **settings)
    fast = trained_model.generate(rows, use_mtp=True, **settings)
    assert fast.sequences.tolist() == plain.sequences.tolist()
    for name in ("logits", "scores"):
        torch.testing.assert_close(
            torch.stack(fast[name]), torch.stack(plain[name]), rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


class KnowsRows(LogitsProcessor):
    """Forbids a token that depends on the row's index and on the length so far."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(input_ids.shape[0]):
            scores[row, (7 * row + 3 * input_ids.shape[1]) % scores.shape[1]] = -torch.inf
            scores[row, input_ids[row, -1]] = -torch.inf
        return scores


class StopAfterSum(StoppingCriteria):
    """Ends a row when the sum of its tokens passes a multiple, which depends on every token before."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, 12:].sum(dim=1) > 900


def test_processors_and_criteria_act_as_in_plain_decoding(make_model):
    model = make_model(num_nextn_predict_layers=2)
    tokens = prompts(3, 12, seed=5)
    settings = {
        "max_new_tokens": 25,
        "do_sample": False,
        "pad_token_id": 0,
        "logits_processor": [KnowsRows()],
        "stopping_criteria": [StopAfterSum()],
        "min_new_tokens": 4,
        "attention_mask": torch.ones_like(tokens),
    }
    plain = model.generate(tokens, **settings)
    fast = model.generate(tokens, use_mtp=True, **settings)
    assert fast.tolist() == plain.tolist()


FREE_OF_MEMORY = {
    "several ends": {"eos_token_id": [7, 11, 30], "min_length": 16},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "no prompt n-gram": {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 1.5},
    "repetition penalty": {"repetition_penalty": 1.6},
    "biased sequences": {"sequence_bias": [[[5, 6], 2.0], [[9], 1.5]], "bad_words_ids": [[3], [4, 8]]},
    "suppressed": {"suppress_tokens": list(range(20, 60)), "begin_suppress_tokens": [61, 62]},
    "forced ends": {"forced_eos_token_id": 17, "forced_bos_token_id": 5, "exponential_decay_length_penalty": (2, 1.1)},
    "green list": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "green list, self-hashed": {"watermarking_config": WatermarkingConfig(seeding_scheme="selfhash", bias=4.0)},
    "allowed by prefix": {
        "prefix_allowed_tokens_fn": lambda row, ids: [2 + (int(ids.sum()) * 7 + 11 * k + row) % 94 for k in range(20)]
    },
    "renormalised": {"renormalize_logits": True, "remove_invalid_values": True},
}


@pytest.mark.parametrize("settings", FREE_OF_MEMORY.values(), ids=FREE_OF_MEMORY)
def test_processors_of_transformers_act_as_in_plain_decoding(make_model, settings):
    """In rows that accept different numbers of drafts; the model is one whose drafts are accepted now and then."""
    model = make_model(num_nextn_predict_layers=2, vocab_size=96, initializer_range=0.02)
    tokens = prompts(3, 12, seed=6)
    common = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    plain = model.generate(tokens, **common, **settings)
    fast = model.generate(tokens, use_mtp=True, **common, **settings)
    assert fast.tolist() == plain.tolist()


def test_stop_strings_act_as_in_plain_decoding(trained_model, training_bytes, byte_tokenizer):
    rows = torch.stack([training_bytes[start : start + 40] for start in (0, 500)])
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 256}
    unstopped = trained_model.generate(rows, **settings)[0]
    stop = byte_tokenizer.decode(unstopped[51:54])
    settings |= {"stop_strings": [stop, "@@"], "tokenizer": byte_tokenizer}
    plain = trained_model.generate(rows, **settings)
    assert trained_model.generate(rows, use_mtp=True, **settings).tolist() == plain.tolist()
    assert plain[0].tolist() == unstopped[:54].tolist() + [256] * (plain.shape[1] - 54)


def remembering_processors():
    """Transformers' classes whose calls write to the object more than what makes it ready, by their source."""
    makes_ready = {
        ("RepetitionPenaltyLogitsProcessor", "prompt_ignore_length"),  # to another device
        ("ExponentialDecayLengthPenalty", "eos_token_id"),  # likewise
        ("WhisperNoSpeechDetection", "_no_speech_prob"),  # read by Whisper alone, scores are as they were
        *(("SequenceBiasLogitsProcessor", name) for name in ("length_1_bias", "multi_token_biases")),
        *(("SequenceBiasLogitsProcessor", name) for name in ("sequence_bias", "prepared_bias_variables")),
    }
    found = set()
    for cls in ast.parse(inspect.getsource(logits_process)).body:
        for method in cls.body if isinstance(cls, ast.ClassDef) else ():
            if not isinstance(method, ast.FunctionDef) or method.name == "__init__" or method.name.startswith("set_"):
                continue
            for node in ast.walk(method):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                for target in targets if isinstance(node, (ast.Assign, ast.AugAssign)) else ():
                    while isinstance(target, (ast.Attribute, ast.Subscript)):
                        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                            found |= {cls.name} if (cls.name, target.attr) not in makes_ready else set()
                        target = target.value
    return found


def test_every_processor_that_remembers_is_known():
    """By the source of this release of Transformers: a new one is to be looked at."""
    found = remembering_processors()
    assert "SynthIDTextWatermarkLogitsProcessor" in found
    assert found <= set(REMEMBERING_PROCESSORS)


@pytest.mark.parametrize("name", REMEMBERING_PROCESSORS)
def test_processors_that_remember_are_refused_before_anything_is_computed(make_model, name):
    elsewhere = "transformers.models.higgs_audio_v2.generation_higgs_audio_v2"
    cls = getattr(logits_process, name, None) or getattr(pytest.importorskip(elsewhere), name)
    processor = type("Mine", (cls,), {"__init__": lambda self: None})()
    model, tokens = make_model(), prompts(1, 8)
    counter = CountPasses(model)
    with pytest.raises(ValueError, match=r"`use_mtp=True` cannot run with .* Mine.* remembers every call"):
        model.generate(tokens, use_mtp=True, max_new_tokens=4, logits_processor=[processor])
    assert counter.passes == 0


def test_synthid_watermark_is_refused_with_drafts_alone(make_model):
    model, tokens = make_model(), prompts(2, 8)
    watermark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4], ngram_len=3)
    settings = {"max_new_tokens": 4, "watermarking_config": watermark, "do_sample": True}
    assert model.generate(tokens, **settings).shape == (2, 12)
    with pytest.raises(ValueError, match=r"SynthIDTextWatermarkLogitsProcessor \(`watermarking_config`\)"):
        model.generate(tokens, use_mtp=True, **settings)


def test_generation_from_embeddings(make_model):
    model = make_model(num_nextn_predict_layers=1)
    embeds = model.get_input_embeddings()(prompts(2, 9)).detach()
    settings = {"inputs_embeds": embeds, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    assert model.generate(use_mtp=True, **settings).tolist() == model.generate(**settings).tolist()


def test_continuing_from_a_cache(trained_model, training_bytes):
    """A second turn on the cache of the first, by either way of decoding."""
    texts = []
    for use_mtp in (False, True):
        settings = {"use_mtp": use_mtp, "max_new_tokens": 15, "do_sample": False}
        first = trained_model.generate(
            training_bytes[None, :50], past_key_values=DynamicCache(), return_dict_in_generate=True, **settings
        )
        assert first.past_key_values.get_seq_length() == 64
        following = torch.cat([first.sequences, training_bytes[None, 200:210]], dim=1)
        texts.append(trained_model.generate(following, past_key_values=first.past_key_values, **settings).tolist())
    assert texts[0] == texts[1]


class NoCropLayer(DynamicLayer):
    """Stands for caches that cannot drop positions, such as quantized ones."""

    def crop(self, *args):
        raise AssertionError("cropped a cache that cannot be cropped")


def test_caches_that_cannot_crop_are_masked(trained_model, training_bytes, monkeypatch):
    rows = torch.stack([training_bytes[start : start + 40] for start in (0, 700)])
    settings = {"max_new_tokens": 30, "do_sample": False}
    plain = trained_model.generate(rows, **settings)

    def no_crop_cache():
        cache = DynamicCache(config=trained_model.config)
        cache.layers = [NoCropLayer() for _ in cache.layers]
        return cache

    with pytest.raises(ValueError, match="cannot take rejected drafts out of the given `past_key_values`"):
        trained_model.generate(rows, use_mtp=True, past_key_values=no_crop_cache(), **settings)

    def prepare(generation_config, model_kwargs, *args):
        model_kwargs["past_key_values"] = no_crop_cache()

    monkeypatch.setattr(trained_model, "_prepare_cache_for_generation", prepare)
    output = trained_model.generate(rows, use_mtp=True, return_dict_in_generate=True, **settings)
    assert output.sequences.tolist() == plain.tolist()
    assert output.past_key_values is None


@pytest.mark.parametrize("depths", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_left_as_plain_decoding_leaves_it(make_model, depths, batch):
    """Also where a row ends within accepted drafts, and for a second turn on the same cache."""
    model = make_model(num_nextn_predict_layers=depths, vocab_size=6, eos_token_id=None, pad_token_id=0)
    tokens = prompts(batch, 8, vocab=6, seed=1)
    mask = padding_mask(tokens, "left", [0, 3, 1][:batch])
    for eos in (None, 1, 2, 3, 4, 5):
        caches, texts = [], []
        for use_mtp in (False, True):
            cache, text, text_mask = DynamicCache(), tokens, mask
            for turn in range(2):
                text = model.generate(
                    text,
                    attention_mask=text_mask,
                    past_key_values=cache,
                    use_mtp=use_mtp,
                    max_new_tokens=9 - turn,
                    do_sample=False,
                    eos_token_id=eos,
                )
                new = (text[:, text_mask.shape[1] :] != 0).long()  # padding behind rows that ended stays masked
                text_mask = torch.cat([text_mask, new], dim=1)
                text_mask[:, -1] = 1
            caches.append(cache)
            texts.append(text.tolist())
        assert texts[0] == texts[1]
        visible = text_mask[:, :-1].bool()
        for plain, fast in zip(caches[0].layers, caches[1].layers, strict=True):
            for name in ("keys", "values"):
                expected, seen = getattr(plain, name)[:, 0], getattr(fast, name)[:, 0]
                assert seen.shape == expected.shape
                torch.testing.assert_close(seen[visible], expected[visible], rtol=1e-4, atol=1e-4)


def test_several_sequences_of_one_prompt(trained_model, training_bytes):
    torch.manual_seed(0)
    output = trained_model.generate(
        training_bytes[None, :20],
        use_mtp=True,
        do_sample=True,
        temperature=4.0,
        num_return_sequences=3,
        max_new_tokens=10,
    )
    assert output.shape == (3, 30) and len({tuple(row) for row in output.tolist()}) > 1


class ReadsScores(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([len(scores) >= 5] * len(input_ids))


def test_criteria_get_the_scores_so_far(trained_model, training_bytes):
    settings = {
        "max_new_tokens": 20,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "stopping_criteria": [ReadsScores()],
    }
    plain = trained_model.generate(training_bytes[None, :20], **settings)
    fast = trained_model.generate(training_bytes[None, :20], use_mtp=True, **settings)
    assert plain.sequences.shape[1] == 25 and fast.sequences.tolist() == plain.sequences.tolist()


def test_up_to_the_last_position(make_model):
    model = make_model(num_nextn_predict_layers=2, max_position_embeddings=32)
    tokens = prompts(2, 12)
    mask = padding_mask(tokens, "left", [3, 0])
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model.generate(tokens, **settings)
    assert plain.shape[1] == 32
    assert model.generate(tokens, use_mtp=True, **settings).tolist() == plain.tolist()


def test_past_the_limit_of_dynamic_rope(make_model):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_model(max_position_embeddings=16, rope_parameters=rope, head_dim=8)
    tokens = prompts(2, 10)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fast = model.generate(tokens, use_mtp=True, **settings)
    assert fast.shape == (2, 30)
    assert fast[:, :16].tolist() == model.generate(tokens, **settings)[:, :16].tolist()


class Collect(TextStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_sees_every_token_once(trained_model, training_bytes):
    streamer = Collect()
    output = trained_model.generate(
        training_bytes[None, :40], use_mtp=True, max_new_tokens=30, do_sample=False, streamer=streamer
    )
    assert sum(streamer.parts, []) == output[0].tolist()
    assert max(len(part) for part in streamer.parts[1:]) == 2 and streamer.ended


def exact_distribution(model, prompt, length, warp):
    """Probability of every continuation of `length` tokens, by running the model on all prefixes."""
    table = {(): 1.0}
    for _ in range(length):
        longer = {}
        for prefix, probability in table.items():
            tokens = torch.tensor([prompt + list(prefix)])
            with torch.no_grad():
                scores = warp(model(tokens).logits[:, -1].double())
            for token, p in enumerate(scores.softmax(-1)[0].tolist()):
                if p:
                    longer[prefix + (token,)] = probability * p
        table = longer
    return table


@pytest.mark.parametrize("depths, passes", [(1, "draft"), (2, "draft"), (1, "pause first"), (0, None)])
def test_sampled_distribution_is_exact(make_model, monkeypatch, depths, passes):
    """With drafts in every pass, after one without, and without any."""
    decisions = iter([0, 1, 1, 1])
    if passes == "pause first":
        monkeypatch.setattr(DraftPacing, "next_drafts", lambda self: next(decisions))
    model = make_model(vocab_size=6, num_nextn_predict_layers=depths, eos_token_id=None, pad_token_id=0, seed=3)
    model.lm_head.weight.data.mul_(2)  # away from uniform
    # The first token is the prompt's and the last pass has nothing to draft: after a pause there has to be one more
    prompt, samples, length = [1, 2, 3], 6000, 4 if passes == "pause first" else 3

    def warp(scores):
        scores = scores / 0.8
        return scores.masked_fill(scores < scores.topk(5)[0][:, -1:], -torch.inf)

    expected = exact_distribution(model, prompt, length, warp)
    torch.manual_seed(0)
    output = model.generate(
        torch.tensor([prompt] * samples),
        use_mtp=depths > 0,
        do_sample=True,
        temperature=0.8,
        top_k=5,
        max_new_tokens=length,
        return_dict_in_generate=True,
    )
    assert depths == 0 or 0 < output.mtp_acceptance_rate < 1
    seen: dict = {}
    for row in output.sequences[:, 3:].tolist():
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert set(seen) <= set(expected)
    # Pearson's statistic over cells expected five times or more, the rest as one cell
    statistic = cells = rest_expected = rest_seen = 0
    for key, probability in expected.items():
        if probability * samples >= 5:
            statistic += (seen.get(key, 0) - probability * samples) ** 2 / (probability * samples)
            cells += 1
        else:
            rest_expected += probability * samples
            rest_seen += seen.get(key, 0)
    if rest_expected >= 5:
        statistic += (rest_seen - rest_expected) ** 2 / rest_expected
        cells += 1
    # Mean cells - 1, deviation √(2 (cells - 1)): five deviations are a chance below 1e-5
    assert statistic < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("use_mtp", [False, True])
def test_right_padding_generates_what_the_bare_prompt_does(trained_model, training_bytes, use_mtp):
    short, long = training_bytes[:25], training_bytes[300:340]
    rows = torch.stack([torch.cat([short, torch.full((15,), 256)]), long])
    mask = padding_mask(rows, "right", [15, 0])
    settings = {"max_new_tokens": 20, "do_sample": False, "use_mtp": use_mtp}
    together = trained_model.generate(rows, attention_mask=mask, **settings)
    assert together[:, :40].tolist() == rows.tolist()
    for row, prompt in enumerate((short, long)):
        alone = trained_model.generate(prompt[None], **settings)[0, len(prompt) :]
        assert together[row, 40:].tolist() == alone.tolist()


@pytest.mark.parametrize("use_mtp", [False, True])
def test_right_padded_embeddings(trained_model, training_bytes, use_mtp):
    embed = trained_model.get_input_embeddings()
    rows = torch.stack([torch.cat([training_bytes[:25], torch.full((15,), 256)]), training_bytes[300:340]])
    mask = padding_mask(rows, "right", [15, 0])
    settings = {"max_new_tokens": 12, "do_sample": False, "use_mtp": use_mtp}
    together = trained_model.generate(inputs_embeds=embed(rows).detach(), attention_mask=mask, **settings)
    alone = trained_model.generate(training_bytes[None, :25], **settings)[0, 25:]
    assert together[0].tolist() == alone.tolist()


def test_right_padding_gives_no_cache(trained_model, training_bytes):
    rows = torch.stack([torch.cat([training_bytes[:25], torch.full((15,), 256)]), training_bytes[300:340]])
    mask = padding_mask(rows, "right", [15, 0])
    output = trained_model.generate(rows, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)
    assert output.past_key_values is None
    with pytest.raises(ValueError, match="Pad it on the left"):
        trained_model.generate(rows, attention_mask=mask, max_new_tokens=3, past_key_values=DynamicCache())


def test_right_padding_with_several_sequences_and_beams(trained_model, training_bytes):
    rows = torch.stack([torch.cat([training_bytes[:25], torch.full((15,), 256)]), training_bytes[300:340]])
    mask = padding_mask(rows, "right", [15, 0])
    output = trained_model.generate(rows, attention_mask=mask, num_beams=3, num_return_sequences=2, max_new_tokens=8)
    assert output[:, :40].tolist() == rows.repeat_interleave(2, dim=0).tolist()


def test_pipeline_takes_use_mtp(trained_model, byte_tokenizer):
    generate = pipeline("text-generation", model=trained_model, tokenizer=byte_tokenizer)
    texts = [
        generate(["def ", "    return"], do_sample=False, max_new_tokens=12, batch_size=2, use_mtp=use_mtp)
        for use_mtp in (False, True)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0][0]["generated_text"].startswith("def ")


def test_static_cache_with_room_behind_a_short_prompt(make_model):
    """Few queries on a long static cache are absorbed in prefill already, with no mask from Transformers."""
    model = make_model(attn_implementation="sdpa")
    tokens = prompts(2, 6)
    assert model.model.layers[0].self_attn.is_absorbed_cheaper(6, 64)
    with torch.no_grad():
        expected = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        torch.testing.assert_close(model(tokens, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("use_mtp", [False, True])
def test_cached_text_given_again_counts_once_against_the_limit(make_model, with_mask, use_mtp):
    """A conversation goes on with its whole text and the cache of it, past half of the positions there are."""
    model = make_model(max_position_embeddings=32)
    text = torch.randint(3, 90, (1, 21), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_mtp": use_mtp}
    expected = model.generate(text, attention_mask=torch.ones_like(text), **settings)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text[:, :20], past_key_values=cache)
    mask = {"attention_mask": torch.ones_like(text)} if with_mask else {}
    assert model.generate(text, past_key_values=cache, **mask, **settings).tolist() == expected.tolist()
