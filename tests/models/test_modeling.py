"""The models as Transformers, accelerate, PEFT and Trainer use them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

import transformers_dsv3
from transformers_dsv3 import (
    Dsv3ForCausalLM,
    Dsv3ForSequenceClassification,
    Dsv3ForTokenClassification,
    Dsv3Model,
)


AUTO_CLASSES = [
    (AutoModel, Dsv3Model),
    (AutoModelForCausalLM, Dsv3ForCausalLM),
    (AutoModelForSequenceClassification, Dsv3ForSequenceClassification),
    (AutoModelForTokenClassification, Dsv3ForTokenClassification),
]


def prompt(batch=2, length=10, seed=0):
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(ours, reference, tolerance=1e-5):
    assert ours.shape == reference.shape
    assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("auto, expected", AUTO_CLASSES)
def test_auto_classes_reach_the_plugin(auto, expected, make_model, tmp_path):
    model = make_model()
    assert type(auto.from_config(model.config)) is expected
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is expected
    backbone = loaded if expected is Dsv3Model else loaded.model
    with torch.no_grad():
        close(backbone.eval()(prompt()).last_hidden_state, model.model(prompt()).last_hidden_state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, make_model):
    tokens = prompt()
    model = make_model().train()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    passes = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    recomputed = gradients()
    assert len(passes) == 2
    assert recomputed.keys() == expected.keys()
    for name, gradient in recomputed.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 5])])
def test_logits_to_keep(kept, make_model):
    model = make_model()
    with torch.no_grad():
        every = model(prompt()).logits
        logits = model(prompt(), logits_to_keep=kept).logits
    close(logits, every[:, -kept:] if isinstance(kept, int) else every[:, kept])


@pytest.mark.parametrize("decode", [False, True])
def test_recorded_outputs_equal_native(decode, make_model, native_twin):
    """Hidden states, attention weights and router logits: those of the main model's layers, not of MTP layers."""
    ours = make_model(num_hidden_layers=3, num_nextn_predict_layers=2, attn_implementation="eager")
    native = native_twin(ours)
    tokens = prompt()
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    results = []
    for model in (ours, native):
        with torch.no_grad():
            if decode:
                cache = DynamicCache(config=model.config)
                model(tokens[:, :-1], past_key_values=cache)
                results.append(model(tokens[:, -1:], past_key_values=cache, **wanted))
            else:
                results.append(model(tokens, **wanted))
    queries = 1 if decode else 10
    assert [tuple(h.shape) for h in results[0].hidden_states] == [(2, queries, 32)] * 4
    assert [tuple(a.shape) for a in results[0].attentions] == [(2, 4, queries, 10)] * 3
    assert [tuple(r.shape) for r in results[0].router_logits] == [(2 * queries, 8)] * 2
    for kind in ("hidden_states", "attentions"):
        for mine, theirs in zip(results[0][kind], results[1][kind], strict=True):
            close(mine, theirs)
    native_router = results[1].get("router_logits")
    if native_router is None:  # older Transformers does not give them
        routers = [native.model.layers[i].mlp.gate for i in (1, 2)]
        seen = []
        hooks = [
            router.register_forward_hook(lambda module, i, outputs: seen.append(outputs[0])) for router in routers
        ]
        with torch.no_grad():
            native(tokens)
        for hook in hooks:
            hook.remove()
        native_router = [r.view(2, 10, -1)[:, -queries:].reshape(2 * queries, -1) for r in seen]
    for mine, theirs in zip(results[0].router_logits, native_router, strict=True):
        close(mine, theirs)


def test_training_on_mtp_layers_does_not_add_to_recorded_outputs(make_model):
    model = make_model(mtp_loss_weight=0.3, num_nextn_predict_layers=2, attn_implementation="eager").train()
    tokens = prompt()
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    output = model(tokens, labels=tokens, **wanted)
    assert output.mtp_loss is not None
    assert (len(output.hidden_states), len(output.attentions), len(output.router_logits)) == (3, 2, 1)


def test_returned_as_a_tuple(make_model):
    model = make_model()
    with torch.no_grad():
        close(model(prompt(), return_dict=False)[0], model(prompt()).logits)


def test_inputs_embeds_stand_in_for_ids(make_model):
    model = make_model()
    with torch.no_grad():
        close(model(inputs_embeds=model.get_input_embeddings()(prompt())).logits, model(prompt()).logits)


