"""Mixtures: shares of tokens over every window, the same blocks whoever asks, and streams that end."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

import transformers_dsv3
from transformers_dsv3.data import mixture
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.data.mixture import MixedStream, epochs_needed
from transformers_dsv3.data.mixture_order import MixtureError, MixtureOrder
from transformers_dsv3.data.packed_stream import PackedStream
from transformers_dsv3.data.text_files import Corpus, Document
from transformers_dsv3.data.text_stream import stream_corpus
from transformers_dsv3.training.stream_position import StreamPosition, check_stream_arguments


pytest.importorskip("datasets")

WEIGHTS = {"code": 0.35, "maths": 0.18, "prose": 0.27, "chinese": 0.2}
LENGTH = 8


def rows(domain, count):
    """Blocks whose tokens tell the domain and the row."""
    return [{"input_ids": [domain * 1000 + row] * LENGTH} for row in range(count)]


class Passes:
    """Iterated again and again, with no length and no state."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def packed(domain):
    tokenizer = train_byte_bpe(["ab cd"], 280, 64)
    rng = random.Random(domain)
    texts = [Document(f"{i}", " ".join(rng.choice("ab cd ef".split()) for _ in range(40))) for i in range(90)]
    stream = stream_corpus(Corpus("", tuple(texts), (), "", ""), seed=domain)
    return PackedStream(stream.texts_of_pass, tokenizer, LENGTH, shuffle_window=5, seed=domain)


def streamed(rows):
    from datasets import Dataset

    return Dataset.from_list(rows).to_iterable_dataset()


def streams(kinds=("list", "passes", "datasets", "packed"), count=97):
    make = {
        "list": lambda domain: rows(domain, count),
        "passes": lambda domain: Passes(rows(domain, count)),
        "datasets": lambda domain: streamed(rows(domain, count)),
        "packed": packed,
    }
    return {name: make[kind](domain) for domain, (name, kind) in enumerate(zip(WEIGHTS, kinds, strict=True))}


def take(stream, number):
    return [block["input_ids"].tolist() for block in itertools.islice(stream, number)]


def counted(order, number):
    """How many of the first n blocks are of each domain, for n from 0 to `number`: `(n + 1, domains)`."""
    drawn = [order.domains.index(name) for name in itertools.islice(order.from_block(0), number)]
    return np.concatenate(
        [np.zeros((1, len(order.domains)), int), np.eye(len(order.domains), dtype=int)[drawn].cumsum(0)]
    )


@st.composite
def weights(draw):
    parts = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
    return {f"domain {i}": part / sum(parts) for i, part in enumerate(parts)}


@settings(max_examples=25, deadline=None)
@given(weights(), st.integers(0, 2**32))
def test_shares_hold_in_every_window(weights, seed):
    order = MixtureOrder(weights, list(weights), seed, None)
    counts, shares = counted(order, 2200), np.array(list(weights.values()))
    off = counts - np.arange(2201)[:, None] * shares
    assert abs(off[::8]).max() < 1.03  # a weight is a multiple of 1 / 100,000
    assert abs(off).max() < 3.03
    assert abs(off[1000:] / np.arange(1000, 2201)[:, None]).max() <= 0.003
    assert abs(off[1000]).max() / 1000 <= 0.00103
    assert abs(np.diff(off[::200], axis=0)).max() / 200 <= 0.0103
    assert abs(off[200:] - off[:-200]).max() / 200 <= 0.0301


def test_the_articles_shares_are_exact():
    order = MixtureOrder("article", ["code", "maths", "English", "German"], 0, None)
    assert order.schedule[0] == {"code": 0.35, "maths": 0.18, "English": 0.235, "German": 0.235}
    assert order.counts(200) == {"code": 70, "maths": 36, "English": 47, "German": 47}
    assert order.counts(4000) == {"code": 1400, "maths": 720, "English": 940, "German": 940}


@settings(max_examples=25, deadline=None)
@given(weights(), weights(), st.integers(0, 99), st.integers(0, 900), st.integers(1, 700))
def test_a_block_is_a_function_of_its_number(first, second, seed, block, change):
    names = sorted({*first, *second})
    order = MixtureOrder({0: first, change * LENGTH: second}, names, seed, LENGTH)
    drawn = list(itertools.islice(order.from_block(0), 1000))
    assert list(itertools.islice(order.from_block(block), 100)) == drawn[block : block + 100]
    assert order.domain(block) == drawn[block]
    assert order.counts(block) == {name: drawn[:block].count(name) for name in names}
    assert set(drawn[:change]) <= {*first}
    counts = counted(order, 1000)[change:]
    shares = np.array([second.get(name, 0) for name in names])
    off = counts - counts[0] - np.arange(len(counts))[:, None] * shares
    assert abs(off).max() < 3.03


