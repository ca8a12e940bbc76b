"""Simulated pipelines beside closed forms, an independent relaxation, and cuts tried one by one."""

from itertools import combinations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformers_dsv3.option_error import OptionError
from transformers_dsv3.training.pipeline.kinds import rank_of_stage
from transformers_dsv3.training.plan.cut import cut
from transformers_dsv3.training.plan.idle import equal_stages
from transformers_dsv3.training.plan.layout import PieceTimes, Pipeline
from transformers_dsv3.training.plan.schedules import (
    SCHEDULES,
    Program,
    action_tables,
    stage_times,
)
from transformers_dsv3.training.plan.trace import replay, write_trace


# Of stages that take the same time for each of F, I and W
IDLE = {
    "GPipe": lambda p, m: (p - 1) / (m + p - 1),
    "1F1B": lambda p, m: (p - 1) / (m + p - 1),
    "Interleaved1F1B": lambda p, m: (p - 1) / (2 * m + p - 1),
    "DualPipeV": lambda p, m: (p - 1) / (3 * m + p - 1),
    "ZBV": lambda p, m: (p - 1) / (6 * m + p - 1),
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(IDLE)), st.integers(1, 6), st.integers(2, 6))
@example("1F1B", 16, 110 // 16)
def test_idle_time_of_equal_stages(schedule, ranks, rounds):
    microbatches = ranks * rounds
    assert equal_stages(schedule, ranks, microbatches) == pytest.approx(IDLE[schedule](ranks, microbatches))


def test_the_articles_two_figures():
    assert equal_stages("1F1B", 16, 110) == pytest.approx(0.12)
    assert equal_stages("ZBV", 16, 81) == pytest.approx(0.03, abs=2e-4)


def starts_by_relaxation(tables, times, delay):
    """When each action starts, found by pushing starts later until nothing is violated any more."""
    flat = [[action for step in steps for action in step] for steps in tables]
    rank_of = {action: rank for rank, actions in enumerate(flat) for action in actions}
    closes = {action: step[-1] for steps in tables for step in steps for action in step}
    last = max(action.stage for action in rank_of)
    start = dict.fromkeys(rank_of, 0.0)

    def end(action, asker):
        if rank_of[action] == rank_of[asker]:
            return start[action] + times(action)
        return start[closes[action]] + times(closes[action]) + delay

    while True:
        moved = False
        for actions in flat:
            for place, action in enumerate(actions):
                stage, kind, microbatch = action
                before = [actions[place - 1]] if place else []
                for other in rank_of:
                    if other.microbatch == microbatch and (
                        (kind == "F" and (other.stage, other.kind) == (stage - 1, "F"))
                        or (kind in "IB" and (other.stage, other.kind) == (stage, "F"))
                        or (kind in "IB" and stage < last and other.stage == stage + 1 and other.kind in "IB")
                        or (kind == "W" and (other.stage, other.kind) == (stage, "I"))
                    ):
                        before.append(other)
                earliest = max((end(other, action) for other in before), default=0.0)
                if earliest > start[action] + 1e-9:
                    start[action], moved = earliest, True
        if not moved:
            return start


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(IDLE)), st.integers(2, 3), st.data())
def test_unequal_stages(schedule, ranks, data):
    microbatches = 2 * ranks
    stages = ranks * SCHEDULES[schedule].stages_per_rank
    seconds = st.lists(st.floats(0.1, 5.0), min_size=stages, max_size=stages)
    times = stage_times(*(data.draw(seconds) for _ in range(3)))
    tables = action_tables(schedule, ranks, microbatches)
    timeline = Program(tables).run(times, delay := data.draw(st.floats(0.0, 2.0)))
    expected = starts_by_relaxation(tables, times, delay)
    assert {span.action: span.start for spans in timeline.spans for span in spans} == pytest.approx(expected)
    # Every stage does every microbatch once, on its rank
    for rank, spans in enumerate(timeline.spans):
        mine = [stage for stage in range(stages) if rank_of_stage(schedule, ranks, stage) == rank]
        forward = [span.action for span in spans if span.action.kind == "F"]
        assert sorted(forward) == [(stage, "F", m) for stage in mine for m in range(microbatches)]
        gradients = [span.action.kind for span in spans if span.action.kind != "F"]
        assert gradients.count("B") + gradients.count("W") == len(forward)
        assert gradients.count("B") + gradients.count("I") == len(forward)
    assert timeline.idle == pytest.approx(1 - sum(timeline.busy) / ranks)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["1F1B", "ZBV"]),
    st.integers(1, 2),
    st.lists(st.floats(0.5, 1.5), min_size=12, max_size=16),
)
def test_the_busiest_rank_has_as_little_as_may_be(schedule, ranks, costs):
    stages = ranks * SCHEDULES[schedule].stages_per_rank

    def busiest(bounds):
        loads = [0.0] * ranks
        for stage, (start, end) in enumerate(zip(bounds, bounds[1:])):
            loads[rank_of_stage(schedule, ranks, stage)] += sum(costs[start:end])
        return max(loads)

    every = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), stages - 1))
    found = cut(costs, schedule, ranks, SCHEDULES[schedule].stages_per_rank)
    assert found[0] == 0 and found[-1] == len(costs) and found == sorted(set(found))
    assert busiest(found) <= min(map(busiest, every)) * (1 + 1e-6)


