"""Adapters over packed weights: gradients beside the dequantised model, memory, files, trainers, merging."""

import copy

import peft
import pytest
import torch
from packed_files import memory_of, plain_twin, values_of
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_dsv3 import DeepseekV3ForCausalLM, PackedWeightsConfig, lora_config, quantize
from transformers_dsv3.compression.quantized_weights import QuantizedExperts, QuantizedLinear
from transformers_dsv3.kernels import backends


IDS = torch.arange(2, 40)[None]
# Routed experts, shared ones, attention with what is folded in decoding, dense layers
EVERYWHERE = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(model, seed=1, **options):
    """With an adapter whose second factors are not zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(**{**EVERYWHERE, **options}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model):
    """Of the adapters by their names, and of the inputs."""
    embedding = model.get_input_embeddings()
    inputs = embedding(IDS).detach().float().requires_grad_()
    loss = model.train()(inputs_embeds=inputs, labels=IDS).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    return {"loss": loss.detach(), "inputs": inputs.grad, **found}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", ["loop", "eager", "hooked"])
def test_gradients_are_those_of_the_dequantised_model(make_wide, monkeypatch, bits, way):
    model = make_wide()
    quantized = quantize(copy.deepcopy(model), bits)
    twin = adapted(plain_twin(model, quantized))
    quantized = adapted(quantized)
    stacks = [m for m in quantized.modules() if isinstance(m, QuantizedExperts)]
    assert len(stacks) == 2 and isinstance(stacks[0].lora_class, type)  # MTP's too
    called = []
    if way == "eager":
        rows = backends.ADAPTED.backends
        monkeypatch.setattr(backends.ADAPTED, "backends", tuple(row for row in rows if row.name == "eager"))
    if way == "hooked":
        stacks[0].register_forward_hook(lambda *arguments: called.append(1))
    expected = gradients(twin)
    found = gradients(quantized)
    assert found.keys() == expected.keys() and any(".experts.base_layer.lora_A" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6)
    assert bool(called) == (way == "hooked")
    assert not stacks[0].added


def test_gradients_without_adapters_of_experts(make_wide):
    """Inputs of frozen layers have gradients too, through the packed products."""
    model = make_wide(num_nextn_predict_layers=0)
    quantized = quantize(copy.deepcopy(model), 4)
    twin = plain_twin(model, quantized)
    grads = []
    for each in (quantized.train(), twin.train()):
        inputs = twin.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=inputs, labels=IDS).loss.backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


def test_second_derivatives(make_wide):
    results = []
    model = make_wide(num_nextn_predict_layers=0)
    quantized = quantize(copy.deepcopy(model), 4)
    twin = plain_twin(model, quantized)
    for each in (adapted(quantized), adapted(twin)):
        inputs = each.get_input_embeddings()(IDS).detach().float().requires_grad_()
        loss = each.train()(inputs_embeds=inputs, labels=IDS).loss
        (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
        grad.square().sum().backward()
        results.append(inputs.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)


def test_weights_stay_packed(make_wide):
    """Training adds the adapters; no dequantised weight is kept for the backward pass."""
    quantized = quantize(make_wide(num_nextn_predict_layers=0), 4).train()
    before = memory_of(quantized)
    trained = adapted(quantized)
    own = sum(p.nbytes for p in trained.parameters() if p.requires_grad)
    linear = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    stacks = [module for module in quantized.modules() if isinstance(module, QuantizedExperts)]
    matrices = {(layer.out_features, layer.in_features) for layer in linear}
    for shape in (stacks[0].shape_of(name) for name in ("gate_up_proj", "down_proj")):
        matrices |= {shape, shape[1:]}
    kept = []
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(2, 13)[None]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        trained(ids, labels=ids).loss.backward()
    optimizer.step()
    assert len(kept) > 20 and not [t.shape for t in kept if t.is_floating_point() and tuple(t.shape) in matrices]
    assert memory_of(trained) == before + own
    assert {p.dtype for stack in stacks for p in stack.parameters(recurse=False)} == {torch.uint8}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_after_peft_has_prepared_it(make_wide, tmp_path, checkpointing):
    """`prepare_model_for_kbit_training`, files in PEFT's format, the same adapter on a dequantised model."""
    quantize(make_wide().to(torch.bfloat16), 4).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.hf_quantizer.is_trainable
    prepared = peft.prepare_model_for_kbit_training(base)
    assert not any(p.requires_grad for p in prepared.parameters())
    model = adapted(prepared).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=PackedWeightsConfig(dequantize=True)
    )
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = again(IDS).logits
        torch.testing.assert_close(logits, plain(IDS).logits, rtol=1e-3, atol=1e-3)
        with again.disable_adapter():
            bare = again(IDS).logits
            original = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
            torch.testing.assert_close(bare, original(IDS).logits, rtol=1e-3, atol=1e-3)
        assert (logits - bare).abs().max() > 0.01


