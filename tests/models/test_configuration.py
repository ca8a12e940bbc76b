"""`Dsv3Config`: what it reads, what it writes, what it refuses."""

import json

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config

from transformers_dsv3 import Dsv3Config, Dsv3ForCausalLM, Dsv3ForSequenceClassification, Dsv3Model, KimiK2Config
from transformers_dsv3.models.dsv3.moe_dsv3 import DeepseekV3MoE


# `config.json` of deepseek-ai/DeepSeek-V3, without its FP8 section
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

# What differs in moonshotai/Moonlight-16B-A3B: null query rank, no YaRN, one group, no MTP layers
MOONLIGHT = {
    **{key: value for key, value in PUBLISHED.items() if key != "rope_scaling"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def saved_json(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_defaults_are_the_published_model():
    config = Dsv3Config()
    # The published context is 4,096 before YaRN, which defaults leave off
    others = ("architectures", "auto_map", "ep_size", "rope_scaling", "torch_dtype", "transformers_version")
    for key, value in PUBLISHED.items():
        if key not in (*others, "max_position_embeddings", "rope_theta", "model_type"):
            assert getattr(config, key) == value, key
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert isinstance(config, DeepseekV3Config)
    assert config.model_type == "deepseek_v3"


@pytest.mark.parametrize("made", ["fresh", "from the native class's file", "published"])
def test_official_keys_are_always_saved(made, tmp_path):
    """vLLM makes no correction bias without `topk_method`, llama.cpp falls back to softmax without `scoring_func`."""
    if made == "fresh":
        config = Dsv3Config()
    elif made == "published":
        config = Dsv3Config.from_dict(PUBLISHED)
    else:
        DeepseekV3Config().save_pretrained(tmp_path)
        assert "topk_method" not in json.loads((tmp_path / "config.json").read_text())
        config = Dsv3Config.from_pretrained(tmp_path)
    saved = saved_json(config, tmp_path)
    # Written under today's names by Transformers itself
    renamed = {"torch_dtype", "rope_scaling", "rope_theta", "auto_map", "ep_size", "architectures"}
    assert set(PUBLISHED) - renamed <= set(saved)
    assert saved["model_type"] == "deepseek_v3"
    assert saved["topk_method"] == "noaux_tc"
    assert saved["scoring_func"] == "sigmoid"
    assert saved["num_nextn_predict_layers"] == 1
    assert "num_mtp_layers" not in saved
    assert "mtp_loss_weight" not in saved


def test_settings_of_a_run_are_not_saved(tmp_path):
    """A checkpoint of pretraining would else be aligned with the MTP objective on."""
    config = Dsv3Config(mtp_loss_weight=0.3, seq_aux_loss_weight=1e-4)
    assert not {"mtp_loss_weight", "seq_aux_loss_weight"} & saved_json(config, tmp_path).keys()
    assert Dsv3Config.from_pretrained(tmp_path).mtp_loss_weight == 0
    assert Dsv3Config.from_pretrained(tmp_path, mtp_loss_weight=0.3).mtp_loss_weight == 0.3
    # Nor within the config of a model that holds this one, which is written from dictionaries
    assert not {"mtp_loss_weight", "seq_aux_loss_weight"} & config.to_dict().keys()


def test_published_config_is_read(tmp_path):
    config = AutoConfig.from_pretrained(write(tmp_path, PUBLISHED))
    assert type(config) is Dsv3Config
    for key, value in PUBLISHED.items():
        if key not in (
            "architectures",
            "auto_map",
            "rope_scaling",
            "rope_theta",
            "torch_dtype",
            "transformers_version",
        ):
            assert getattr(config, key) == value, key
    assert config.architectures == ["DeepseekV3ForCausalLM"]
    assert json.loads(config.to_json_string())["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["rope_theta"] == 10000
    for key, value in PUBLISHED["rope_scaling"].items():
        assert config.rope_parameters[key] == value
    assert config.qk_head_dim == 192


def test_remote_code_repository_is_read_without_its_code(tmp_path):
    """Moonlight names code files in `auto_map`; the folder has none of them, and no question is asked."""
    config = AutoConfig.from_pretrained(write(tmp_path, MOONLIGHT))
    assert type(config) is Dsv3Config
    assert config.q_lora_rank is None
    assert (config.n_group, config.n_shared_experts, config.num_nextn_predict_layers) == (1, 2, 0)
    assert config.rope_parameters == {"rope_theta": 50000.0, "rope_type": "default"}
    # Saved again it names no code, keeps the null, and carries what we do not know along
    saved = saved_json(config, tmp_path / "saved")
    assert "auto_map" not in saved
    assert saved["q_lora_rank"] is None
    assert saved["seq_aux"] is True


def test_null_groups_and_shared_experts():
    config = Dsv3Config(n_group=None, topk_group=None, n_shared_experts=None)
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)
    assert Dsv3Config(n_group=4, topk_group=None).topk_group == 4
    assert Dsv3Config(num_attention_heads=16, num_key_value_heads=None).num_key_value_heads == 16


@pytest.mark.parametrize(
    "fields, name, rule",
    [
        *(
            ({field: 0}, field, "must be at least 1")
            for field in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "moe_intermediate_size",
                "num_attention_heads",
                "kv_lora_rank",
                "qk_rope_head_dim",
                "qk_nope_head_dim",
                "v_head_dim",
                "n_routed_experts",
                "num_experts_per_tok",
                "n_group",
                "topk_group",
                "moe_layer_freq",
                "max_position_embeddings",
                "q_lora_rank",
            )
        ),
        *(
            ({field: -1}, field, "must not be negative")
            for field in (
                "num_hidden_layers",
                "n_shared_experts",
                "first_k_dense_replace",
                "num_nextn_predict_layers",
                "mtp_loss_weight",
            )
        ),
        ({"mtp_loss_weight": -0.1}, "mtp_loss_weight", "must not be negative"),
        ({"num_mtp_layers": -1}, "num_nextn_predict_layers", "must not be negative"),
        ({"v_head_dim": None}, "v_head_dim", "must be at least 1"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok", "must be at least 1"),
        ({"topk_method": "greedy"}, "topk_method", "'noaux_tc'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method", "'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim", "must be even"),
        ({"n_routed_experts": 30, "n_group": 8}, "n_routed_experts", "divisible by n_group (8)"),
        ({"n_group": 4, "topk_group": 5}, "topk_group", "must not exceed n_group (4)"),
        ({"n_routed_experts": 8, "n_group": 8}, "n_group", "two experts a group"),
        (
            {"n_routed_experts": 16, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 5},
            "num_experts_per_tok",
            "4 experts",
        ),
        (
            {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 5},
            "num_experts_per_tok",
            "4 experts",
        ),
    ],
)
def test_contradictions_are_refused_by_name(fields, name, rule, tmp_path):
    with pytest.raises(ValueError) as error:
        Dsv3Config(**fields)
    assert f"`{name}=" in str(error.value)
    assert rule in str(error.value)
    # and likewise when it comes from a file
    if "num_mtp_layers" not in fields:
        with pytest.raises(ValueError, match=f"`{name}="):
            AutoConfig.from_pretrained(write(tmp_path, {**Dsv3Config().to_dict(), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
        {"n_routed_experts": 16, "n_group": 8, "topk_group": 8, "num_experts_per_tok": 16},
        {"num_hidden_layers": 3, "first_k_dense_replace": 3},
        {"num_hidden_layers": 2, "first_k_dense_replace": 3},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"num_hidden_layers": 1, "first_k_dense_replace": 0},
        {"n_routed_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
        {"qk_rope_head_dim": 2, "num_nextn_predict_layers": 0, "n_shared_experts": 0},
    ],
)
def test_extremes_that_make_sense_are_accepted(fields):
    config = Dsv3Config(**fields)
    assert all(getattr(config, key) == value for key, value in fields.items())


ROUND_TRIP_FIELDS = [
    {},
    {"q_lora_rank": None, "tie_word_embeddings": True, "num_nextn_predict_layers": 2, "attention_bias": True},
    {
        "rope_parameters": {**PUBLISHED["rope_scaling"], "rope_type": "yarn", "rope_theta": 5e4},
        "max_position_embeddings": 16384,
        "rope_interleave": False,
        "eos_token_id": [1, 2],
    },
]


@pytest.mark.parametrize("fields", ROUND_TRIP_FIELDS)
@pytest.mark.parametrize("first, second", [(Dsv3Config, DeepseekV3Config), (DeepseekV3Config, Dsv3Config)])
def test_round_trip_with_the_native_config(fields, first, second, tmp_path):
    written = first(**fields)
    written.save_pretrained(tmp_path)
    read = second.from_pretrained(tmp_path)
    common = DeepseekV3Config().to_dict().keys() - {"architectures", "transformers_version"}
    for key in common:
        assert getattr(read, key) == getattr(written, key), key
    # and back again: nothing changes but the keys that ours adds
    read.save_pretrained(tmp_path / "again")
    back = first.from_pretrained(tmp_path / "again").to_dict()
    once = first.from_pretrained(tmp_path).to_dict()
    added = {key for key in back.keys() - once.keys() if back[key] == Dsv3Config().to_dict()[key]}
    assert {key: value for key, value in back.items() if key not in added} == once


@pytest.mark.parametrize(
    "cls, official",
    [
        (Dsv3ForCausalLM, "DeepseekV3ForCausalLM"),
        (Dsv3Model, "DeepseekV3Model"),
        (Dsv3ForSequenceClassification, "DeepseekV3ForSequenceClassification"),
    ],
)
def test_saved_architectures_are_the_official_names(cls, official, tiny_config, tmp_path):
    cls(tiny_config()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [official]


def test_other_architectures_are_left_alone():
    assert Dsv3Config(architectures=["MyOwnModel"]).to_dict()["architectures"] == ["MyOwnModel"]
    assert Dsv3Config(architectures=["Dsv3Model"]).to_dict()["architectures"] == ["DeepseekV3Model"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": None, "attention_bias": True},
        {"attention_bias": True, "tie_word_embeddings": True},
        {"n_shared_experts": None, "num_nextn_predict_layers": 0},
        {"num_hidden_layers": 5, "moe_layer_freq": 2, "num_nextn_predict_layers": 3},
        {"first_k_dense_replace": 9},
    ],
)
@pytest.mark.parametrize("config_class", [Dsv3Config, KimiK2Config])
def test_active_parameters_are_those_of_the_model(make_model, fields, config_class):
    config = config_class(**{**make_model(**fields).config.to_dict(), "model_type": config_class.model_type})
    with torch.device("meta"):
        model = Dsv3ForCausalLM(config)
    counted = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        share = config.num_experts_per_tok if ".mlp.experts." in name else config.n_routed_experts
        counted[".mtp." in name] += parameter.numel() * share // config.n_routed_experts
    assert config.active_parameters == counted[False]
    assert config.active_mtp_parameters == counted[True]
    assert config.active_expert_share == config.num_experts_per_tok / config.n_routed_experts
    assert config.moe_layers == [
        layer for layer, block in enumerate(model.model.layers) if isinstance(block.mlp, DeepseekV3MoE)
    ]


def test_active_parameters_as_published():
    config = Dsv3Config(**PUBLISHED)
    assert round(config.active_parameters / 1e9) == 38  # 37 without the embedding, of which a token reads one row
    assert config.active_parameters - config.vocab_size * config.hidden_size == pytest.approx(36.6e9, rel=0.005)
    assert config.moe_layers == list(range(3, 61))


@pytest.mark.parametrize("config_class", [Dsv3Config, KimiK2Config])
def test_what_is_computed_is_not_stored(config_class, tmp_path):
    computed = {name for name, value in vars(Dsv3Config).items() if isinstance(value, property)}
    assert computed >= {"moe_layers", "active_expert_share", "active_parameters", "active_mtp_parameters"}
    config = config_class()
    config.save_pretrained(tmp_path)
    for stored in (config.to_dict(), config.to_diff_dict(), json.loads((tmp_path / "config.json").read_text())):
        assert not computed & set(stored)
    # Somebody else's file may have a key of such a name
    stored["moe_layers"] = [1, 2]
    read = config_class.from_dict(stored)
    assert read.moe_layers == config.moe_layers and "moe_layers" not in read.to_dict()
