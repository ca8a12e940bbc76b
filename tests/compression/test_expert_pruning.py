"""Pruned experts: what they are chosen by, models and files beside the same model with them masked, and bad input."""

import copy
import json
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import programs
from transformers_dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM, quantize
from transformers_dsv3.compression.expert_choice import ExpertImportance, choose_experts, kept_experts
from transformers_dsv3.compression.expert_pruning import LayerImportance, expert_importance, prune_experts
from transformers_dsv3.compression.pruned_checkpoint import prune_checkpoint
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError
from transformers_dsv3.option_error import OptionError


TOKENS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def mixtures_of(model):
    layers = [*model.model.layers, *model.model.mtp_layers]
    return {number: layer.mlp for number, layer in enumerate(layers) if hasattr(layer.mlp, "gate")}


def masked(model, kept):
    """A copy in which the router never chooses the experts that were removed."""
    twin = copy.deepcopy(model)
    for layer, mixture in mixtures_of(twin).items():
        removed = sorted(set(range(mixture.gate.num_experts)) - set(kept[layer]))
        mixture.gate.e_score_correction_bias[removed] = float("-inf")
    return twin


def mtp_states(model, tokens):
    """The last hidden states of the MTP layers, each fed what it is fed in evaluation."""
    base = model.model
    hidden, embeds = base(input_ids=tokens, use_cache=False).last_hidden_state, base.embed_tokens(tokens)
    inputs = base.attention_inputs(embeds, None, torch.arange(tokens.shape[1])[None], None)
    for depth, layer in enumerate(base.mtp_layers):
        hidden = layer(hidden, F.pad(embeds[:, depth + 1 :], (0, 0, 0, depth + 1)), **inputs)
    return hidden


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(num_hidden_layers=3, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def importance(model):
    return expert_importance(model, TOKENS.flatten(), window=20)


@pytest.fixture
def folder(model, tmp_path):
    path = tmp_path / "whole"
    model.save_pretrained(path)
    (path / "tokenizer_config.json").write_text("{}")
    (path / "evaluation.json").write_text("{}")
    return path


def test_importance_is_that_of_the_definition(model, importance):
    """Token by token, in float64, from the layers' inputs."""
    inputs = {}

    def keep(layer):
        return lambda module, given: inputs.update({layer: given[0]})

    handles = [mixture.register_forward_pre_hook(keep(layer)) for layer, mixture in mixtures_of(model).items()]
    windows = TOKENS.flatten().view(4, 20)
    mtp_states(model, windows)
    for handle in handles:
        handle.remove()
    assert importance.layers == (1, 2, 3) and importance.tokens == 80
    for row, layer in enumerate(importance.layers):
        mixture = copy.deepcopy(mixtures_of(model)[layer]).double()
        of_text = inputs[layer][:, :-1] if layer == 3 else inputs[layer]  # behind the last token none is fed
        tokens = of_text.flatten(0, 1)
        _, weights, indices = mixtures_of(model)[layer].gate(tokens)
        sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8)
        for token, chosen, mixed in zip(tokens.double(), indices, weights):
            for expert, weight in zip(chosen.tolist(), mixed.tolist()):
                one = torch.tensor([[expert]]), torch.ones(1, 1, dtype=torch.float64)
                sums[expert] += weight * mixture.experts.double()(token[None], *one).norm()
                counts[expert] += 1
        torch.testing.assert_close(importance.reap[row], sums / counts.clamp(min=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(importance.frequency[row], counts.double() / len(tokens))
    assert not model.training and not any(m.gate._forward_hooks for m in mixtures_of(model).values())


def test_layers_are_gathered_part_by_part():
    generator = torch.Generator().manual_seed(1)
    weights, norms = (torch.rand(30, 3, generator=generator) for _ in range(2))
    indices = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(30)])
    whole, parts = LayerImportance(8), LayerImportance(8)
    whole.add(weights, indices, norms)
    for part in (slice(0, 7), slice(7, 30)):
        parts.add(weights[part], indices[part], norms[part])
    torch.testing.assert_close(whole.reap, parts.reap)
    assert torch.equal(whole.tokens_per_expert, parts.tokens_per_expert) and parts.tokens == 30


