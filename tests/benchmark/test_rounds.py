"""Turns, their order, and the statistics made of them."""

import pytest

from transformers_dsv3.benchmark.benchmark import ratios
from transformers_dsv3.benchmark.report import times
from transformers_dsv3.benchmark.rounds import Turn, interleave, order_of, ratio, spread


def run(names, turn, rounds):
    log, after = [], []

    def logged(name):
        log.append(name)
        return turn(name)

    turns, failed = interleave(
        names,
        logged,
        rounds,
        lambda: log.append("machine"),
        lambda turns, failed: after.append(sum(map(len, turns.values()))),
    )
    return turns, failed, log, after


def test_rounds_alternate_their_order_and_measure_the_machine_before_each():
    turns, failed, log, after = run(["a", "b", "c"], lambda name: Turn(1.0), 3)
    assert log == ["machine", *"abc", "machine", *"cba", "machine", *"abc"]
    assert {name: len(taken) for name, taken in turns.items()} == {"a": 3, "b": 3, "c": 3}
    assert not failed
    assert after == [3, 6, 9]


def test_each_contender_is_as_often_first_as_last_in_an_even_number_of_rounds():
    for count in range(1, 5):
        places = [0] * count
        for round_number in range(6):
            for place, contender in enumerate(order_of(round_number, count)):
                places[contender] += place
        assert len(set(places)) == 1


def test_a_contender_that_fails_is_out_with_its_reason_and_the_others_go_on():
    def turn(name):
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise RuntimeError("out of memory\nand more")
        return Turn(1.0)

    calls = []
    turns, failed, log, _ = run(["a", "b"], turn, 4)
    assert failed == {"b": "out of memory"}
    assert list(turns) == ["a"] and len(turns["a"]) == 4
    assert log.count("b") == 2


def test_an_interruption_is_not_a_failure():
    def turn(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["a"], turn, 2)


def test_spread_by_hand():
    assert spread([4.0, 1.0, 3.0, 2.0]) == {
        "median": 2.5,
        "lower_quartile": 1.75,
        "upper_quartile": 3.25,
        "min": 1.0,
        "max": 4.0,
    }
    assert set(spread([7.0]).values()) == {7.0}


def test_ratios_are_of_rounds_not_of_medians():
    # Medians 2 and 1.5 would give 1.33; round by round it is 2, 1 and 3
    slower, faster = [2.0, 1.0, 9.0], [1.0, 1.0, 3.0]
    found = ratio(slower, faster)
    assert found["per_round"] == [2.0, 1.0, 3.0]
    assert found["median"] == 2.0 and found["min"] == 1.0 and found["max"] == 3.0

    contenders = {name: {"seconds": values} for name, values in (("plugin", faster), ("transformers", slower))}
    assert ratios(contenders) == {"transformers / plugin": found}
    entry = {"contenders": contenders}
    assert times(entry, "transformers", "plugin") == "2.00 (1.00 to 3.00)"
    assert times(entry, "transformers", "transformers") == times(entry, "vllm", "plugin") == ""


def test_every_form_of_the_plugin_is_compared_with_everything_else():
    contenders = {name: {"seconds": [1.0]} for name in ("plugin", "plugin int8", "transformers")}
    assert set(ratios(contenders)) == {
        "plugin int8 / plugin",
        "transformers / plugin",
        "plugin / plugin int8",
        "transformers / plugin int8",
    }
