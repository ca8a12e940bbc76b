"""`DPOTrainer` on the plugin's model beside the same trainer on Transformers' own class, reference by reference."""

import copy
import inspect
import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from trl import DPOConfig, DPOTrainer

import transformers_dsv3


# Those that the installed TRL names, so that new ones are tried too
LOSS_TYPES = re.findall(
    r"`'(\w+)'`", inspect.getsource(DPOConfig).split("Type of loss to use.")[1].split("If multiple")[0]
)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_b_proj", "kv_b_proj", "o_proj"])


def test_loss_types_are_found():
    assert {"sigmoid", "hinge", "ipo", "exo_pair", "discopop", "sft"} <= set(LOSS_TYPES) and len(LOSS_TYPES) > 10


class KeepGradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def dpo(preference_rows, byte_tokenizer, on_cpu, tmp_path):
    """Function from a model and options to a `DPOTrainer` that has run."""

    def run(model, callbacks=(), ref_model=None, peft_config=None, train=True, resume=None, **options):
        fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
        args = DPOConfig(str(tmp_path / "run"), **{**on_cpu, **fixed, "max_grad_norm": 0, **options})
        trainer = DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=preference_rows,
            eval_dataset=preference_rows if args.eval_strategy != "no" else None,
            processing_class=byte_tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def reference(checkpoint):
    """A model a little off the checkpoint, so that no log-ratio is 0."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def options_of(loss_type):
    # The ε that TRL asks for
    return {"loss_type": loss_type, **({"label_smoothing": 1e-3} if loss_type == "exo_pair" else {})}


class TestBesideNative:
    """Losses and gradients of one step, every parameter."""

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_loss_and_gradients(self, dpo, checkpoint, reference, native_twin, measured, loss_type):
        runs = []
        for native in (True, False):
            ref = native_twin(reference) if native else copy.deepcopy(reference)
            if native:
                transformers_dsv3.unregister()
            try:
                model = AutoModelForCausalLM.from_pretrained(checkpoint)
                assert (type(model) is DeepseekV3ForCausalLM) is native
                gradients = KeepGradients()
                trainer = dpo(model, [gradients], ref_model=ref, max_steps=1, beta=0.3, **options_of(loss_type))
            finally:
                transformers_dsv3.register()
            runs.append((losses(trainer)[0], gradients.seen[0]))
        (expected_loss, expected), (loss, seen) = runs
        measured_loss = abs(loss - expected_loss) / max(abs(expected_loss), 1e-6)
        assert seen.keys() == expected.keys() and not any(".mtp." in name for name in seen)
        largest = max(gradient.norm() for gradient in expected.values())
        # Of gradients that are all but 0 beside the others only rounding is left
        errors = {n: float((seen[n] - g).norm() / g.norm().clamp(min=1e-4 * largest)) for n, g in expected.items()}
        worst = max(errors, key=errors.__getitem__)
        # It divides differences of log-probabilities by τ = 0.05, and their rounding too
        bound = 1e-4 if loss_type == "discopop" else 1e-5
        for what, error in (("loss", measured_loss), ("gradients", errors[worst])):
            key = f"DPO {what} beside native's, relative error{' (discopop)' if loss_type == 'discopop' else ''}"
            measured[key] = max(measured.get(key, 0.0), error)
        assert measured_loss < 1e-5
        assert errors[worst] < bound, worst

    def test_a_run_of_some_steps(self, dpo, checkpoint):
        """With the reference that TRL reads from the checkpoint, and gradient checkpointing."""
        runs = []
        for native in (True, False):
            if native:
                transformers_dsv3.unregister()
            try:
                runs.append(losses(dpo(AutoModelForCausalLM.from_pretrained(checkpoint), max_steps=4)))
            finally:
                transformers_dsv3.register()
        assert runs[1] == pytest.approx(runs[0], rel=1e-4)
        assert runs[0][0] == pytest.approx(math.log(2), rel=1e-5) and runs[0][3] < runs[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(dpo, checkpoint, untouched, loss_type, adapter):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = dpo(model, peft_config=adapter, train=False, **options_of(loss_type))
    with untouched(model, weights_move=adapter is None):
        trainer.train()
    assert all(map(math.isfinite, losses(trainer)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"max_length": 16},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_options(dpo, checkpoint, untouched, options):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = dpo(model, train=False, **options)
    with untouched(model):
        trainer.train()
    assert all(map(math.isfinite, losses(trainer)))


class TestReferences:
    """The same first loss, log 2, and the same run, whoever computes the reference."""

    def test_references_agree(self, dpo, checkpoint):
        runs = []
        for options in ({}, {"precompute_ref_log_probs": True}, {"ref_model": "given"}):
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
            if "ref_model" in options:
                options["ref_model"] = AutoModelForCausalLM.from_pretrained(checkpoint)
            runs.append(losses(dpo(model, max_steps=4, **options)))
        assert runs[0][0] == pytest.approx(math.log(2), rel=1e-5) and runs[0][3] < runs[0][0]
        for run in runs[1:]:
            assert run == pytest.approx(runs[0], rel=1e-5)

    @pytest.mark.parametrize("precompute", [False, True])
    def test_adapter_off_is_the_reference(self, dpo, checkpoint, precompute):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        before = {name: p.clone() for name, p in model.named_parameters()}
        options = {"precompute_ref_log_probs": precompute, "learning_rate": 1e-2, "max_steps": 4}
        trainer = dpo(model, peft_config=LORA, **options)
        assert trainer.ref_model is None
        seen = losses(trainer)
        assert seen[0] == pytest.approx(math.log(2), rel=1e-5) and seen[3] < seen[0]
        base = trainer.model.unload()
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())

    def test_an_adapter_trained_before_is_its_own_reference(self, dpo, checkpoint):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LORA)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
        trainer = dpo(model)
        assert set(trainer.model.peft_config) == {"default", "ref"}
        assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)


class TestRefusals:
    """What TRL cannot do is said when the trainer is made."""

    def test_a_synchronised_reference_of_an_adapter(self, dpo, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        with pytest.raises(NotImplementedError, match="sync_ref_model"):
            dpo(model, peft_config=LORA, train=False, sync_ref_model=True)

    def test_an_adapter_on_the_output_head(self, dpo, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        with pytest.raises(ValueError, match="lm_head"):
            dpo(model, peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), train=False)

    def test_the_model_as_its_own_reference(self, dpo, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        with pytest.raises(ValueError, match="cannot be the same object"):
            dpo(model, ref_model=model, train=False)

    def test_a_model_that_was_never_saved_has_no_reference(self, dpo, make_model, byte_tokenizer):
        with pytest.raises(OSError, match="Repo id"):
            dpo(make_model(vocab_size=len(byte_tokenizer)), train=False)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_resumed_run_equals_an_uninterrupted_one(dpo, checkpoint, tmp_path, adapter):
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    states = []
    for parts in ([4], [2, 4]):
        for steps in parts:
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
            resume = str(tmp_path / "run" / "checkpoint-2") if steps > 2 and len(parts) > 1 else None
            trainer = dpo(model, peft_config=copy.deepcopy(adapter), resume=resume, max_steps=steps, **options)
        states.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    before = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert adapter or any(not torch.equal(tensor, before[name]) for name, tensor in states[0].items())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-6, atol=1e-7, msg=name)
