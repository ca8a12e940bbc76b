"""Plans of compression beside the tensors of real models, and the settings that reach a target."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM, quantize
from transformers_dsv3.benchmark.floors import count_weights
from transformers_dsv3.compression import plan as plans
from transformers_dsv3.compression.packed.format import byte_tensors, packed_tensors
from transformers_dsv3.compression.plan import LADDER, PUBLISHED, gentlest, model_config, plan, settings_that_reach
from transformers_dsv3.compression.settings import CompressionSettings
from transformers_dsv3.option_error import OptionError


# Every width in groups of 32
WIDE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "v_head_dim": 16,
    "num_hidden_layers": 3,
}
SHAPES = [
    {},
    {"q_lora_rank": None, "n_shared_experts": 0, "num_nextn_predict_layers": 2, "n_group": 1},
    {"attention_bias": True, "num_nextn_predict_layers": 0, "tie_word_embeddings": True, "n_shared_experts": 2},
    {"first_k_dense_replace": 0, "moe_layer_freq": 2, "num_hidden_layers": 4},
]
AS_IT_IS = CompressionSettings(16, head_bits=16)


def part_of(name, n_layers):
    """Of a tensor of a checkpoint, by its official name."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    if layer >= n_layers:
        return "MTP"
    for part, marks in {
        "embedding": ["embed_tokens"],
        "head": ["lm_head"],
        "routed experts": [".experts."],
        "shared experts": ["shared_experts"],
        "routers and norms": [".gate.", "_layernorm.", "model.norm."],
        "attention": ["self_attn"],
        "dense MLP": [".mlp."],
    }.items():
        if any(mark in name for mark in marks) and not (part == "routers and norms" and ".self_attn." in name):
            return part
    raise AssertionError(name)


def bits_of(name, settings):
    """Bits that the settings give a tensor, None for those that are left."""
    if name.endswith(("norm.weight", ".bias", ".gate.weight", "kv_b_proj.weight")) or "correction_bias" in name:
        return None
    if name.endswith((".enorm.weight", ".hnorm.weight")):
        return None
    if "embed_tokens" in name or "lm_head" in name or "shared_head.head" in name:
        return settings.head_bits
    return settings.of("experts" if ".experts." in name else "linear")


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize(
    "settings", [AS_IT_IS, CompressionSettings(8, head_bits=4), CompressionSettings(4, experts_bits=3)], ids=str
)
def test_bytes_are_those_of_files(make_model, tmp_path, fields, settings):
    model = make_model(**{**WIDE, **fields}).bfloat16()
    model.save_pretrained(tmp_path)
    made = plan(model.config, settings)
    stored = load_file(tmp_path / "model.safetensors")
    assert made.bf16_bytes == sum(tensor.nbytes for tensor in stored.values())

    packed = {}
    for name, tensor in stored.items():
        bits = bits_of(name, settings)
        if fields.get("tie_word_embeddings") and "embed_tokens" in name:
            bits = None
        if bits is None or bits == 16 or not tensor.numel():  # no shared experts
            packed[name] = tensor
        elif "embed_tokens" in name:
            packed |= byte_tensors(name, torch.zeros_like(tensor, dtype=torch.int8), tensor[:, ::32].contiguous())
        else:
            whole, scale = torch.zeros_like(tensor, dtype=torch.int8), tensor[:, ::32].contiguous()
            packed |= packed_tensors(name, whole, scale, bits)
    save_file(packed, tmp_path / "packed.safetensors")
    packed = load_file(tmp_path / "packed.safetensors")
    assert made.file_bytes == sum(tensor.nbytes for tensor in packed.values())
    for row in made.rows:
        of_part = [t.nbytes for name, t in packed.items() if part_of(name, model.config.num_hidden_layers) == row.part]
        assert row.bytes == sum(of_part), row.part
    assert made.ratio() == made.bf16_bytes / made.file_bytes
    assert made.ratio("fp32") == 4 * made.parameters[0] / made.file_bytes


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_memory_and_reading_are_those_of_quantised_models(make_model, fields, bits):
    model = make_model(**{**WIDE, **fields}).bfloat16()
    made = plan(model.config, CompressionSettings(bits), context=100)
    quantize(model, bits=bits, head_bits=None if fields.get("tie_word_embeddings") else 8)
    names = model.state_dict(keep_vars=True)
    assert made.weight_bytes == sum({id(tensor): tensor.nbytes for tensor in names.values()}.values())
    cache = 100 * model.config.num_hidden_layers * 2 * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    assert made.cache_bytes == cache and made.memory_bytes == made.weight_bytes + cache
    weights = count_weights(model, in_bytes=True)
    experts = model.config.num_experts_per_tok * weights.expert * weights.moe_layers
    if not fields.get("tie_word_embeddings"):  # of which the benchmark counts the names
        assert made.bytes_read == cache + weights.every_token + weights.head + weights.embedding_row + experts
    assert made.tokens_per_second(1e9) == 1e9 / made.bytes_read


