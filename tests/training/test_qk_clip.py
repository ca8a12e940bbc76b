"""QK-clip beside native's queries and keys, and under `Trainer`."""

import copy

import pytest
import torch
from transformers import AttentionInterface, Trainer, TrainingArguments
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import eager_attention_forward

from transformers_dsv3 import QkClipCallback
from transformers_dsv3.training.qk_clip import attentions, clip_heads, largest_logits


@pytest.fixture
def seen_logits(native_twin):
    """Function from a model and its inputs to all of native's attention logits by layer, masked ones -inf."""

    def logits(model, **inputs):
        seen = []

        def attend(module, query, key, value, attention_mask, scaling, **kwargs):
            scores = (query @ key.mT) * scaling
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[..., : key.shape[2]] < -1, -torch.inf)
            seen.append(scores)
            return eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)

        native = native_twin(model)
        AttentionInterface.register("seen_by_test", attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("seen_by_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        native.set_attn_implementation("seen_by_test")
        native.set_experts_implementation("eager")  # which computes in fp64
        with torch.no_grad():
            native.double()(**inputs)
        return seen

    return logits


def largest_by_hooks(model, **inputs):
    found = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, kwargs: found.append(
                largest_logits(
                    module, kwargs["hidden_states"], kwargs["position_embeddings"], kwargs.get("attention_mask")
                )
            ),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0}
YARN["original_max_position_embeddings"] = 16


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}, {"rope_parameters": YARN}], ids=["plain", "q", "yarn"])
def test_the_largest_logit_of_each_head(implementation, fields, make_model, seen_logits, monkeypatch):
    model = make_model(attn_implementation=implementation, **fields)
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}):
        monkeypatch.setattr("transformers_dsv3.training.qk_clip._SCORES", 2 * 4 * 24 * 5)  # five queries at a time
        found = largest_by_hooks(model, **inputs)
        expected = [scores.amax(dim=(0, 2, 3)).float() for scores in seen_logits(model, **inputs)]
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}], ids=["low-rank queries", "whole queries"])
def test_clipping_multiplies_the_logits_of_a_head(fields, make_model, seen_logits):
    model = make_model(num_hidden_layers=1, first_k_dense_replace=1, **fields)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    (before,) = seen_logits(model, input_ids=tokens)
    factors = torch.tensor([1.0, 0.5, 0.25, 0.9])
    clip_heads(model.model.layers[0].self_attn, factors)
    (after,) = seen_logits(model, input_ids=tokens)
    expected = before * factors.double().view(1, -1, 1, 1)
    torch.testing.assert_close(after, expected.masked_fill(before.isinf(), -torch.inf), rtol=1e-5, atol=1e-6)


def train(model, folder, callback, **options):
    rows = torch.randint(0, 96, (16, 12), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        learning_rate=0.0,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_under_trainer(options, make_model, tmp_path):
    model = make_model(initializer_range=0.3)
    logits = torch.stack(largest_by_hooks(copy.deepcopy(model), input_ids=torch.zeros(1, 1, dtype=torch.long)))
    assert logits.shape == (2, 4)
    first, second, third = train(model, tmp_path, QkClipCallback(threshold=1.0), **options)
    assert first["attention/max_logit"] > 1.0 and first["attention/clipped_heads"] > 0
    # Nothing else moves: the rows are all rows, and of what a head has after the first step nothing is above
    assert second["attention/max_logit"] < first["attention/max_logit"]
    assert (
        third["attention/max_logit"] <= 1.0 + 1e-4
        or third["attention/clipped_heads"] < first["attention/clipped_heads"]
    )
    assert not any(attention._forward_pre_hooks for attention in attentions(model))


def test_nothing_is_clipped_below_the_threshold(make_model, tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    logs = train(model, tmp_path, QkClipCallback(every=2))
    assert all(entry["attention/clipped_heads"] == 0 for entry in logs)
    assert ["attention/max_logit" in entry for entry in logs] == [True, False, True]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "bias" not in name)


def test_what_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="threshold=0"):
        QkClipCallback(threshold=0)
    with pytest.raises(ValueError, match="every=0"):
        QkClipCallback(every=0)
    model = make_model()
    model.model.layers[0].self_attn.q_b_proj = torch.nn.Sequential(model.model.layers[0].self_attn.q_b_proj)
    with pytest.raises(ValueError, match="leave it out with adapters"):
        train(model, tmp_path, QkClipCallback())
