"""TRL's trainers on the plugin's models, as their users call them: unchanged scripts, and what is refused."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import transformers_dsv3
from transformers_dsv3.models.dsv3.decoder_dsv3 import DeepseekV3DecoderLayer


LORA = {"r": 4, "target_modules": ["q_b_proj", "kv_b_proj", "o_proj"]}
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}


def variety(completions, **kwargs):
    """A reward that differs between random completions."""
    return [float(len(set(completion))) for completion in completions]


def load(kind, folder, **options):
    if kind == "reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **options)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def make_trainer(preference_rows, byte_tokenizer, on_cpu, tmp_path):
    """Function from the kind of trainer, the model and options that are not TRL's defaults to a trainer."""

    def make(kind, model, peft=None, **options):
        trainer_class, config_class = TRAINERS[kind]
        rows, given = preference_rows, {}
        if kind == "sft":
            rows = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows])
        if kind in ("grpo", "rloo"):
            rows, given["reward_funcs"] = rows.select_columns(["prompt"]), variety
            options = {"max_completion_length": 8, "num_generations": 2, **options}
        if peft:
            given["peft_config"] = LoraConfig(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", **peft)
        fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
        args = config_class(str(tmp_path / "run"), **{**on_cpu, **fixed, **options})
        return trainer_class(model=model, args=args, train_dataset=rows, processing_class=byte_tokenizer, **given)

    return make


def losses_of(trainer):
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo"])
def test_defaults(make_trainer, checkpoint, untouched, kind, adapter):
    """Gradient checkpointing among them, which TRL turns on."""
    model = load(kind, checkpoint)
    trainer = make_trainer(kind, model, peft=adapter)
    with untouched(model, weights_move=adapter is None):
        losses_of(trainer)


@pytest.mark.parametrize("kind", ["dpo", "reward", "grpo"])
def test_losses_beside_the_main_one_stay_out_of_preferences(make_trainer, checkpoint, untouched, kind):
    """MTP and balance losses that were set for language modelling."""
    runs = []
    for weights in ({}, {"mtp_loss_weight": 0.3, "seq_aux_loss_weight": 0.1}):
        model = load(kind, checkpoint, **weights)
        trainer = make_trainer(kind, model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any(".mtp." in name for name in trained)
        with untouched(model):
            losses = losses_of(trainer)
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name]), name


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo"])
def test_a_model_by_its_path(make_trainer, checkpoint, kind):
    """TRL looks the class up by its name in `transformers`, where native's is unless the plugin's was put there."""
    transformers_dsv3.register(names=True)
    try:
        trainer = make_trainer(kind, str(checkpoint))
    finally:
        transformers_dsv3.register()
    name = "Dsv3ForSequenceClassification" if kind == "reward" else "Dsv3ForCausalLM"
    assert type(trainer.model) is getattr(transformers_dsv3, name)
    losses_of(trainer)


@pytest.mark.parametrize("options", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "weights"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo"])
def test_bf16(make_trainer, checkpoint, untouched, kind, options):
    model = load(kind, checkpoint, dtype=options.get("dtype", torch.float32))
    trainer = make_trainer(kind, model, bf16=options.get("bf16", False))
    with untouched(model):
        losses_of(trainer)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"num_iterations": 2},
        {"cache_implementation": "static"},
        *({"loss_type": name} for name in ("grpo", "dr_grpo", "bnpo", "cispo", "sapo")),
    ],
    ids=str,
)
def test_grpo_options(make_trainer, checkpoint, untouched, options):
    model = load("grpo", checkpoint)
    trainer = make_trainer("grpo", model, **options)
    with untouched(model):
        losses_of(trainer)


def test_grpo_may_generate_with_mtp(make_trainer, checkpoint):
    losses_of(make_trainer("grpo", load("grpo", checkpoint), generation_kwargs={"use_mtp": True}))