def test_pruned_files_are_as_planned(make_model, tmp_path):
    model = make_model(**WIDE)
    made = plan(model.config, CompressionSettings(16, head_bits=16, prune=0.25))
    fewer = make_model(**WIDE, n_routed_experts=6).bfloat16()
    fewer.save_pretrained(tmp_path)
    assert made.experts == 6 and made.experts_before == 8
    assert made.file_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert made.bf16_bytes == plan(model.config, AS_IT_IS).file_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_shapes(name):
    config = model_config(name)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    made = plan(config, AS_IT_IS)
    copies = 2 * config.num_nextn_predict_layers * config.vocab_size * config.hidden_size
    buffers = sum(tensor.numel() for name, tensor in model.named_buffers() if name.endswith("correction_bias"))
    assert made.parameters[0] - copies - buffers == sum(parameter.numel() for parameter in model.parameters())


def test_published_totals():
    """What their cards say: V3 671 and 37 B, 14 of MTP; Moonlight 16 and 3; Kimi K2 1 T and 32 B; GigaChat 3 1.8 B."""

    def total(name):
        rows = plan(model_config(name), AS_IT_IS).rows
        return sum(row.parameters_before for row in rows if row.part != "MTP") / 1e9

    assert total("deepseek-v3") == pytest.approx(671, abs=0.5)
    assert total("moonlight-16b-a3b") == pytest.approx(16, abs=0.1)
    assert total("kimi-k2") == pytest.approx(1026, abs=1)
    # As q8_0, 8.5 bits a weight, its file is listed with 11.4 GB
    assert total("gigachat3-10b-a1.8b") * 8.5 / 8 == pytest.approx(11.4, abs=0.1)
    active = {name: model_config(name).active_parameters / 1e9 for name in PUBLISHED}
    assert active["deepseek-v3"] == pytest.approx(37.6, abs=0.1) and active["kimi-k2"] == pytest.approx(32.8, abs=0.1)
    assert active["gigachat3-10b-a1.8b"] == pytest.approx(1.8, abs=0.05)


def test_ratios_of_the_table():
    """Those computed before, for groups of 128 and no scale of the embedding: 3.85, 3.69, 3.72 and 3.61 at 4 bits."""
    for name, expected in (
        ("deepseek-v3", 3.85),
        ("moonlight-16b-a3b", 3.69),
        ("glm-4.7-flash", 3.72),
        ("gigachat3-10b-a1.8b", 3.61),
    ):
        config = model_config(name)
        config.num_nextn_predict_layers = 0
        made = plan(config, CompressionSettings(4))
        small = sum(row.parameters for row in made.rows if row.part in ("embedding", "head"))
        whole = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
        whole *= config.num_hidden_layers
        # A scale of 16 bits for 128 weights instead of 32
        less = made.file_bytes - (made.parameters[0] - small - whole) * (2 / 32 - 2 / 128) - small * 2 / 32
        assert made.bf16_bytes / less == pytest.approx(expected, abs=0.02), name


def test_the_gentlest_settings_that_reach_a_target():
    config = model_config("moonlight-16b-a3b")
    ratios = [plan(config, settings).ratio() for settings in LADDER]
    assert ratios == sorted(ratios)
    for target in (1.0, 1.88, 3.0, 7.0, 7.6):
        choice = gentlest(config, target_ratio=target)
        place = LADDER.index(choice.plan.settings)
        assert choice.reached and ratios[place] >= target and all(ratio < target for ratio in ratios[:place])
    assert gentlest(config, target_ratio=7.6).plan.settings == CompressionSettings(4, experts_bits=3, prune=0.625)
    # From fp32 half of the way is in the dtype
    assert gentlest(config, target_ratio=7.6, ratio_from="fp32").plan.settings == CompressionSettings(
        4, experts_bits=3
    )

    small = gentlest(config, fit_bytes=9 * 2**30)
    assert small.reached and small.plan.settings == CompressionSettings(4)
    # Weights of 3 bits take 4 in memory: they do not help to fit, so what does comes next
    smaller = gentlest(config, fit_bytes=8 * 2**30)
    assert smaller.plan.settings.prune == 0.25 and smaller.plan.memory_bytes <= 8 * 2**30
    both = gentlest(config, target_ratio=2, fit_bytes=8 * 2**30)
    assert both.plan.settings == smaller.plan.settings


