"""Official checkpoints in and out: round trips, and every error before a weight is read."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import transformers_dsv3
from transformers_dsv3.models.dsv3 import checkpoint_dsv3
from transformers_dsv3.models.dsv3.checkpoint_checks_dsv3 import mtp_layers_present, scale_grid
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError, StoredTensor, read_header


def tiny_config(**overrides):
    fields = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 128,
    }
    return transformers_dsv3.Dsv3Config(**{**fields, **overrides})


def make_model(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    model = transformers_dsv3.Dsv3ForCausalLM(tiny_config(**overrides)).to(dtype)
    for name, buffer in model.named_buffers():
        if "e_score" in name:
            buffer.normal_()
    return model


def assert_same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def load_native(folder, **kwargs):
    return DeepseekV3ForCausalLM.from_pretrained(folder, config=DeepseekV3Config.from_pretrained(folder), **kwargs)


def read_all(folder):
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in five shards; copy before damaging it."""
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def warnings_of(caplog):
    """What our logger has said, at warning level."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == checkpoint_dsv3.__name__]


@pytest.fixture
def load_reports():
    """Transformers' own warnings while it loads. On CI alone they reach `caplog`."""
    loader, messages = logging.getLogger("transformers.modeling_utils"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loader.addHandler(handler)
    yield messages
    loader.removeHandler(handler)


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"num_nextn_predict_layers": 0},
            {"num_nextn_predict_layers": 2, "tie_word_embeddings": True},
            {"q_lora_rank": None, "n_shared_experts": 0, "first_k_dense_replace": 0},
        ],
        ids=["plain", "no MTP", "tied, two MTP layers", "no q LoRA, no shared experts"],
    )
    def test_own(self, tmp_path, dtype, max_shard_size, overrides):
        model = make_model(dtype, **overrides)
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is transformers_dsv3.Dsv3ForCausalLM
        assert_same_tensors(model, again)
        again.save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
        first, second = read_all(tmp_path), read_all(tmp_path / "again")
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
        configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
        assert configs[0] == configs[1]

    def test_native_and_back(self, tmp_path):
        model = make_model(torch.bfloat16, num_nextn_predict_layers=0)
        model.save_pretrained(tmp_path / "ours")
        native = load_native(tmp_path / "ours", dtype=torch.bfloat16)
        assert_same_tensors(native, model)
        native.save_pretrained(tmp_path / "native")
        assert read_all(tmp_path / "native").keys() == read_all(tmp_path / "ours").keys()
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), model)

    def test_official_layout(self, tmp_path):
        model = make_model()
        model.save_pretrained(tmp_path)
        tensors = read_all(tmp_path)
        assert {name for name in tensors if name.startswith("model.layers.3.") and ".experts." not in name} >= {
            "model.layers.3.embed_tokens.weight",
            "model.layers.3.shared_head.head.weight",
            "model.layers.3.shared_head.norm.weight",
            "model.layers.3.enorm.weight",
            "model.layers.3.hnorm.weight",
            "model.layers.3.eh_proj.weight",
        }
        assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], model.model.embed_tokens.weight)
        assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
        assert tensors["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (24, 32)
        assert not any("gate_up_proj" in name for name in tensors)

    def test_heads_and_decoder_alone_exchange_weights(self, tmp_path):
        model = make_model()
        model.save_pretrained(tmp_path / "full")
        decoder = AutoModel.from_pretrained(tmp_path / "full")
        assert_same_tensors(decoder, model.model)
        decoder.save_pretrained(tmp_path / "decoder")
        assert "layers.3.embed_tokens.weight" in read_all(tmp_path / "decoder")
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").model, model.model)
        scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full", num_labels=3)
        assert_same_tensors(scorer.model, model.model)
        scorer.save_pretrained(tmp_path / "scorer")
        assert "model.layers.3.shared_head.head.weight" not in read_all(tmp_path / "scorer")
        assert_same_tensors(AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer"), scorer)

    def test_arguments_reach_config_and_model(self, saved):
        model, info = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.bfloat16, rms_norm_eps=1e-3, output_loading_info=True, attn_implementation="eager"
        )
        assert model.dtype == torch.bfloat16 and model.config.rms_norm_eps == 1e-3
        assert model.config._attn_implementation == "eager"
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        direct = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(saved, rms_norm_eps=1e-3)
        assert direct.config.rms_norm_eps == 1e-3 and direct.dtype == torch.float32
        config = tiny_config()
        assert transformers_dsv3.Dsv3ForCausalLM.from_pretrained(str(saved), config=config).config is not config

    def test_state_dict_without_a_folder(self):
        model = make_model()
        again = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(
            None, config=tiny_config(), state_dict=model.state_dict()
        )
        assert_same_tensors(again, model)

    def test_subfolder_and_variant(self, tmp_path):
        model = make_model()
        model.save_pretrained(tmp_path / "inner", variant="fp16", max_shard_size="50KB")
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", variant="fp16"), model)

    def test_hub_cache(self, saved, tmp_path):
        commit = "a" * 40
        repo = tmp_path / "models--someone--small"
        shutil.copytree(saved, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        # not through the Auto class: it asks the Hub for an adapter even with `local_files_only`
        load = transformers_dsv3.Dsv3ForCausalLM.from_pretrained
        arguments = {"cache_dir": tmp_path, "local_files_only": True}
        assert_same_tensors(load("someone/small", **arguments), make_model())
        path = shard_of(repo / "snapshots" / commit, "model.norm.weight")
        edit(path, lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(CheckpointError, match="places tensors in shards which lack them: 'model.norm.weight'"):
            load("someone/small", **arguments)

    def test_adapter_folder(self, saved, tmp_path):
        from peft import LoraConfig, get_peft_model

        base = AutoModelForCausalLM.from_pretrained(saved)
        adapted = get_peft_model(base, LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        ids = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, adapted(ids).logits)
        loaded.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again" / "model.safetensors").exists()

    def test_renamed_tensors(self, copied):
        for path in copied.glob("*.safetensors"):
            save_file({f"decoder.{name}": t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        index["weight_map"] = {f"decoder.{name}": shard for name, shard in index["weight_map"].items()}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
        loaded = AutoModelForCausalLM.from_pretrained(copied, key_mapping={r"^decoder\.": ""})
        assert_same_tensors(loaded, make_model())

    def test_native_fused_names(self, tmp_path):
        """A checkpoint with fused experts (`save_original_format=False`) loads too."""
        model = make_model()
        model.save_pretrained(tmp_path, save_original_format=False)
        assert "model.layers.1.mlp.experts.gate_up_proj" in read_all(tmp_path)
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_offloaded(self, saved, tmp_path):
        device_map = {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "cpu",
            "model.layers.2": "disk",
            "model.mtp.0": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        }
        model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "off")
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, make_model().eval()(ids).logits)
        model.save_pretrained(tmp_path / "saved")
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), make_model())


class TestMtpCount:
    def test_native_drops_mtp_weights(self, saved, tmp_path, warnings_of):
        load_native(saved).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.config.num_nextn_predict_layers == 0 and len(model.model.layers) == 3
        (message,) = warnings_of()
        assert "announces 1 MTP layer(s), but there are no MTP tensors of model.layers.3." in message

    def test_what_a_layer_lacks_is_named(self, copied, load_reports):
        name = "model.layers.3.hnorm.weight"
        path = shard_of(copied, name)
        edit(path, lambda tensors: tensors.pop(name))
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
        model, info = AutoModelForCausalLM.from_pretrained(copied, output_loading_info=True)
        assert info["missing_keys"] == {"model.mtp.0.hidden_layernorm.weight"}
        assert torch.equal(model.model.mtp_layers[0].hnorm.weight, torch.ones(32))
        (report,) = load_reports
        assert re.search(r"model\.mtp\.0\.hidden_layernorm\.weight +\| MISSING", report)

    def test_more_than_announced_are_listed(self, copied):
        edit_config(copied, num_nextn_predict_layers=0)
        model, info = AutoModelForCausalLM.from_pretrained(copied, output_loading_info=True)
        assert len(model.model.layers) == 3
        assert "model.layers.3.eh_proj.weight" in info["unexpected_keys"]

    @pytest.mark.parametrize(
        ("layers", "announced", "present"),
        [([0, 1, 2], 1, 0), ([0, 2, 3], 2, 1), ([3, 4], 1, 1), ([4], 2, 2), ([], 0, 0)],
    )
    def test_count(self, layers, announced, present):
        names = ["model.norm.weight", *(f"model.layers.{layer}.enorm.weight" for layer in layers)]
        assert mtp_layers_present(names, 3, announced) == present

    @pytest.mark.parametrize(("num_hidden_layers", "present"), [(1, 0), (3, 0), (4, 0), (5, 2), (6, 1)])
    def test_layers_of_the_main_model_are_no_mtp_layers(self, num_hidden_layers, present):
        """Five main layers and two of MTP, of which a smaller number is asked for."""
        names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(7)]
        names += [f"model.layers.{layer}.eh_proj.weight" for layer in (5, 6)]
        assert mtp_layers_present(names, num_hidden_layers, 2) == present


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


