"""The scheduler beside an engine without a model: budgets are kept, everyone ends, nobody is overtaken without end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.generation.pages import PagePool
from transformers_dsv3.generation.requests import Request, RequestError, SamplingSettings
from transformers_dsv3.generation.scheduler import LEAD, Limits, Scheduler
from transformers_dsv3.generation.step_costs import StepCosts


def request(name, prompt, new, **fields):
    sampling = {name: fields.pop(name) for name in ("prompt_logprobs",) if name in fields}
    return Request(str(name), tuple(prompt), SamplingSettings(max_new_tokens=new, **sampling), **fields)


def scheduler_of(pages=64, size=4, batch_tokens=64, running=16, fewest=4, **limits):
    return Scheduler(PagePool(pages, size), Limits(batch_tokens, running, fewest, **limits))


def drive(scheduler, step, finished, draw=lambda sequence: 1, seconds=None):
    """What an engine does with a step; those that have all their tokens end."""
    took = 1e-3 * (20 + step.tokens) + 1e-6 * step.pairs if seconds is None else seconds
    scheduler.done(step, took)
    for chunk in step.chunks:
        sequence = chunk.sequence
        if chunk.draws:
            scheduler.drew(sequence, draw(sequence))
            if sequence.drawn == sequence.request.settings.max_new_tokens:
                scheduler.remove(sequence)
                finished.append(sequence)


def check(scheduler, step):
    """What holds of every step that was planned."""
    limits, pool = scheduler.limits, scheduler.pool
    assert 0 < step.tokens <= limits.batch_tokens
    assert len(scheduler.running) <= limits.running
    assert scheduler.running == sorted(scheduler.running) and scheduler.waiting == sorted(scheduler.waiting)
    written = set()
    for chunk in step.chunks:
        table = chunk.sequence.table
        assert chunk.count > 0 and chunk.start == chunk.sequence.computed
        assert chunk.start + chunk.count <= len(table.pages) * pool.page_size
        assert chunk.start // pool.page_size >= table.shared
        pages = set(table.pages[chunk.start // pool.page_size :])
        assert not written & pages, "two sequences write to one page"
        written |= pages
    assert len({id(chunk.sequence) for chunk in step.chunks}) == len(step.chunks)
    assert all(sequence.table is None for sequence in scheduler.waiting)
    decoding = [chunk for chunk in step.chunks if chunk.count == 1 and chunk.sequence.drawn]
    assert len(decoding) >= sum(sequence.left == 1 and sequence.drawn > 0 for sequence in scheduler.running)


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=24),  # the prompt
        st.integers(1, 12),  # new tokens
        st.integers(-2, 2),  # priority
        st.sampled_from(["", "tenant"]),
        st.integers(0, 20),  # the step before which it arrives
        st.sampled_from([None, None, None, 1, 3, 9]),  # steps after which its client goes away
        st.booleans(),  # the prompt's log-probabilities
    ),
    min_size=1,
    max_size=14,
)


@given(
    listed=REQUESTS,
    pages=st.integers(9, 40),
    size=st.sampled_from([1, 3, 4]),
    step_seconds=st.sampled_from([None, 0.03, 1e-9]),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_everyone_ends_whatever_is_asked(listed, pages, size, step_seconds, seed):
    scheduler = scheduler_of(pages * 36 // (9 * size), size, 24, 8, 4, step_seconds=step_seconds)
    random_ = random.Random(seed)
    todo = sorted(enumerate(listed), key=lambda item: item[1][4])
    leaving, finished, cancelled, step_number = {}, [], 0, 0
    while todo or scheduler.running or scheduler.waiting:
        while todo and todo[0][1][4] <= step_number:
            name, (prompt, new, priority, salt, _, patience, logprobs) = todo.pop(0)
            asked = {"prompt_logprobs": 0} if logprobs else {}
            added = scheduler.add(request(name, prompt, new, priority=priority, cache_salt=salt, **asked))
            if patience is not None:
                leaving[added] = step_number + patience
        step = scheduler.plan()
        if step.chunks:
            check(scheduler, step)
            drive(scheduler, step, finished, lambda _: random_.randrange(2))
        for sequence, last in list(leaving.items()):
            if step_number >= last:
                del leaving[sequence]
                if sequence not in finished:
                    scheduler.remove(sequence, keep=random_.random() < 0.5)
                    cancelled += 1
        step_number += 1
        assert step_number < 2000, "somebody never ends"
    assert len(finished) + cancelled == len(listed)
    assert scheduler.pool.used == 0
    for sequence in finished:
        assert sequence.drawn == sequence.request.settings.max_new_tokens


def test_prompts_go_in_parts_within_the_budget():
    scheduler = scheduler_of(batch_tokens=64, running=4, fewest=4, stretch=2.0)
    scheduler.add(request("a", range(3), 40))
    finished = []
    for _ in range(6):
        drive(scheduler, scheduler.plan(), finished)
    scheduler.add(request("b", range(100, 200), 4))
    counts = []
    while not finished and not counts or scheduler.running[-1].left > 1:
        step = scheduler.plan()
        assert step.chunks[0].count == 1  # who is being continued goes on
        counts.append(step.tokens - 1)
        together = scheduler.costs.seconds(2, 2, 2 * step.chunks[0].pairs)
        assert scheduler.costs.seconds(2, step.tokens, step.pairs) <= 2.0 * together + 1e-3
        drive(scheduler, step, finished)
    assert sum(counts) == 100 and len(counts) > 3


def test_many_that_wait_are_let_in_at_the_pace_of_a_full_batch():
    """Their prompts take as long altogether; were one text's short steps what they are measured by, most would wait
    for most of that time.
    """
    scheduler = scheduler_of(batch_tokens=512, running=128, fewest=4, stretch=2.0, pages=4000)
    scheduler.add(request("a", range(3), 40))
    for _ in range(6):
        drive(scheduler, scheduler.plan(), [])
    for name in range(63):
        scheduler.add(request(name, range(100 + name, 120 + name), 4))
    step, costs = scheduler.plan(), scheduler.costs
    full = costs.seconds(64, 64, 64 * step.chunks[0].pairs)
    assert step.chunks[0].count == 1
    assert 1.5 * full < costs.seconds(len(step.chunks), step.tokens, step.pairs) <= 2.0 * full + 1e-3


def test_a_first_token_waits_for_no_budget_where_nobody_is_continued():
    scheduler = scheduler_of(batch_tokens=64)
    scheduler.add(request("a", range(60), 4))
    assert scheduler.plan().tokens == 60


def test_a_target_of_seconds_limits_how_many_run():
    scheduler = scheduler_of(batch_tokens=64, running=32, step_seconds=0.03)
    finished = []
    for name in range(32):
        scheduler.add(request(name, [name + 2, 1], 30))
    most = 0
    for _ in range(40):
        step = scheduler.plan()
        drive(scheduler, step, finished)
        most = max(most, len(scheduler.running))
    assert 4 <= most <= 12  # 20 ms a step and 1 ms a token


def test_what_can_never_fit_is_refused_at_once():
    scheduler = scheduler_of(pages=4, size=4, sequence_tokens=1000)
    assert scheduler.longest == 17
    scheduler.check(request("a", range(10), 7))
    with pytest.raises(RequestError, match="`max_new_tokens` is 8"):
        scheduler.add(request("a", range(10), 8))
    with pytest.raises(RequestError, match="`prompt` has 17 tokens"):
        scheduler.add(request("a", range(17), 1))
    assert scheduler_of(sequence_tokens=10).longest == 10


def test_the_longest_that_fits_fills_every_page():
    scheduler = scheduler_of(pages=4, size=4)
    finished = []
    scheduler.add(request("a", range(10), 7))
    while not finished:
        drive(scheduler, scheduler.plan(), finished)
    assert scheduler.preemptions == 0


def test_the_last_in_order_gives_way_and_comes_back_first():
    scheduler = scheduler_of(pages=8, size=2, running=8)
    finished = []
    for name in ("a", "b", "c"):
        scheduler.add(request(name, [ord(name), 1, 2], 10))
    while len(finished) < 3:
        step = scheduler.plan()
        check(scheduler, step)
        drive(scheduler, step, finished)
    assert [each.request.request_id for each in finished] == ["a", "b", "c"]
    assert scheduler.preemptions > 0 and scheduler.pool.used == 0


def test_a_priority_goes_first_but_not_for_ever():
    scheduler = scheduler_of(running=1)
    low = scheduler.add(request("low", [1], 1, priority=1))
    urgent = [scheduler.add(request(name, [1], 1)) for name in range(LEAD + 5)]
    order = [sequence.request.request_id for sequence in scheduler.waiting]
    assert order.index("low") == LEAD - 1 and low.order > urgent[0].order
    far = scheduler.add(request("far", [1], 1, priority=-(2**70)))
    assert scheduler.waiting[0] is far


def test_the_same_prompt_is_computed_once():
    scheduler = scheduler_of(batch_tokens=200, running=16)
    finished = []
    for name in range(4):
        scheduler.add(request(name, range(30), 2))
    while len(finished) < 4:
        drive(scheduler, scheduler.plan(), finished)
    assert [each.cached >= 28 for each in sorted(finished)] == [False, True, True, True]
    assert scheduler.prompt_tokens == 120 and scheduler.cached_tokens >= 84


def test_prompts_whose_logits_are_wanted_are_computed():
    scheduler = scheduler_of()
    finished = []
    for name in range(2):
        scheduler.add(request(name, range(20), 2, prompt_logprobs=0))
        while len(finished) <= name:
            drive(scheduler, scheduler.plan(), finished)
    assert finished[1].cached == 0


def test_pages_that_led_to_nothing_sound_are_found_by_none():
    scheduler = scheduler_of()
    broken = scheduler.add(request("a", range(20), 2))
    step = scheduler.plan()
    scheduler.done(step, 0.01)
    scheduler.remove(broken, keep=False)
    scheduler.add(request("b", range(20), 2))
    scheduler.plan()
    assert scheduler.running[0].cached == 0


def test_limits_have_to_hold_together():
    with pytest.raises(ValueError, match="batch_tokens"):
        Limits(batch_tokens=16, running=16, fewest_prefilled=1)


class TestCosts:
    def test_the_fit_finds_what_steps_cost(self):
        costs, random_ = StepCosts(), random.Random(0)
        for _ in range(300):
            sequences, tokens, pairs = random_.randrange(1, 64), random_.randrange(64, 300), random_.randrange(50_000)
            seconds = 0.02 + 2e-4 * sequences + 4e-4 * tokens + 2e-6 * pairs
            costs.saw(sequences, tokens, pairs, seconds * random_.uniform(0.95, 1.05))
        assert costs.seconds(50, 200, 30_000) == pytest.approx(0.17, rel=0.05)
        # 0.04 s are left; a token takes 0.4 ms, and 2 µs for each one that it looks back at
        left = (0.17, 49, 100, 30_000)
        assert costs.tokens_within(*left, 0, 200) == pytest.approx(66, rel=0.2)
        assert costs.tokens_within(*left, 400, 200) == pytest.approx(28, rel=0.2)
        assert costs.tokens_within(0.01, 1, 100, 30_000, 0, 1000) == 0
        assert costs.tokens_within(10, 1, 100, 30_000, 0, 512) == 512

    def test_a_step_that_was_held_up_changes_little(self):
        costs = StepCosts()
        for tokens in range(1, 101):
            costs.saw(1, tokens, 10 * tokens, 0.02 + 1e-4 * tokens)
        before = costs.seconds(1, 50, 500)
        costs.saw(1, 50, 500, 120.0)
        assert costs.seconds(1, 50, 500) < 1.2 * before

    @given(
        st.lists(
            st.tuples(st.integers(1, 9), st.integers(1, 512), st.integers(1, 10**6), st.floats(1e-6, 10)), max_size=20
        )
    )
    @settings(max_examples=50, deadline=None)
    def test_no_cost_is_below_nothing(self, seen):
        costs = StepCosts()
        for step in seen:
            costs.saw(*step)
        assert min(costs._weights) >= 0
        assert costs.tokens_within(1.0, 1, 1, 1, 0, 64) in range(65)