def test_the_order_is_the_seeds():
    drawn = [
        list(itertools.islice(MixtureOrder(WEIGHTS, list(WEIGHTS), seed, None).from_block(0), 400))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    # No place in a batch, hence no rank, has a domain of its own
    even = MixtureOrder({"a": 0.5, "b": 0.5}, ["a", "b"], 0, None)
    places = np.array([name == "a" for name in itertools.islice(even.from_block(0), 4000)]).reshape(-1, 4).mean(0)
    assert abs(places - 0.5).max() < 0.1


def test_change_at_tokens():
    order = MixtureOrder({0: {"a": 1.0}, 81: {"a": 0.5, "b": 0.5}}, ["a", "b"], 0, LENGTH)
    assert list(order.schedule) == [0, 11]  # the block that token 81 is in is of the weights before it
    assert order.counts(11) == {"a": 11, "b": 0} and order.counts(27) == {"a": 19, "b": 8}


@pytest.mark.parametrize("kind", ["list", "passes", "datasets", "packed"])
def test_comes_back_to_any_block(kind):
    def new():
        return MixedStream(WEIGHTS, streams([kind] * 4), 3)

    stream, blocks, states = new(), [], {}
    for block in stream:
        blocks.append(block["input_ids"].tolist())
        if len(blocks) % 173 == 5:  # a loader has read three blocks ahead
            states[len(blocks) - 3] = json.dumps(stream.state_dict(len(blocks) - 3))
        if len(blocks) == 1000:
            break
    assert len(states) > 4
    for number, state in states.items():
        assert number < 900 and len(state) < 2200  # of four streams with states of their own
        resumed = new()
        resumed.load_state_dict(json.loads(state))
        assert take(resumed, 50) == blocks[number : number + 50]
        # A resumed stream can be resumed, by the blocks that it drew
        again = new()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        assert take(again, 20) == blocks[number + 50 : number + 70]
    assert take(stream, 5) == blocks[:5]  # iterated again, it begins where it did
    fresh = new()
    fresh.load_state_dict({**json.loads(state), "sources": {name: {"block": 0, "mark": None} for name in WEIGHTS}})
    if kind != "packed":
        assert take(fresh, 20) == blocks[number : number + 20]  # without marks it reads from the beginning


def test_state_is_small():
    stream = MixedStream(WEIGHTS, streams(["packed"] * 4), 0)
    take(stream, 300)
    assert len(json.dumps(stream.state_dict(290))) < 2200
    assert len(json.dumps(MixedStream(WEIGHTS, streams(["list"] * 4), 0).state_dict(9))) < 150


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_same_blocks(ranks):
    expected = take(MixedStream(WEIGHTS, streams(), 1), 36)

    def parts(state=None, number=36):
        stream = MixedStream(WEIGHTS, streams(), 1)
        if state is not None:
            stream.load_state_dict(state)
        shards = [IterableDatasetShard(stream, 2, num_processes=ranks, process_index=rank) for rank in range(ranks)]
        return [take(shard, number // ranks) for shard in shards]

    assert sorted(itertools.chain(*parts())) == sorted(expected)
    # Half way, from one process to these
    stream = MixedStream(WEIGHTS, streams(), 1)
    take(stream, 18)
    state = json.loads(json.dumps(stream.state_dict(12)))
    assert sorted(itertools.chain(*parts(state, 24))) == sorted(expected[12:])


def test_every_row_comes_once_a_pass():
    stream = MixedStream({"a": 0.5, "b": 0.5}, {"a": Passes(rows(0, 30)), "b": rows(1, 50)}, 0)
    drawn = [block[0] for block in take(stream, 200)]
    assert [token for token in drawn if token < 1000] == [i % 30 for i in range(100)]
    assert [token for token in drawn if token >= 1000] == [1000 + i % 50 for i in range(100)]
    assert stream.epochs == {"a": 4, "b": 2} and stream.tokens(200) == {"a": 800, "b": 800}


@pytest.mark.parametrize("kind", ["list", "passes", "datasets", "packed"])
def test_many_passes_are_warned_of_and_refused(kind, monkeypatch):
    said = []
    monkeypatch.setattr(mixture.logger, "warning_once", said.append, raising=False)

    def many(**options):
        made = packed(0) if kind == "packed" else streams([kind] * 4, 5)["code"]
        return MixedStream({"code": 1.0}, {"code": made}, **options)

    stream = many()
    with pytest.raises(MixtureError, match="'code' was read 16 times.* or set allow_repetition"):
        for _ in stream:
            pass
    assert [text.split(" begins")[0] for text in said] == [f"Pass {i} over 'code'" for i in range(5, 17)]
    read = stream._next_block
    assert stream.epochs == {"code": 17} and (kind == "packed" or read == 80)
    assert len(take(many(allow_repetition=True), read + 5)) == read + 5


def test_what_a_run_needs_is_known_before():
    needed = epochs_needed(WEIGHTS, {"code": 700, "maths": 1800, "prose": 0, "chinese": 10_000}, 20_000)
    assert needed == {"code": pytest.approx(10), "maths": pytest.approx(2), "prose": float("inf"), "chinese": 0.4}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"a": 0.5, "b": 0.4}, {}, "the weights sum to 0.9, not to 1"),
        ({"a": 1.5, "b": -0.5}, {}, "the weight of 'a' is a share of tokens from 0 to 1, not 1.5"),
        ({"a": float("nan"), "b": 1}, {}, "the weight of 'a' is a share"),
        ({"a": 1e-6, "b": 1 - 1e-6}, {}, "the weight of 'a', 1e-06, is less than one block in 100,000"),
        ({"a": 0.5, "c": 0.5}, {}, "a weight for 'c', and no stream: there are a, b"),
        ({"a": 1.0}, {}, "the stream 'b' has no weight"),
        ({}, {}, "weights are shares by domain or a preset's name"),
        ("papers", {}, "no preset 'papers': there are article"),
        ("article", {}, "a weight for 'code', and no stream"),
        ({0: {"a": 0.5, "b": 0.5}, 100: {"a": 1.0}}, {}, "a schedule needs block_size"),
        ({8: {"a": 0.5, "b": 0.5}}, {"block_size": 8}, "a schedule begins at token 0, not at 8"),
        ({0: {"a": 0.5, "b": 0.5}, 1: {"a": 1}, 2: {"b": 1}}, {"block_size": 8}, "two entries of the schedule"),
        ({"a": 0.5, "b": 0.5}, {"seed": -1}, "the seed is a number from 0 on"),
        ({"a": 0.5, "b": 0.5}, {"a": []}, "the stream of 'a' is empty"),
        ({"a": 0.5, "b": 0.5}, {"a": iter([])}, "the stream of 'a' can be read once at most"),
        ({"a": 0.5, "b": 0.5}, {"a": 3}, "the stream of 'a' can be read once at most"),
    ],
)
def test_wrong_mixtures_are_refused_by_name(weights, changes, message):
    made = {"a": rows(0, 3), "b": rows(1, 3)}
    made |= {name: changes.pop(name) for name in ("a", "b") if name in changes}
    with pytest.raises(MixtureError, match=message):
        transformers_dsv3.mix(weights, made, **changes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([{"input_ids": [1] * 9}], "a block of 'b' has 9 tokens, others have 8"),
        ([{"text": "words"}], "the stream of 'b' gives no dicts with input_ids"),
        (
            [{"input_ids": [1] * 8, "attention_mask": [1] * 8}],
            "has the columns attention_mask, input_ids, labels, others",
        ),
        (Passes([]), "the stream of 'b' is empty"),
    ],
)
def test_wrong_blocks_are_refused_by_name(other, message):
    stream = MixedStream({"a": 0.875, "b": 0.125}, {"a": rows(0, 9), "b": other}, 0)
    drawn = iter(stream)
    assert next(drawn)["input_ids"].tolist() == [0] * LENGTH or stream.order.domain(0) == "b"
    with pytest.raises(MixtureError, match=message):
        list(itertools.islice(drawn, 20))