def test_what_cannot_be_reached_comes_as_near_as_can_be():
    config = model_config("moonlight-16b-a3b")
    choice = gentlest(config, target_ratio=100)
    assert not choice.reached and choice.plan.settings == LADDER[-1]
    assert not gentlest(config, fit_bytes=2**30).reached
    # Shares that do not divide are passed over
    config.n_routed_experts = 12
    assert {gentlest(config, target_ratio=100).plan.settings.prune} == {0.5}


def test_settings_that_reach_a_target_keep_the_rest():
    config = model_config("moonlight-16b-a3b")
    given = CompressionSettings(8, head_bits=4, tokens=4096, heal=7, prune_by="random")
    chosen = settings_that_reach(config, given, 5)
    assert chosen == CompressionSettings(4, experts_bits=3, prune=0.25, tokens=4096, heal=7, prune_by="random")
    # Nothing is healed where nothing is removed
    assert settings_that_reach(config, given, 3) == CompressionSettings(4, tokens=4096, prune_by="random")
    with pytest.raises(OptionError, match=r"nearest come 4 bits, experts 3, .* 0.75 of the experts pruned, 11.1"):
        settings_that_reach(config, given, 100)


def test_configurations_are_read(make_model, tmp_path):
    config = make_model(**WIDE).config
    config.save_pretrained(tmp_path)
    made = plan(config, CompressionSettings())
    assert (
        plan(model_config(tmp_path), CompressionSettings())
        == plan(model_config(tmp_path / "config.json"), CompressionSettings())
        == made
    )
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "kimi_k2"}))
    assert plan(model_config(tmp_path), CompressionSettings()) == made
    for text, words in (("{", "JSON"), ("[]", "JSON"), ('{"model_type": "llama"}', "llama")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(OptionError, match=words):
            model_config(tmp_path)
    with pytest.raises(OptionError, match="not there.*glm-4.7-flash"):
        model_config(tmp_path / "nothing")


@pytest.mark.parametrize("fields", [{"moe_intermediate_size": 40}, {"q_lora_rank": 48}, {"hidden_size": 72}], ids=str)
def test_widths_that_do_not_divide_are_named(fields):
    (name, value), *_ = fields.items()
    config = DeepseekV3Config(**{"num_hidden_layers": 4, **fields})
    with pytest.raises(OptionError, match=f"{name}={value}"):
        plan(config, CompressionSettings())
    plan(config, AS_IT_IS)


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (lambda config: CompressionSettings(bits=3), "--bits"),
        (lambda config: CompressionSettings(experts_bits=1), "--experts-bits"),
        (lambda config: CompressionSettings(head_bits=None), "--head-bits"),
        (lambda config: plan(config, CompressionSettings(), context=0), "--context"),
        (lambda config: plan(config, CompressionSettings(prune=0.3)), "--prune"),
        (lambda config: gentlest(config), "--target-ratio"),
        (lambda config: gentlest(config, target_ratio=0.5), "--target-ratio"),
        (lambda config: gentlest(config, fit_bytes=0), "--fit"),
        (lambda config: gentlest(config, target_ratio=2, ratio_from="fp8"), "--ratio-from"),
        (lambda config: settings_that_reach(config, CompressionSettings(), 100), "--target-ratio"),
        (lambda config: settings_that_reach(config, CompressionSettings(), None, 2**20), "--fit"),
        (lambda config: settings_that_reach(config, CompressionSettings(), 2, 2**20), "--fit"),
    ],
)
def test_wrong_options_are_named(call, option):
    with pytest.raises(OptionError) as refused:
        call(model_config("moonlight-16b-a3b"))
    assert refused.value.option == option


@pytest.mark.parametrize("compiled", [True, False])
def test_reading_bandwidth(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(plans.library, "unavailable", "is not there")
    monkeypatch.setattr(plans, "_READ_BYTES", 2**22)
    assert 1e6 < plans.reading_bandwidth() < 1e14