@settings(deadline=None, max_examples=60)
@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    of_group=st.integers(2, 12),
    top=st.integers(1, 8),
    topk_group=st.integers(1, 8),
    removed=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_choices_suit_the_router(groups, of_group, top, topk_group, removed, seed):
    topk_group = min(topk_group, groups)
    fields = {"n_routed_experts": groups * of_group, "n_group": groups, "topk_group": topk_group}
    top = min(top, topk_group * of_group)
    config = DeepseekV3Config(
        num_hidden_layers=4, num_nextn_predict_layers=1, first_k_dense_replace=2, num_experts_per_tok=top, **fields
    )
    left = of_group - removed
    share = removed / of_group
    try:
        smaller = {**fields, "n_routed_experts": groups * left} if left > 0 and removed < of_group else None
        fits = smaller is not None and DeepseekV3Config(num_experts_per_tok=top, **smaller) is not None
    except ValueError:
        fits = False
    if not fits:
        with pytest.raises(OptionError) as refused:
            kept_experts(config, share)
        assert refused.value.option == "--prune"
        return
    assert kept_experts(config, share) == groups * left
    scores = torch.rand(3, groups * of_group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    importance = ExpertImportance((2, 3, 4), scores, scores.flip(1), 1)
    for by, of in (("reap", scores), ("frequency", scores.flip(1)), ("random", None)):
        kept = choose_experts(config, share, importance, by, seed)
        assert list(kept) == [2, 3, 4]
        for row, experts in enumerate(kept.values()):
            assert list(experts) == sorted(set(experts))
            for group in range(groups):
                mine = [e for e in experts if e // of_group == group]
                others = [e for e in range(group * of_group, (group + 1) * of_group) if e not in mine]
                assert len(mine) == left
                if of is not None and others:
                    assert of[row][mine].min() >= of[row][others].max()
    assert choose_experts(config, share, by="random", seed=seed) == choose_experts(
        config, share, by="random", seed=seed
    )


@pytest.mark.parametrize("fields", [{}, {"n_group": 1, "topk_group": 1}], ids=["groups", "no groups"])
@pytest.mark.parametrize("by", ["reap", "frequency", "random"])
def test_a_pruned_model_is_one_whose_router_never_chooses_the_others(make_model, fields, by):
    model = make_model(num_hidden_layers=3, **fields)
    importance = None if by == "random" else expert_importance(model, TOKENS.flatten(), window=20)
    pruned = copy.deepcopy(model)
    kept = prune_experts(pruned, 0.5 if fields else 0.25, importance, by)
    twin = masked(model, kept)
    with torch.no_grad():
        torch.testing.assert_close(pruned(TOKENS).logits, twin(TOKENS).logits, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(mtp_states(pruned, TOKENS), mtp_states(twin, TOKENS), rtol=1e-5, atol=1e-5)
    assert pruned.config.n_routed_experts == (4 if fields else 6)
    for mixture in mixtures_of(pruned).values():
        assert mixture.gate.e_score_correction_bias.mean().abs() < 1e-6
        assert mixture.gate.e_score_correction_bias.dtype == torch.float32
        assert mixture.experts.num_experts == len(mixture.experts.gate_up_proj) == pruned.config.n_routed_experts
    pruned.train()(TOKENS, labels=TOKENS).loss.backward()
    assert pruned.model.layers[1].mlp.experts.down_proj.grad.shape[0] == pruned.config.n_routed_experts


def test_a_model_that_has_decoded_is_pruned(model):
    """What decoding has kept of the whole model is of no more use."""

    def logits(model):
        options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        return torch.cat(model.generate(TOKENS[:1], max_new_tokens=6, **options).logits)

    used, fresh = copy.deepcopy(model), copy.deepcopy(model)
    whole = logits(used)
    for one in (used, fresh):
        prune_experts(one, 0.25, by="random", seed=1)  # the least important are not chosen anyway
    pruned = logits(used)
    torch.testing.assert_close(pruned, logits(fresh), rtol=1e-5, atol=1e-6)
    assert (pruned - whole).abs().amax(dim=1).min() > 1e-3


def test_the_pruned_checkpoint_is_the_pruned_model(model, importance, folder, tmp_path):
    pruned = copy.deepcopy(model)
    kept = prune_experts(pruned, 0.25, importance)
    assert prune_checkpoint(folder, tmp_path / "pruned", 0.25, importance) == kept
    assert sorted(os.listdir(tmp_path / "pruned")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert type(loaded) is DeepseekV3ForCausalLM and loaded.config.n_routed_experts == 6
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, pruned(TOKENS).logits)
    # And what the model itself saves is the same, byte for byte
    pruned.save_pretrained(tmp_path / "saved")
    mine, its = (load_file(tmp_path / place / "model.safetensors") for place in ("pruned", "saved"))
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "pruned"))
    assert after == {**before, "n_routed_experts": 6}


def test_shards_and_the_files_of_quantised_weights(model, importance, tmp_path):
    """Several shards with an index, and three tensors for each expert in place of one."""
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    kept = prune_checkpoint(tmp_path / "whole", tmp_path / "pruned", 0.25, importance)
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 3
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    twin = copy.deepcopy(model)
    prune_experts(twin, 0.25, importance)
    assert all(torch.equal(pruned.state_dict()[name], tensor) for name, tensor in twin.state_dict().items())
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    stored = [load_file(path) for path in (tmp_path / "pruned").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in stored for t in file.values())

    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    extra = {f"{name}_scale": t[:, :1].clone() for name, t in tensors.items() if ".mlp.experts." in name}
    save_file({**tensors, **extra}, tmp_path / "one" / "model.safetensors")
    prune_checkpoint(tmp_path / "one", tmp_path / "fewer", 0.25, importance)
    fewer = load_file(tmp_path / "fewer" / "model.safetensors")
    for layer, experts in kept.items():
        for new, old in enumerate(experts):
            name = "model.layers.{}.mlp.experts.{}.up_proj.weight_scale"
            assert torch.equal(fewer[name.format(layer, new)], extra[name.format(layer, old)])


KILLED = """
import os, signal, sys
from transformers_dsv3.compression import pruned_checkpoint
pruned_checkpoint.publish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
pruned_checkpoint.prune_checkpoint(sys.argv[1], sys.argv[2], 0.25, by="random")
"""


def test_killed_while_writing(folder, tmp_path):
    """What is left of it is not taken for a checkpoint, and the same call completes it."""
    output = tmp_path / "pruned"
    assert programs.run(["-c", KILLED, folder, output]).returncode == -signal.SIGKILL
    left = os.listdir(output)
    assert left and all(name.startswith(".saving-") for name in left)
    prune_checkpoint(folder, output, 0.25, by="random")
    assert AutoModelForCausalLM.from_pretrained(output).config.n_routed_experts == 6
    assert not [name for name in os.listdir(output) if name.startswith(".saving-")]


NATIVE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert type(model).__module__.startswith("transformers.")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_native_opens_it(model, importance, folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "pruned", 0.25, importance)
    torch.save(TOKENS, tmp_path / "tokens")
    done = programs.run(["-c", NATIVE, tmp_path / "pruned", tmp_path / "tokens", tmp_path / "logits"])
    assert done.returncode == 0, done.stderr
    pruned = copy.deepcopy(model)
    prune_experts(pruned, 0.25, importance)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), pruned(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.3, "0.25 is the nearest"),
        (0.75, "at most 0.25"),
        (0.5, "num_experts_per_tok=3"),
        (1.0, "from 0 to below 1"),
        (-0.25, "from 0 to below 1"),
        (float("nan"), "from 0 to below 1"),
    ],
)
def test_shares_that_cannot_be_removed_are_refused_before_anything(model, folder, tmp_path, share, words):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (
        lambda: prune_experts(model, share, by="random"),
        lambda: prune_checkpoint(folder, tmp_path / "pruned", share, by="random"),
    ):
        with pytest.raises(OptionError, match=words) as refused:
            call()
        assert refused.value.option == "--prune"
    assert not (tmp_path / "pruned").exists() and model.config.n_routed_experts == 8
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bad_input_is_named(model, importance, folder, make_model, tmp_path):
    with pytest.raises(OptionError, match="reap, frequency, random"):
        prune_experts(model, 0.25, importance, by="size")
    with pytest.raises(ValueError, match="`importance` is needed"):
        prune_experts(model, 0.25)
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3\]"):
        prune_experts(make_model(num_hidden_layers=2), 0.25, importance)
    with pytest.raises(ValueError, match="no routed experts"):
        expert_importance(make_model(first_k_dense_replace=9, num_nextn_predict_layers=0), TOKENS[0], window=20)
    with pytest.raises(ValueError, match="row of two tokens"):
        expert_importance(model, TOKENS, window=20)
    wide = make_model(hidden_size=64, moe_intermediate_size=32, q_lora_rank=32, intermediate_size=64, v_head_dim=16)
    quantize(wide)
    with pytest.raises(ValueError, match="QuantizedExperts.*before it is quantised"):
        prune_experts(wide, 0.25, by="random")

    with pytest.raises(OptionError, match="choose another folder"):
        prune_checkpoint(folder, folder, 0.25, importance)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        prune_checkpoint(folder, tmp_path / "file", 0.25, importance)
    tensors = load_file(folder / "model.safetensors")
    broken = shutil.copytree(folder, tmp_path / "broken")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    gone = {name: tensor for name, tensor in tensors.items() if ".layers.2.mlp.experts.5." not in name}
    save_file(gone, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match="8 routed experts.*layer 2"):
        prune_checkpoint(broken, tmp_path / "pruned", 0.25, importance)
    fields = json.loads((folder / "config.json").read_text())
    whole = ["model.layers.1.mlp.experts.3.up_proj"]
    ignored = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": whole}
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": ignored}))
    with pytest.raises(OptionError, match="names single experts"):
        prune_checkpoint(folder, tmp_path / "pruned", 0.25, importance)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OptionError, match="no safetensors"):
        prune_checkpoint(folder, tmp_path / "pruned", 0.25, importance)
    assert not (tmp_path / "pruned").exists()


def test_mtp_layers_that_the_files_lack(model, importance, folder, tmp_path):
    """Native `save_pretrained` drops them, and goes on announcing them."""
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".layers.3." not in n}, folder / "model.safetensors")
    main = ExpertImportance(importance.layers[:2], importance.reap[:2], importance.frequency[:2], importance.tokens)
    kept = prune_checkpoint(folder, tmp_path / "pruned", 0.25, main)
    assert list(kept) == [1, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.n_routed_experts == 6
