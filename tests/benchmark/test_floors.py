"""The least that a workload needs, against counts made another way; the models that are compared; what is timed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from transformers_dsv3 import Dsv3ForCausalLM, quantize
from transformers_dsv3.benchmark import ceilings
from transformers_dsv3.benchmark.contenders import ModelContender, agreement, plain_generation, share_weights
from transformers_dsv3.benchmark.floors import (
    ExpertsUsed,
    Work,
    count_weights,
    expected_experts,
    floor_seconds,
    work_of,
)
from transformers_dsv3.benchmark.prefill_profile import kind_of, time_by_kind
from transformers_dsv3.benchmark.presets import PRESETS, parameter_count, preset_config
from transformers_dsv3.benchmark.settings import BenchSettings
from transformers_dsv3.benchmark.workloads import (
    Clock,
    Workload,
    continue_text,
    decode,
    filled_cache,
    make_inputs,
    prefill,
    workloads,
)
from transformers_dsv3.option_error import OptionError


def bytes_named(model, *parts):
    return sum(
        tensor.nbytes
        for name, tensor in model.state_dict().items()
        if any(part in name for part in parts) and ".mtp." not in name
    )


def test_weights_are_those_of_the_state_dict_without_mtp_layers(make_model):
    model = make_model().bfloat16()
    counted = count_weights(model, in_bytes=True)
    assert counted.moe_layers == 1
    assert counted.expert * 8 == bytes_named(model, ".mlp.experts.")
    assert counted.head == model.lm_head.weight.nbytes
    assert counted.embedding_row * 96 == bytes_named(model, "embed_tokens")
    rest = bytes_named(model, "") - bytes_named(model, "mlp.experts", "lm_head", "embed_tokens")
    assert counted.every_token == rest


def test_a_tied_head_is_read_all_the_same(make_model):
    model = make_model(tie_word_embeddings=True)
    counted = count_weights(model, in_bytes=True)
    assert counted.head == model.lm_head.weight.nbytes
    assert counted.embedding_row == 32 * 4


def test_decoding_reads_weights_once_and_the_latents_of_every_row(make_model):
    model = make_model()
    counted = count_weights(model, in_bytes=True)
    work = work_of(model, Workload("batched", 10, 3, "fp32"), experts_used=5.0)
    latents = 3 * 10 * (16 + 8) * 4 * 2
    assert work.bytes_read == counted.every_token + counted.head + 5 * counted.expert + 3 * 32 * 4 + latents


@pytest.mark.parametrize("length", [16, 33])
def test_operations_of_a_prefill_are_those_that_torch_counts(make_model, length):
    """Torch counts attention over the whole square of positions, the floor the causal half.

    Counted on native, whose operations are all torch's own.
    """
    model = make_model()
    native = share_weights(model)
    native.set_attn_implementation("eager")
    native.set_experts_implementation("eager")
    workload = Workload("prefill", length, 1, "fp32")
    inputs = make_inputs(workload, model.config, torch.float32, seed=0)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        native(input_ids=inputs.ids, past_key_values=DynamicCache(config=native.config), logits_to_keep=1)
    work = work_of(model, workload, experts_used=8.0)
    square = work.attention_operations * 2 * length / (length + 1)
    assert counter.get_total_flops() == pytest.approx(work.linear_operations + square, rel=0.01)


def test_training_is_three_forwards_with_every_logit_and_an_optimizer(make_model):
    model = make_model()
    forward = work_of(model, Workload("prefill", 7, 2, "fp32"), experts_used=8.0)
    step = work_of(model, Workload("train", 7, 2, "fp32"), experts_used=8.0)
    more_logits = 2 * (2 * 7 - 2) * 96 * 32
    assert step.linear_operations == 3 * (forward.linear_operations + more_logits)
    assert step.attention_operations == 3 * forward.attention_operations
    trained = sum(p.nbytes for n, p in model.named_parameters() if ".mtp." not in n)
    assert step.optimizer_bytes == 7 * trained


def test_floor_is_the_longer_of_reading_and_computing():
    work = Work(bytes_read=100, linear_operations=60, attention_operations=20)
    assert floor_seconds(work, bandwidth=10, linear_rate=20, attention_rate=10) == 10
    assert floor_seconds(work, bandwidth=100, linear_rate=20, attention_rate=10) == 5
    assert floor_seconds(Work(0, 60, 20, 200), 100, 20, 10) == 7


def test_experts_are_counted_as_the_routers_choose(make_model):
    model = share_weights(make_model())
    with ExpertsUsed(model) as used, torch.inference_mode():
        model(input_ids=torch.tensor([[5]]), use_cache=False)
        assert used.counts == [3]
        logits = model(input_ids=torch.arange(90)[None], use_cache=False)
    assert logits is not None and 3 <= used.counts[1] <= 8
    assert used.mean() == sum(used.counts) / 2
    model(input_ids=torch.tensor([[5]]), use_cache=False)
    assert len(used.counts) == 2


def test_experts_expected_of_a_batch(make_model):
    config = make_model().config
    assert expected_experts(config, Workload("decode", 99, 1, "fp32")) == pytest.approx(3)
    assert expected_experts(config, Workload("batched", 99, 2, "fp32")) == pytest.approx(3 + 3 * 5 / 8)
    assert expected_experts(config, Workload("prefill", 500, 1, "fp32")) == pytest.approx(8)


def test_text_is_continued_from_the_models_own_latents(make_model):
    model = make_model()
    inputs = make_inputs(Workload("mtp", 9, 1, "fp32"), model.config, torch.float32, seed=0)
    continued = continue_text(model, inputs, torch.tensor([5, 6, 7]))
    assert continued.ids.tolist() == [[5, 6, 7, 5, 6, 7, 5, 6, 7, 5]]
    with torch.inference_mode():
        whole = model(input_ids=continued.ids, use_cache=False).logits[0, -1]
        one = model(input_ids=continued.ids[:, -1:], past_key_values=filled_cache(model, continued.latents))
    assert torch.allclose(one.logits[0, -1], whole, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_native_and_a_twin_stand_on_the_same_storage(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    for twin in (share_weights(model), share_weights(model, Dsv3ForCausalLM)):
        ours = dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            assert parameter.data_ptr() == ours[name].data_ptr(), name
        assert agreement(model, twin, seed=0)["relative_error"] < 1e-5
        assert agreement(model, twin, seed=0)["argmax"] == 1.0


def test_a_filled_cache_is_laid_out_as_each_implementation_lays_out_its_own(make_model):
    model = make_model()
    inputs = make_inputs(Workload("decode", 9, 2, "fp32"), model.config, torch.float32, seed=0)
    for each in (model, share_weights(model)):
        own = DynamicCache(config=each.config)
        with torch.inference_mode():
            each(input_ids=inputs.ids[:, :9], past_key_values=own)
        filled = filled_cache(each, inputs.latents)
        assert len(own.layers) == len(filled.layers)
        for one, two in zip(own.layers, filled.layers):
            assert (one.keys.shape, one.values.shape) == (two.keys.shape, two.values.shape)
            assert one.keys.dtype == two.keys.dtype


def test_turns_leave_the_inputs_as_they_were(make_model):
    model = plain_generation(make_model())
    inputs = make_inputs(Workload("decode", 5, 1, "fp32"), model.config, torch.float32, seed=0)
    before = [(latent.clone(), rope.clone()) for latent, rope in inputs.latents]
    turn = decode(model, inputs, 4)
    assert turn.units == 4 and turn.seconds > 0
    for (a, b), (c, d) in zip(before, inputs.latents):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_mtp_decode_counts_drafts(make_model):
    model = plain_generation(make_model())
    inputs = make_inputs(Workload("mtp", 5, 1, "fp32"), model.config, torch.float32, seed=0)
    turn = decode(model, inputs, 6, use_mtp=True)
    assert turn.units >= 5
    assert 0 <= turn.notes["accepted"] <= turn.notes["drafted"]


def test_clock_starts_at_the_first_new_token():
    clock = Clock()
    clock.times, clock.tokens = [0.0, 5.0, 6.0, 9.0], [12, 2, 2, 4]
    assert clock.seconds_a_step(batch=2) == (4.0 / 3, 3)


def test_training_turns_leave_shared_weights_alone(make_model):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    workload = Workload("train", 6, 2, "fp32")
    inputs = make_inputs(workload, model.config, torch.float32, seed=0)
    losses = []
    for contender in (
        ModelContender("a", model, torch.float32),
        ModelContender("b", share_weights(model), torch.float32),
    ):
        turns = [contender.measure(workload, inputs, 0) for _ in range(2)]
        losses += [turn.notes["loss"] for turn in turns]
        assert not contender.model.training
        assert all(parameter.grad is None for parameter in contender.model.parameters())
    assert max(losses) - min(losses) < 1e-5
    for name, tensor in model.state_dict().items():
        assert torch.allclose(before[name], tensor, atol=1e-9), name


def test_workloads_of_settings():
    settings = BenchSettings(what=("train", "decode", "mtp"), contexts=(64, 16), train_batch=2, train_length=32)
    assert workloads(settings, "bf16") == [
        Workload("train", 32, 2, "bf16"),
        Workload("decode", 16, 1, "bf16"),
        Workload("decode", 64, 1, "bf16"),
        Workload("mtp", 16, 1, "bf16"),
    ]


def test_random_inputs_are_the_same_for_the_same_seed(make_model):
    config = make_model().config
    workload = Workload("decode", 7, 2, "fp32")
    one, two = (make_inputs(workload, config, torch.float32, seed=3) for _ in range(2))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.latents[0][0], two.latents[0][0])
    assert not torch.equal(one.ids, make_inputs(workload, config, torch.float32, seed=4).ids)


def test_presets_have_the_size_they_say():
    sizes = {name: parameter_count(preset_config(BenchSettings(source=name), 2**50)[0]) for name in PRESETS}
    assert {name: f"{size / 1e9:.2f}" for name, size in sizes.items()} == {
        "bench-2b": "1.94",
        "moonlight": "15.96",
        "small": "0.11",
    }


def test_a_preset_is_cut_to_memory_and_says_so():
    config, cut = preset_config(BenchSettings(source="moonlight"), 20 * 2**30)
    assert 2 < config.num_hidden_layers < 27
    assert cut == f"{config.num_hidden_layers} of 27 layers, what memory takes"
    assert 2 * parameter_count(config) <= 0.7 * 20 * 2**30
    with pytest.raises(OptionError, match="2 layers of moonlight need"):
        preset_config(BenchSettings(source="moonlight"), 2**30)
    with pytest.raises(OptionError, match="27 layers") as error:
        preset_config(BenchSettings(source="moonlight", layers=27), 20 * 2**30)
    assert error.value.option == "--layers"


def test_mtp_layers_come_where_mtp_is_measured():
    assert preset_config(BenchSettings(), 2**50)[0].num_nextn_predict_layers == 0
    assert preset_config(BenchSettings(what=("mtp",)), 2**50)[0].num_nextn_predict_layers == 1


def test_ceilings_are_medians_since_the_start(monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "GEMM_SHAPE", (64, 64, 64))
    measured = ceilings.Ceilings([torch.float32, torch.int8])
    assert measured.read == []
    for _ in range(3):
        measured.measure()
    assert len(measured.read) == len(measured.gemm[torch.int8]) == 3
    assert measured.bandwidth() == sorted(measured.read)[1]
    assert measured.rate(torch.float32) == sorted(measured.gemm[torch.float32])[1]
    assert set(measured.record()["gemm_operations_per_second"]) == {"float32", "int8"}


def test_bandwidth_is_of_the_fastest_way_to_read(monkeypatch):
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(ceilings, "ways_to_read", lambda: {"slow": lambda buffer: 2.0, "fast": lambda buffer: 0.5})
    measured = ceilings.Ceilings([torch.float32])
    measured.measure()
    assert measured.record()["read_by"] == "fast"
    assert measured.bandwidth() == 2**21
    monkeypatch.undo()
    buffer = torch.ones(2**18)
    assert all(0 < read(buffer) < 1 for read in ceilings.ways_to_read().values())


def test_profile_by_kind(make_model):
    assert kind_of(["aten::mm", "aten::linear"]) == "linear"
    assert kind_of(["aten::bmm", "aten::scaled_dot_product_attention"]) == "attention"
    assert kind_of(["aten::mul"]) == "other"
    model = make_model()
    inputs = make_inputs(Workload("prefill", 12, 1, "fp32"), model.config, torch.float32, seed=0)
    found = time_by_kind(lambda: prefill(model, inputs))
    assert found["linear_seconds"] > 0 and found["attention_seconds"] > 0 and found["other_seconds"] > 0
    assert 0 < len(found["longest"]) <= 10


def test_quantised_weights_are_not_shared(make_model):
    model = quantize(make_model(hidden_size=64, intermediate_size=96, moe_intermediate_size=32), 4)
    with pytest.raises(RuntimeError, match="the checkpoint's weights are quantised"):
        share_weights(model)
