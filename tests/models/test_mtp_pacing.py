"""When drafting pays: decisions from known costs and acceptance, and texts that do not depend on them."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.models.dsv3.mtp_pacing_dsv3 import DraftPacing, expected_tokens


@given(st.floats(0, 1), st.integers(0, 6))
def test_expected_tokens_of_constant_acceptance(probability, drafts):
    assert expected_tokens([probability] * drafts) == pytest.approx(sum(probability**k for k in range(drafts + 1)))


def simulate(pacing, acceptance, cost, passes, rows=1, seed=0):
    """Tokens a second of a row, and how many passes drafted. `acceptance` of a pass's index, `cost` a draft's."""
    generator, tokens, seconds, drafted = random.Random(seed), 0, 0.0, []
    for index in range(passes):
        drafts = pacing.next_drafts()
        accepted = []
        for _ in range(rows):
            run = 0
            while run < drafts and generator.random() < acceptance(index):
                run += 1
            accepted.append(run)
        took = 1 + cost * drafts
        pacing.record(drafts, took, accepted)
        tokens += sum(accepted) / rows + 1
        seconds += took
        drafted.append(drafts > 0)
    return tokens / seconds, drafted


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.floats(0, 1), st.floats(0, 1.5), st.sampled_from([1, 4, 32]), st.integers(0, 10**6))
def test_neither_way_alone_is_much_faster(drafts, probability, cost, rows, seed):
    """Whatever a pass with all drafts costs more than one without, up to one and a half times as much."""
    cost /= drafts
    rate, _ = simulate(DraftPacing(drafts), lambda index: probability, cost, 2000, rows, seed)
    always = expected_tokens([probability] * drafts) / (1 + cost * drafts)
    assert rate > 0.9 * max(always, 1.0)


def test_drafting_stops_where_nothing_is_accepted_and_is_tried_again_less_and_less():
    _, drafted = simulate(DraftPacing(1), lambda index: 0.0, 0.3, 400)
    trials = [8, 3 + 32, 8, 64, 8, 128, 8, 141]  # with and without, in turns; 3 to learn what a pass without costs
    assert drafted == [turn % 2 == 0 for turn, passes in enumerate(trials) for _ in range(passes)]


def test_drafting_goes_on_where_all_is_accepted():
    _, drafted = simulate(DraftPacing(2), lambda index: 1.0, 0.3, 400)
    assert drafted.count(False) <= 12  # what it takes to time them


def test_drafting_follows_the_text():
    _, drafted = simulate(DraftPacing(1), lambda index: 0.9 if index >= 1000 else 0.0, 0.3, 3000)
    assert drafted[:1000].count(True) < 80
    assert drafted[1600:].count(False) < 100


def test_passes_that_say_nothing_of_the_others_are_left_out():
    pacing = DraftPacing(3)
    pacing.record(1, 5.0, [0])  # the text is about to end
    pacing.record(3, None, [3])  # saw more than a pass does
    assert not pacing.costs[0] and not pacing.costs[3]
    assert pacing.rate(0) == 0


@pytest.fixture
def known_costs(monkeypatch):
    """Passes are told to have taken 1, and a part of it for each draft; returns the list of their drafts."""
    passes, record = [], DraftPacing.record

    def told(self, drafts, seconds, accepted):
        passes.append(drafts)
        record(self, drafts, None if seconds is None else 1 + 0.25 * drafts, accepted)

    monkeypatch.setattr(DraftPacing, "record", told)
    return passes


@pytest.mark.parametrize("depths", [1, 3])
def test_an_untrained_layer_is_left_out(make_model, known_costs, depths):
    model = make_model(num_nextn_predict_layers=depths)
    tokens = torch.randint(2, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 90, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, **options)
    output = model.generate(tokens, use_mtp=True, return_dict_in_generate=True, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert known_costs[:8] == [depths] * 8 and known_costs[8:40] == [0] * 32
    assert output.mtp_drafted_tokens == 2 * sum(known_costs)
    assert sum(drafts > 0 for drafts in known_costs) <= 24


def test_a_trained_layer_goes_on(trained_model, training_bytes, known_costs):
    options = {"max_new_tokens": 100, "do_sample": False, "return_dict_in_generate": True}
    output = trained_model.generate(training_bytes[None, :64], use_mtp=True, **options)
    assert known_costs.count(0) <= 4
    assert output.mtp_acceptance_rate > 0.5


@pytest.fixture
def at_random(monkeypatch):
    """Function from a seed: whether a pass drafts is up to chance from then on."""

    def start(seed, share=0.4):
        generator = random.Random(seed)
        monkeypatch.setattr(DraftPacing, "next_drafts", lambda self: self.drafts * (generator.random() < share))

    return start


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_text_and_cache_do_not_depend_on_which_passes_draft(make_model, at_random, depths, rows):
    model = make_model(num_nextn_predict_layers=depths, vocab_size=6, eos_token_id=None, pad_token_id=0)
    tokens = torch.randint(2, 6, (rows, 9), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(tokens)
    mask[0, : 4 * (rows > 1)] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    for eos in (None, 3):
        plain = model.generate(tokens, eos_token_id=eos, **options)
        for seed in range(4):
            at_random(seed)
            fast = model.generate(tokens, eos_token_id=eos, use_mtp=True, **options)
            assert fast.sequences.tolist() == plain.sequences.tolist()
            assert fast.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def test_drafts_after_a_pause_are_as_good_as_before(trained_model, training_bytes, at_random):
    """The layer has then seen what it missed; without, it would attend to a text with holes."""
    rows = torch.stack([training_bytes[start : start + 40] for start in (0, 500, 1000)])
    options = {"max_new_tokens": 120, "do_sample": False, "use_mtp": True, "return_dict_in_generate": True}
    always = trained_model.generate(rows, sampling="exact", **options)
    at_random(0, share=0.2)
    seldom = trained_model.generate(rows, **options)
    assert seldom.sequences.tolist() == always.sequences.tolist()
    assert 10 < seldom.mtp_drafted_tokens < 0.6 * always.mtp_drafted_tokens
    assert seldom.mtp_acceptance_rate > always.mtp_acceptance_rate - 0.15


def test_a_seed_gives_the_same_draws_where_they_are_to_be_exact(make_model, monkeypatch):
    model = make_model(num_nextn_predict_layers=1, pad_token_id=0, eos_token_id=None)
    monkeypatch.setattr(DraftPacing, "record", lambda *args: pytest.fail("looked at the time"))
    tokens, texts = torch.full((2, 5), 9), []
    for _ in range(2):
        torch.manual_seed(4)
        texts.append(
            model.generate(tokens, use_mtp=True, do_sample=True, sampling="exact", max_new_tokens=20).tolist()
        )
    assert texts[0] == texts[1]
