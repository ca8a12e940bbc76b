"""Preference accuracy beside log-probabilities that are computed pair by pair."""

import torch

from transformers_dsv3.evaluation.preferences import preference_accuracy


def test_accuracy_is_that_of_single_pairs(make_model, byte_tokenizer):
    model = make_model(vocab_size=len(byte_tokenizer), initializer_range=0.3)
    texts = [("a", "bc", "dxe"), ("long prompt ", "x", "yyyy"), ("q", "rst", "u"), ("ab", "cd", "dc")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), text), kind=f"k{n % 2}") for n, text in enumerate(texts * 3)]
    for n, row in enumerate(rows):
        row["chosen"] += chr(97 + n)

    def log_probability(prompt, completion):
        ids = torch.tensor([byte_tokenizer(prompt + completion)["input_ids"] + [byte_tokenizer.eos_token_id]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].double().log_softmax(-1)
        return float(logs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())

    right = [log_probability(r["prompt"], r["chosen"]) > log_probability(r["prompt"], r["rejected"]) for r in rows]
    assert 0 < sum(right) < len(right)
    seen = preference_accuracy(model, byte_tokenizer, rows, max_length=64, batch_size=5)
    assert seen["all"] == sum(right) / len(right)
    assert seen["k0"] == sum(right[::2]) / 6 and seen["k1"] == sum(right[1::2]) / 6
    shorter = [(len(r["chosen"]) < len(r["rejected"])) + 0.5 * (len(r["chosen"]) == len(r["rejected"])) for r in rows]
    assert seen["shorter_is_chosen"] == sum(shorter) / len(shorter)