class TestErrors:
    """Each names the file, and the tensor where there is one."""

    def refused(self, folder, match, error=CheckpointError, **kwargs):
        with pytest.raises(error, match=match):
            AutoModelForCausalLM.from_pretrained(folder, **kwargs)

    def test_truncated(self, copied):
        path = shard_of(copied, EXPERT)
        size = path.stat().st_size
        os.truncate(path, size - 10)
        self.refused(copied, rf"{path.name}: truncated, the file has {size - 10} bytes and .* describes {size}")

    def test_truncated_header(self, copied):
        path = shard_of(copied, EXPERT)
        os.truncate(path, 20)
        self.refused(copied, rf"{path.name}: truncated or not a safetensors file \(20 bytes")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "truncated or not a safetensors file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "this is a Git LFS pointer"),
            ((8).to_bytes(8, "little") + b"not json", "corrupt safetensors header"),
            ((4).to_bytes(8, "little") + b"[12]", "no JSON object"),
            ((13).to_bytes(8, "little") + b'{"x":{"y":1}}', "entry for tensor 'x' is malformed"),
        ],
    )
    def test_not_safetensors(self, copied, content, message):
        path = shard_of(copied, EXPERT)
        path.write_bytes(content)
        self.refused(copied, rf"{path.name}: .*{message}")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 8 bytes, its extent holds 4"),
            ({"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}, "has dtype F31, which cannot be read"),
            ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "does not follow the one before it"),
            ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "truncated, the file has"),
            ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "longer than its tensors"),
        ],
    )
    def test_header_contradicts_itself(self, tmp_path, entry, message):
        raw = json.dumps({"x": entry}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"1234")
        with pytest.raises(CheckpointError, match=rf"x.safetensors: .*{message}"):
            read_header(str(tmp_path / "x.safetensors"))

    def test_shard_is_gone(self, copied):
        path = shard_of(copied, EXPERT)
        path.unlink()
        self.refused(copied, rf"index.json names files that do not exist: .*{path.name}")

    def test_index_contradicts_shards(self, copied):
        path = shard_of(copied, EXPERT)
        edit(path, lambda tensors: tensors.pop(EXPERT))
        self.refused(copied, rf"index.json places tensors in shards which lack them: '{EXPERT}' in {path.name}")

    def test_broken_index(self, copied):
        (copied / "model.safetensors.index.json").write_text('{"metadata": {}}')
        self.refused(copied, "model.safetensors.index.json: not a safetensors index with a `weight_map`")

    def unsharded(self, folder, change):
        make_model().save_pretrained(folder)
        edit(folder / "model.safetensors", change)

    @pytest.mark.parametrize(
        "name",
        [
            EXPERT,
            "model.layers.3.mlp.experts.0.gate_proj.weight",
        ],
    )
    def test_missing_expert(self, tmp_path, name):
        self.unsharded(tmp_path, lambda tensors: tensors.pop(name))
        self.refused(
            tmp_path, rf"nothing was loaded.\n  .*{tmp_path.name}.model.safetensors: missing tensors '{name}'"
        )

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.0.input_layernorm.weight",
            "model.layers.2.mlp.gate.e_score_correction_bias",
            "model.embed_tokens.weight",
            "model.norm.weight",
        ],
    )
    def test_other_missing_tensors_are_named_as_native_does(self, tmp_path, name, load_reports):
        self.unsharded(tmp_path, lambda tensors: tensors.pop(name))
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {name}
        (report,) = load_reports
        assert re.search(rf"{re.escape(name)} +\| MISSING", report)

    def test_missing_expert_names_the_shard_of_its_neighbours(self, copied):
        path = shard_of(copied, EXPERT)
        edit(path, lambda tensors: tensors.pop(EXPERT))
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        del index["weight_map"][EXPERT]
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(copied, rf"{path.name}: missing tensors '{EXPERT}'")

    def test_long_lists_are_cut(self, tmp_path):
        def without_experts(tensors):
            for name in [name for name in tensors if ".experts." in name]:
                del tensors[name]

        self.unsharded(tmp_path, without_experts)
        self.refused(tmp_path, "missing tensors '.*' and 28 more")

    @pytest.mark.parametrize("name", [EXPERT, "model.layers.0.self_attn.kv_a_layernorm.weight", "lm_head.weight"])
    def test_wrong_shape(self, tmp_path, name):
        def widen(tensors):
            tensors[name] = torch.zeros(5, *tensors[name].shape[1:])

        self.unsharded(tmp_path, widen)
        self.refused(tmp_path, rf"model.safetensors: tensor '{name}' has shape \(5,.*, the config asks for \(")

    def test_mismatched_sizes_can_be_accepted(self, tmp_path):
        self.unsharded(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 32)}))
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert model.lm_head.weight.shape == (96, 32)
        assert [key for key, *_ in info["mismatched_keys"]] == ["lm_head.weight"]

    def test_more_experts_than_the_config_says(self, tmp_path):
        make_model(n_routed_experts=6).save_pretrained(tmp_path)
        edit_config(tmp_path, n_routed_experts=4)
        self.refused(
            tmp_path,
            r"model.safetensors: more experts than the config's 4: '\S+layers.1.mlp.experts.4.down_proj.weight'",
        )

    def test_fewer_experts_than_the_config_says(self, tmp_path):
        make_model().save_pretrained(tmp_path)
        edit_config(tmp_path, n_routed_experts=6)
        self.refused(tmp_path, r"missing tensors .*experts.4.gate_proj.weight'.* and \d+ more")

    def test_other_unexpected_tensors_are_listed(self, tmp_path):
        self.unsharded(tmp_path, lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.zeros(2)}))
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["unexpected_keys"]) == {"model.layers.1.extra.weight"}

    def test_missing_head_is_left_to_transformers(self, tmp_path):
        self.unsharded(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {"lm_head.weight"}

    def test_pickled_weights(self, tmp_path):
        model = make_model()
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        self.refused(tmp_path, r"pytorch_model.bin: only pickled weights here.*use_safetensors=False")
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False), model)

    def test_a_file_that_fails_while_it_is_read(self, saved, monkeypatch):
        """Nothing half-loaded is returned, whether a plain tensor or an expert is the one that cannot be read."""
        read_into = StoredTensor.read_into
        for broken in ("model.norm.weight", EXPERT):

            def fail(self, out, broken=broken):
                if self.name == broken:
                    raise OSError(errno.EIO, f"{self.path}: Input/output error")
                read_into(self, out)

            monkeypatch.setattr(StoredTensor, "read_into", fail)
            self.refused(saved, "Input/output error|CONVERSION", error=(OSError, RuntimeError))

    def test_no_weights(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        self.refused(tmp_path, "no file named model.safetensors", error=OSError)


class TestSave:
    def test_where_it_was_loaded_from(self, copied):
        model = AutoModelForCausalLM.from_pretrained(copied)
        model.save_pretrained(copied, max_shard_size="50KB")
        assert_same_tensors(model, make_model())
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(copied), make_model())

    @pytest.mark.parametrize("sizes", [("10GB", "50KB"), ("50KB", "10GB"), ("50KB", "90KB")])
    def test_earlier_weights_are_not_read(self, tmp_path, sizes):
        make_model().save_pretrained(tmp_path, max_shard_size=sizes[0])
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "adapter_model.safetensors").write_text("")
        other = make_model()
        with torch.no_grad():
            other.model.norm.weight.fill_(3.0)
        other.save_pretrained(tmp_path, max_shard_size=sizes[1])
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path), other)
        kept = {path.name for path in tmp_path.iterdir()}
        assert {"tokenizer.json", "adapter_model.safetensors", "config.json"} <= kept
        index = tmp_path / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {name for name in kept if name.startswith("model") and not name.endswith(".json")} == shards

    @pytest.mark.parametrize("max_shard_size", ["10GB", "50KB"])
    def test_a_failed_save_leaves_the_old_checkpoint(self, copied, monkeypatch, max_shard_size):
        before = {path.name: path.read_bytes() for path in copied.iterdir()}
        model = make_model(num_nextn_predict_layers=2)

        def disk_full(tensors, filename, metadata=None):
            if "00003-of" in str(filename) or max_shard_size == "10GB":
                raise OSError(errno.ENOSPC, "No space left on device")
            safetensors.torch.save_file(tensors, filename, metadata=metadata)

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(copied, max_shard_size=max_shard_size)
        assert {path.name: path.read_bytes() for path in copied.iterdir()} == before

    def test_a_failed_first_save_leaves_nothing(self, tmp_path, monkeypatch):
        def disk_full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            make_model().save_pretrained(tmp_path / "new")
        assert not list((tmp_path / "new").iterdir())

    def test_leftovers_of_a_killed_save_go(self, tmp_path):
        (tmp_path / ".saving-abc").mkdir()
        (tmp_path / ".saving-abc" / "model.safetensors").write_text("half")
        make_model().save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"}

    def test_given_state_dict(self, tmp_path):
        """As Trainer and accelerate pass it, gathered from shards; theirs is not changed."""
        model = make_model()
        state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        names = set(state_dict)
        model.save_pretrained(tmp_path, state_dict=state_dict)
        assert set(state_dict) == names
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        assert "model.layers.3.shared_head.head.weight" in read_all(tmp_path)

    def test_other_ranks_write_nothing(self, tmp_path):
        make_model().save_pretrained(tmp_path, is_main_process=False)
        assert not list(tmp_path.iterdir())

    def test_push_to_hub_writes_in_place(self, tmp_path, monkeypatch):
        calls = []

        def record(self, folder, **kwargs):
            calls.append((folder, kwargs))

        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", record)
        make_model().save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine")
        ((folder, kwargs),) = calls
        assert folder == tmp_path and kwargs["push_to_hub"] is True and kwargs["repo_id"] == "me/mine"

    def test_tied_head(self, tmp_path):
        model = make_model(tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
        tensors = read_all(tmp_path)
        assert "lm_head.weight" not in tensors
        assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.model.embed_tokens.weight)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_scale_grid_is_the_ceiling():
    assert scale_grid((576, 7168), (128, 128)) == (5, 56)
    assert scale_grid((1, 1), (128, 128)) == (1, 1)


