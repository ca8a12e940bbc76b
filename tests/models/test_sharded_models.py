"""Models that two processes share by heads and experts: logits, gradients, text and file are those of one process."""

from pathlib import Path

import pytest
import torch

from tests import programs


SCRIPT = Path(__file__).with_name("sharded_models.py")


def compare(*folders):
    run = programs.run_ranks(2, [SCRIPT, *folders])
    assert run.returncode == 0, run.stderr[-4000:]
    for folder in folders:
        assert f"compared {folder.name} eager tp" in run.stdout and f"compared {folder.name} sdpa ep" in run.stdout
    return run


def test_two_processes_compute_what_one_does(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "tiny")
    run = compare(tmp_path / "tiny")
    # Decoding folds the halves of kv_b_proj that each process has, and no rule of the plans goes without a module
    assert "expands the whole context" not in run.stderr and "match nothing" not in run.stderr


@pytest.mark.slow
def test_every_kind_of_model(make_model, trained_model, tmp_path):
    kinds = {
        "queries": {"q_lora_rank": None, "n_shared_experts": 0},
        "tied": {"tie_word_embeddings": True, "attention_bias": True},
        "without_mtp": {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
    }
    for name, fields in kinds.items():
        make_model(**fields).save_pretrained(tmp_path / name)
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    trained_model.save_pretrained(tmp_path / "trained")
    compare(*(tmp_path / name for name in (*kinds, "bf16", "trained")))