def test_a_state_of_another_mixture_is_refused():
    state = MixedStream(WEIGHTS, streams(), 0).state_dict()
    for other in (
        MixedStream(WEIGHTS, streams(), 1),
        MixedStream(WEIGHTS | {"code": 0.36, "maths": 0.17}, streams(), 0),
    ):
        with pytest.raises(MixtureError, match="other weights, domains or another seed"):
            other.load_state_dict(state)


def test_several_workers_are_refused():
    loader = torch.utils.data.DataLoader(MixedStream(WEIGHTS, streams(), 0), num_workers=2)
    with pytest.raises(ValueError, match="dataloader_num_workers=2"):
        next(iter(loader))


def trained(model, folder, steps, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )
    check_stream_arguments(args)
    stream = MixedStream(WEIGHTS, streams(["packed", "list", "datasets", "passes"], 20), 5)
    trainer = Trainer(model=model, args=args, train_dataset=stream, callbacks=[StreamPosition(stream)])
    trainer.train(**options)
    return trainer


def test_trainer_resumes_in_a_mixture(make_model, tmp_path):
    vocabulary = {"vocab_size": 4096}
    whole = trained(make_model(**vocabulary), tmp_path / "whole", 6)
    trained(make_model(**vocabulary), tmp_path / "parts", 3)
    resumed = trained(make_model(seed=1, **vocabulary), tmp_path / "parts", 6, resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    log = whole.state.log_history[5]
    assert sum(log[f"mixture/{name}_tokens"] for name in WEIGHTS) == 6 * 4 * LENGTH and log["mixture/code_epochs"] == 1
    assert log["mixture/code_tokens"] == MixtureOrder(WEIGHTS, list(WEIGHTS), 5, None).counts(24)["code"] * LENGTH


def test_sft_trainer_takes_a_mixture(make_model, byte_tokenizer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    blocks = {
        name: [{"input_ids": [domain * 9 + i for i in range(LENGTH)]}] * 9 for domain, name in enumerate(WEIGHTS)
    }
    stream = transformers_dsv3.mix(WEIGHTS, blocks, seed=2)
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model = make_model(vocab_size=len(byte_tokenizer)).train()
    trainer = SFTTrainer(model=model, args=args, train_dataset=stream.as_dataset(), processing_class=byte_tokenizer)
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.train()
    assert [row for batch in seen for row in batch[:, :LENGTH].tolist()][:12] == take(stream, 12)