def test_a_model_type_of_ones_own(make_model, tmp_path):
    """Subclasses that a program registers: their experts are saved in the official layout, and read from it."""

    class OwnConfig(transformers_dsv3.DeepseekV3Config):
        model_type = "own_dsv3"

    class OwnModel(transformers_dsv3.DeepseekV3ForCausalLM):
        config_class = OwnConfig

    AutoConfig.register("own_dsv3", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    try:
        model = OwnModel(OwnConfig(**make_model(num_nextn_predict_layers=0).config.to_dict())).eval()
        model.save_pretrained(tmp_path)
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is OwnModel and not report["missing_keys"]
        tokens = torch.arange(2, 12)[None]
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    finally:
        CONFIG_MAPPING._extra_content.pop("own_dsv3")
        AutoModelForCausalLM._model_mapping._extra_content.pop(OwnConfig)


def test_shards_are_no_larger_than_asked_for(make_model, tmp_path):
    """Gates and ups of a layer's experts share one stack's memory; tensors that share any go to one file."""
    model = make_model(num_nextn_predict_layers=0)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    stack = model.model.layers[1].mlp.experts.gate_up_proj.nbytes
    whole = max(model.model.embed_tokens.weight.nbytes, stack // 2, 30_000)  # what cannot be divided further
    assert max(sizes.values()) <= whole + 4096, sizes  # and the header