@pytest.mark.parametrize("kind", ["one device", "cpu offload", "disk offload", "auto"])
def test_device_map(kind, make_model, tmp_path):
    """Weights that come and go give the same logits, prefill and decoding, and the same drafted text."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"": "cpu"}}
    if kind == "auto":
        options = {"device_map": "auto"}
    elif kind == "disk offload":
        places = dict.fromkeys(("model.layers.0", "model.layers.1", "model.mtp.0"), "disk")
        for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"):
            places[name] = "cpu"
        options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    if kind == "cpu offload":
        # from_pretrained keeps CPU weights in place where there is no accelerator to bring them to
        from accelerate import cpu_offload

        loaded = cpu_offload(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.device("cpu"))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    loaded.eval()
    attention = loaded.model.layers[0].self_attn
    assert attention.kv_b_proj.weight.is_meta == ("offload" in kind)
    assert (attention.absorbed_refusal() is None) == ("offload" not in kind)
    tokens = prompt()
    with torch.no_grad():
        close(loaded(tokens).logits, model(tokens).logits)
        caches = [m(tokens[:, :-1], use_cache=True).past_key_values for m in (loaded, model)]
        steps = [m(tokens[:, -1:], past_key_values=c).logits for m, c in zip((loaded, model), caches)]
    close(*steps)
    settings = {"max_new_tokens": 6, "do_sample": False, "use_mtp": True, "eos_token_id": None}
    assert torch.equal(loaded.generate(tokens, **settings), model.generate(tokens, **settings))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [104, 64])
def test_resized_vocabulary(size, tied, make_model, tmp_path):
    """Old tokens keep their logits; new ones can be used; the checkpoint follows."""
    model = make_model(tie_word_embeddings=tied)
    tokens = prompt().clamp(max=60)
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(size)
        after = model(tokens).logits
        assert model.config.vocab_size == model.vocab_size == size
        assert after.shape[-1] == size
        kept = min(size, 96)
        close(after[..., :kept], before[..., :kept])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        with pytest.raises(ValueError, match="outside the vocabulary"):
            model(tokens.fill_(size))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        close(loaded(tokens.fill_(size - 1)).logits, model(tokens).logits)


def test_tied_head_is_saved_once_and_tied_again(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with torch.no_grad():
        close(loaded(prompt()).logits, model(prompt()).logits)


@pytest.mark.parametrize(
    "cls, native_class",
    [
        (Dsv3ForSequenceClassification, DeepseekV3ForSequenceClassification),
        (Dsv3ForTokenClassification, DeepseekV3ForTokenClassification),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_heads_equal_native(cls, native_class, side, make_model, native_twin):
    ours = make_model(cls, num_labels=3, pad_token_id=0)
    native = native_twin(ours, native_class)
    tokens = prompt(batch=3)
    tokens[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    mask = (tokens != 0).long()
    labels = torch.tensor([0, 2, 1])
    if cls is Dsv3ForTokenClassification:
        labels = (tokens % 3).masked_fill(mask == 0, -100)
    results = [m(tokens, attention_mask=mask, labels=labels) for m in (ours, native)]
    if cls is Dsv3ForTokenClassification:
        close(results[0].logits[mask.bool()], results[1].logits[mask.bool()])
    else:
        close(results[0].logits, results[1].logits)
    assert float(results[0].loss) == pytest.approx(float(results[1].loss), rel=1e-5)
    ours.train()(tokens, attention_mask=mask, labels=labels).loss.backward()
    assert ours.score.weight.grad.norm() > 0 and ours.model.layers[0].self_attn.o_proj.weight.grad.norm() > 0


class Rows(Dataset):
    """Rows of one text, which a model can learn in two steps at a high rate."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        row = prompt(batch=1, seed=0)[0]
        return {"input_ids": row, "labels": row}


def test_trainer_runs_unchanged(make_model, tmp_path):
    model = make_model(mtp_loss_weight=0.3).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    row = Rows()[0]["input_ids"][None]
    with torch.no_grad():
        start = float(model.eval()(row, labels=row).loss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    with torch.no_grad():
        assert float(model.eval()(row, labels=row).loss) < start
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == before.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with torch.no_grad():
        close(loaded(row).logits, model(row).logits)


def test_attention_lora(make_model):
    """PEFT adapters on the attention projections train, act while decoding, and merge."""
    model = make_model()
    tokens = prompt()
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    loss = wrapped(input_ids=tokens, labels=tokens).loss
    loss.backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    for name, parameter in adapters.items():
        in_mtp = ".mtp.0." in name
        assert (parameter.grad is None) == in_mtp, name
        assert in_mtp or parameter.grad.norm() > 0
    wrapped.eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        adapted = wrapped(input_ids=tokens).logits
        text = wrapped.generate(input_ids=tokens, **settings)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(input_ids=tokens).logits, adapted, atol=1e-3)
        merged = wrapped.merge_and_unload()
        close(merged(tokens).logits, adapted)
    assert torch.equal(merged.generate(tokens, **settings), text)
    assert type(merged) is Dsv3ForCausalLM


def test_experts_implementations_agree(make_model):
    model = make_model()
    logits = {}
    with torch.no_grad():
        for name in ("eager", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(name)
            assert model.config._experts_implementation == name
            logits[name] = model(prompt()).logits
    close(logits["grouped_mm"], logits["eager"])
    close(logits["batched_mm"], logits["eager"])


def test_explain_is_public(make_model):
    assert "attention, absorbed" in transformers_dsv3.explain(make_model())


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["o_proj"], "trainable_token_indices": [3, 5]}],
)
def test_adapters_on_the_embedding(make_model, settings):
    model = get_peft_model(make_model(), LoraConfig(r=2, **settings))
    tokens = torch.ones(1, 6, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False).shape[1] <= 9