def test_grpo_generates_by_continuous_batching(make_trainer, checkpoint):
    """By the plugin's engine, since Transformers' own pages are of another size than latents."""
    trainer = make_trainer("grpo", load("grpo", checkpoint), use_transformers_continuous_batching=True)
    assert len(losses_of(trainer)) == 2
    assert "_cached_continuous_batching_manager" not in vars(trainer.model)


class TestPacking:
    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
    def test_strategies(self, make_trainer, checkpoint, strategy):
        losses_of(make_trainer("sft", load("sft", checkpoint), packing=True, packing_strategy=strategy, max_length=64))

    def test_sequences_of_a_row_do_not_see_each_other(self, make_trainer, checkpoint):
        """One row without padding, of several sequences, is the batch of padded rows."""
        seen = []
        for padding_free in (False, True):
            model = load("sft", checkpoint)
            seen.append(losses_of(make_trainer("sft", model, padding_free=padding_free, max_length=None)))
        assert seen[1] == pytest.approx(seen[0], rel=1e-5)

    def test_trl_pads_dpo_whatever_is_asked_for(self, make_trainer, checkpoint):
        seen = [losses_of(make_trainer("dpo", load("dpo", checkpoint), padding_free=free)) for free in (True, False)]
        assert seen[0] == seen[1]


class TestRouterAuxLoss:
    """TRL's balance loss is Mixtral's over a softmax: never computed for sigmoid routers."""

    @pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
    @pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
    def test_refused_before_the_first_step(self, make_trainer, checkpoint, kind, adapter, monkeypatch):
        trainer = make_trainer(kind, load(kind, checkpoint), peft=adapter, router_aux_loss_coef=0.01)
        forward = DeepseekV3DecoderLayer.forward

        def generates(layer, *args, **kwargs):
            assert not torch.is_grad_enabled(), "compute began"
            return forward(layer, *args, **kwargs)

        monkeypatch.setattr(DeepseekV3DecoderLayer, "forward", generates)
        with pytest.raises(ValueError, match="`output_router_logits=True`.*softmax.*seq_aux_loss_weight"):
            trainer.train()

    def test_zero_is_off(self, make_trainer, checkpoint):
        losses_of(make_trainer("dpo", load("dpo", checkpoint), router_aux_loss_coef=0.0))

    @pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
    def test_models_that_return_router_logits_are_refused(self, make_trainer, checkpoint, kind):
        model = load(kind, checkpoint, output_router_logits=True)
        with pytest.raises(ValueError, match="`output_router_logits=True`.*seq_aux_loss_weight"):
            make_trainer(kind, model)
        model.config.output_router_logits = False
        make_trainer(kind, model)

    @pytest.mark.parametrize("kind", ["sft", "dpo"])
    def test_a_coefficient_in_the_checkpoint_is_of_another_router(self, make_trainer, checkpoint, tmp_path, kind):
        shutil.copytree(checkpoint, tmp_path / "other")
        fields = json.loads((tmp_path / "other" / "config.json").read_text())
        fields |= {"router_aux_loss_coef": 0.5, "output_router_logits": False}
        (tmp_path / "other" / "config.json").write_text(json.dumps(fields))
        # On native it ends in an AttributeError, `num_experts`
        with pytest.raises(ValueError, match="`output_router_logits=True`.*softmax"):
            losses_of(make_trainer(kind, load(kind, tmp_path / "other")))

    def test_the_config_keeps_what_is_true(self, checkpoint, tmp_path):
        config = AutoConfig.from_pretrained(checkpoint, output_router_logits=True)
        assert config.output_router_logits
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).output_router_logits
        assert AutoConfig.from_pretrained(tmp_path, output_router_logits=False).output_router_logits is False
        assert AutoConfig.from_pretrained(tmp_path) == AutoConfig.from_pretrained(tmp_path)


def test_reward_models_have_one_label(make_trainer, checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    with pytest.raises(ValueError, match="num_labels=2"):
        make_trainer("reward", model)
