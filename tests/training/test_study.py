"""Studies: runs that are done once, a search for a learning rate, and what their scripts share."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from transformers_dsv3.data.byte_bpe import TokenBlocks, tokenize_corpus
from transformers_dsv3.data.domain_blocks import python_domain_blocks
from transformers_dsv3.data.python_reference import python_reference
from transformers_dsv3.data.text_files import Document, build_corpus
from transformers_dsv3.training.study import (
    Study,
    best_rate,
    losses_of,
    mean_of_seeds,
    plot_entries,
    study_arguments,
)


def test_runs_are_done_once(tmp_path, capsys):
    path = tmp_path / "new" / "study.json"
    ran = []

    def run(rate):
        ran.append(rate)
        # Written before the next run begins
        assert len(json.loads(path.read_text())) == len(ran) - 1 if path.exists() else len(ran) == 1
        return {"loss": 1 / rate, "rank": None}

    def command():
        study = Study(path)
        return [study.result({"rate": rate, "seed": 0}, lambda rate=rate: run(rate)) for rate in (2.0, 3.0, 2.0)]

    first = command()
    assert ran == [2.0, 3.0] and first[0] is first[2]
    assert first[1] == {"rate": 3.0, "seed": 0, "loss": 1 / 3, "rank": None}
    assert capsys.readouterr().out.splitlines()[1] == "rate 3, seed 0, loss 0.33333, rank None"
    assert command() == first and len(ran) == 2
    assert json.loads(path.read_text()) == first[:2]


def test_a_run_that_fails_leaves_the_others(tmp_path):
    study = Study(tmp_path / "study.json")
    study.result({"seed": 0}, lambda: {"loss": 1.0})
    with pytest.raises(KeyboardInterrupt):
        study.result({"seed": 1}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert Study(study.path).entries == [{"seed": 0, "loss": 1.0}]


def test_settings_that_differ_or_are_within_one_field(tmp_path, capsys):
    """An entry without a field of the setting is another run; a setting may be a dictionary in a field."""
    (tmp_path / "study.json").write_text(
        '[{"seed": 0, "loss": 5.0}, {"setting": {"rate": 1, "seed": 0}, "loss": 2.0}]'
    )
    study = Study(tmp_path / "study.json")
    assert study.result({"seed": 0, "steps": 3}, lambda: {"loss": 4.0})["loss"] == 4.0
    assert study.result({"setting": {"rate": 1, "seed": 0}}, lambda: {})["loss"] == 2.0
    assert capsys.readouterr().out.splitlines()[1] == "rate 1, seed 0, loss 2"


@settings(deadline=None)
@given(losses=st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True), data=st.data(), valley=st.booleans())
def test_the_best_rate_is_not_at_the_end_of_what_was_tried(losses, data, valley):
    if valley:  # falls, then rises: the search has to end at the bottom
        bottom = losses.index(min(losses))
        losses = sorted(losses[: bottom + 1], reverse=True) + sorted(losses[bottom + 1 :])
    grid = tuple(10.0**at for at in range(len(losses)))
    first = data.draw(st.lists(st.sampled_from(grid), min_size=1, unique=True))
    tried = {}

    def loss(rate):
        assert rate not in tried
        tried[rate] = losses[grid.index(rate)]
        return tried[rate]

    best = best_rate(loss, grid, first)
    place = grid.index(best)
    assert tried[best] == min(tried.values())
    assert set(grid[max(place - 1, 0) : place + 2]) <= tried.keys() and set(first) <= tried.keys()
    if valley:
        assert tried[best] == min(losses)
    assert best_rate(lambda rate: losses[grid.index(rate)], grid) == grid[losses.index(min(losses))]


def test_a_run_is_repeated_bit_for_bit(make_model, tmp_path):
    blocks = TokenBlocks(torch.arange(96) % 32, 8)

    def weights():
        torch.manual_seed(0)
        model = make_model(vocab_size=32, num_nextn_predict_layers=0)
        args = study_arguments(
            str(tmp_path), 3, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True
        )
        assert (args.seed, args.data_seed, args.save_strategy, args.report_to) == (3, 3, "no", [])
        trainer = Trainer(model=model, args=args, train_dataset=blocks)
        trainer.train()
        losses = losses_of(trainer, {"first": TokenBlocks(blocks.blocks[0], 8), "all": blocks})
        return losses, model.state_dict()

    (losses, once), (again, twice) = weights(), weights()
    assert losses == again and list(losses) == ["first", "all"] and all(map(math.isfinite, losses.values()))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not list(tmp_path.iterdir())


def test_means_of_seeds():
    assert mean_of_seeds([1.0, 2.0]) == "1.500 (1.000 / 2.000)"


def test_entries_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    entries = [{"rate": rate, "decay": 1.0, "loss": 1.0} for rate in (0.1, 0.01, 0, None)]
    for number, given_entries in enumerate((entries, entries[:1])):
        path = tmp_path / f"{number}.png"
        plot_entries(path, given_entries, ("rate", "γ"), {"loss": "loss"}, ("decay", {1.0: "falls"}), "none")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_domain_in_four_parts(byte_tokenizer):
    blocks = python_domain_blocks(byte_tokenizer, length=64)
    assert list(blocks.held_out) == ["validation", "test", "general"] and blocks.train.blocks.shape[1] == 64
    halves = [blocks.held_out[name].blocks.numel() for name in ("validation", "test")]
    assert max(halves) < 1.2 * min(halves)
    # As much as is held out, up to a last block of each half
    held_out = sum(len(byte_tokenizer(document.text).input_ids) + 1 for document in python_reference().held_out)
    assert 0 <= held_out - sum(halves) < 2 * 64


def test_a_corpus_in_its_own_tokens():
    documents = [Document(f"{number}.txt", f"words and words {number}\n" * 40) for number in range(20)]
    corpus = build_corpus(documents, "words", held_out_share=0.2)
    tokens = tokenize_corpus(corpus, 280, 16, model_max_length=64)
    assert len(tokens.tokenizer) <= 280 and tokens.tokenizer.model_max_length == 64
    decode = tokens.tokenizer.decode
    assert decode(tokens.held_out, skip_special_tokens=True) == "".join(d.text for d in corpus.held_out)
    train = "".join(d.text for d in corpus.train)
    read = decode(tokens.train.blocks.flatten(), skip_special_tokens=True)
    assert train.startswith(read) and len(train) - len(read) < 16 * 20