def test_a_cut_moved_by_what_a_step_takes():
    layers, heads = ((0.4, 0.6) * 16, (0.5, 0.6) * 16, (0.3, 0.6) * 16), (1.4, 0.4, 0.6, 1.4)
    times = PieceTimes(*(way + heads for way in layers))
    pipeline = Pipeline("ZBV", 3, 12, delay=0.1)
    plain, moved = pipeline.cut(times), pipeline.cut(times, tries=100)
    assert pipeline.seconds(times, moved) < pipeline.seconds(times, plain)
    assert pipeline.seconds(times, moved) == pytest.approx(pipeline.run(times, moved).seconds)
    # Many microbatches: what is not simulated is added, and a little more than it would take
    many = Pipeline("ZBV", 3, 120)
    assert 1 - 1e-9 < many.seconds(times, moved) / many.run(times, moved).seconds < 1.02


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_activations_that_are_held(schedule):
    ranks, microbatches = 4, 12
    stages = ranks * SCHEDULES[schedule].stages_per_rank
    alive = Program(action_tables(schedule, ranks, microbatches)).run(stage_times(*[[1.0] * stages] * 3)).most_alive
    first = {"GPipe": microbatches, "1F1B": ranks, "Interleaved1F1B": 2 * ranks}
    assert alive[0] == first.get(schedule, 2 * ranks)  # of the schedules in the form of a V, half a layer's each
    if SCHEDULES[schedule].is_v:  # and no rank has more than another by much
        assert max(alive[r] + alive[2 * ranks - 1 - r] for r in range(ranks)) <= 2 * ranks + 1


@pytest.mark.parametrize(
    "arguments, option, reason",
    [
        (("2F2B", 4, 8), "--schedule", "is one of GPipe"),
        (("DualPipeV", 4, 7), "--schedule", "at least 8 microbatches on 4 ranks, not 7"),
        (("Interleaved1F1B", 4, 9), "--schedule", "9 do not"),
        (("ZBV", 4, 8, 3), "--stages-per-rank", "ZBV has 2, not 3"),
        (("1F1B", 0, 8), "--pp", "must be at least 1"),
    ],
)
def test_what_schedules_do_not_take(arguments, option, reason):
    with pytest.raises(OptionError, match=reason) as refused:
        action_tables(*arguments)
    assert refused.value.option == option


def test_more_stages_than_pieces():
    with pytest.raises(OptionError, match=r"8 stages \(4 ranks of 2\) of 7 pieces"):
        cut([1.0] * 7, "ZBV", 4, 2)


def test_a_replay_of_measured_durations(tmp_path):
    """A trace of a simulated step, with waiting that the order does not explain, is foretold without that."""
    times = stage_times(*([1.0, 2.0, 1.5, 0.5],) * 3)
    timeline = Program(action_tables("ZBV", 2, 4)).run(times)
    write_trace(tmp_path / "trace.json", timeline)
    step = replay(tmp_path / "trace.json")
    assert step.simulated.seconds == pytest.approx(timeline.seconds) and step.difference == pytest.approx(0)
    late = [[span._replace(start=span.start + 9, end=span.end + 9) for span in spans] for spans in timeline.spans]
    late[0][0] = timeline.spans[0][0]
    write_trace(tmp_path / "late.json", type(timeline)(late))
    step = replay(tmp_path / "late.json")
    assert step.measured.seconds == pytest.approx(timeline.seconds + 9)
    assert step.simulated.seconds == pytest.approx(timeline.seconds)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "is not JSON"),
        ("[]", 'has no "ranks"'),
        ('{"ranks": [[]]}', 'has no "ranks"'),
        ('{"ranks": [[["0X0", 0, 1]]]}', "rank 0, .* is not like"),
        ('{"ranks": [[["0F0", 1, 0]]]}', "ends before it starts"),
        ('{"ranks": [[["0F0", 0, 1], ["0B0", 0.5, 2]]]}', "starts before the one before it has ended"),
        ('{"ranks": [[["0F0", 0, 1], ["0F0", 1, 2]]]}', "is there twice"),
        ('{"ranks": [[["0F0", 0, NaN]]]}', "ends before it starts"),
        ('{"ranks": [[["0F0", 0, 1], ["0B0", 1, 2]], [["1B0", 0, 1], ["1F0", 1, 2]]]}', "wait for each other"),
    ],
)
def test_traces_that_are_none(content, reason, tmp_path):
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(OptionError, match=reason) as refused:
        replay(tmp_path / "trace.json")
    assert refused.value.option == "--replay"