def test_under_trl(make_wide, byte_tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    folder = tmp_path / "base"
    quantize(make_wide(vocab_size=258), 4).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = trl.SFTConfig(
        tmp_path / "run",
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        max_length=32,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=True,
    )
    trainer = trl.SFTTrainer(
        model,
        options,
        train_dataset=datasets.Dataset.from_dict({"text": ["a packed model learns, and learns"] * 8}),
        processing_class=byte_tokenizer,
        peft_config=peft.LoraConfig(**EVERYWHERE),
    )
    before = values_of(AutoModelForCausalLM.from_pretrained(folder))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    second = [p for name, p in trainer.model.named_parameters() if "experts" in name and "lora_B" in name]
    assert second and all(p.abs().sum() > 0 for p in second)
    after = values_of(trainer.model.unload())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("bits, stored_bits", [(4, 4), (8, 8), (4, 3)])
def test_merging_rounds_and_says_what_it_cost(make_wide, tmp_path, bits, stored_bits):
    quantized = quantize(make_wide(num_nextn_predict_layers=0), bits)
    for module in quantized.modules():
        if getattr(module, "bits", None) == bits:
            module.stored_bits = stored_bits
    exact = adapted(plain_twin(make_wide(num_nextn_predict_layers=0), quantized))
    wanted = values_of(exact.merge_and_unload())
    model = adapted(quantized)
    with pytest.raises(ValueError, match="merge_adapter: .* cannot be undone. Use `merge_and_unload`"):
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert type(merged) is DeepseekV3ForCausalLM and isinstance(merged.model.layers[1].mlp.experts, QuantizedExperts)
    costs = merged.merge_costs
    assert "model.layers.1.mlp.experts.gate_up_proj" in costs and "model.layers.0.self_attn.o_proj.weight" in costs
    held = values_of(merged)
    lost = {name: held[name] - value for name, value in wanted.items()}
    stack = torch.stack([lost[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    cost = costs["model.layers.1.mlp.experts.down_proj"]
    assert cost.largest == pytest.approx(stack.abs().max().item(), rel=1e-3)
    assert cost.root_mean_square == pytest.approx(stack.square().mean().sqrt().item(), rel=1e-3)
    assert cost.weights == stack.numel() and 0 < cost.share_of_change < {8: 0.02, 4: 0.3, 3: 0.6}[stored_bits]
    merged.save_pretrained(tmp_path)
    again = values_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(again[name], value) for name, value in held.items())


def test_merging_says_so_aloud(make_wide):
    from transformers.utils import logging

    lines, logger = [], logging.get_logger("transformers_dsv3.training.lora_tuner")
    logger.warning = lines.append
    try:
        adapted(quantize(make_wide(num_nextn_predict_layers=0), 4), target_modules=["o_proj"]).merge_and_unload()
    finally:
        del logger.warning
    (line,) = lines
    assert "merged into 2 quantised weights" in line and "of what the adapters add" in line and "o_proj" in line


def test_broken_adapters_are_not_merged(make_wide):
    quantized = quantize(make_wide(num_nextn_predict_layers=0), 4)
    before = values_of(quantized)
    model = adapted(quantized)
    model.base_model.model.model.layers[1].self_attn.o_proj.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj has values that are not finite; nothing was"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in values_of(model.unload()).items())


def test_targets_and_budgets(make_wide):
    """Names mean on a packed model what they mean on a plain one, and so do shares of its parameters."""
    plain = make_wide()
    packed = quantize(copy.deepcopy(plain), 4)
    assert packed.num_parameters() == plain.num_parameters()
    for options in ({"exclude_embeddings": True}, {"only_trainable": True}):
        if "only_trainable" not in options:
            assert packed.num_parameters(**options) == plain.num_parameters(**options)
    configs = [lora_config(model, budget=0.1, task_type="CAUSAL_LM") for model in (plain, packed)]
    assert configs[0].to_dict() == configs[1].to_dict()
    names = [{name for name, p in adapted(model).named_parameters() if "lora_" in name} for model in (plain, packed)]
    assert names[0] == names[1]


@pytest.mark.parametrize("asked", [{"use_dora": True}, {"init_lora_weights": "orthogonal"}])
@pytest.mark.parametrize("target", ["o_proj", "experts"])
def test_adapters_that_compute_with_the_weights_are_refused(make_wide, asked, target):
    targets = {"target_modules": ["o_proj"]} if target == "o_proj" else {"target_parameters": ["experts.down_proj"]}
    config = peft.LoraConfig(r=4, **targets, **asked)
    with pytest.raises(ValueError, match=r"use_dora|`init_lora_weights=.*4 bits: leave it out, or load with"):
        peft.get_peft_model(quantize(make_wide(), 4), config)


def test_what_peft_cannot_do_is_refused_by_name(make_wide):
    model = quantize(make_wide(), 4)
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head holds quantised weights"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"modules_to_save: model.embed_tokens holds quantised weights"):
        peft.get_peft_model(
            model,
            peft.IA3Config(target_modules=["kv_b_proj"], feedforward_modules=[], modules_to_save=["embed_tokens"]),
        )
    with pytest.raises(ValueError, match=r"target_parameters: .*o_proj.weight has quantised weights.*target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(target_parameters=["o_proj.weight"]))
    with pytest.raises(ValueError, match=r"resize_token_embeddings: the embedding and the head hold quantised"):
        model.resize_token_embeddings(200)
    assert model.resize_token_embeddings(150) is model.get_input_embeddings()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["norm"]))
