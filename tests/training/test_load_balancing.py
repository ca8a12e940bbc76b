"""The correction bias moves once an optimizer step by what was counted in it, and by nothing else."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

import transformers_dsv3
from tests import programs
from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback
from transformers_dsv3.training import metrics
from transformers_dsv3.training.load_balancing import move_correction_bias, routers, take_loads
from transformers_dsv3.training.routing_statistics import routing_statistics


MODEL = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "num_hidden_layers": 3}


def random_rows(count, length=16, seed=0):
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def train(model, folder, rows, callbacks, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    resume = settings.pop("resume_from_checkpoint", None)
    data = Dataset.from_dict({"input_ids": rows, "labels": rows}) if isinstance(rows, list) else rows
    trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def biases(model):
    return torch.stack([router.e_score_correction_bias for router in routers(model)])


def counted(model, *passes, **kwargs):
    take_loads(model)
    model.train()
    for tokens in passes:
        model(tokens, use_cache=False, **kwargs)
    return take_loads(model)[0]


class TestCounting:
    def chosen(self, model, tokens, rows):
        """Counts of the choices that the routers return in evaluation mode, of the rows of `(T,)` that are given."""
        seen = []
        hooks = [r.register_forward_hook(lambda _m, _a, output: seen.append(output[2])) for r in routers(model)[:-1]]
        model.eval()(tokens)
        for hook in hooks:
            hook.remove()
        experts = routers(model)[0].num_experts
        return torch.stack([torch.bincount(indices[rows].flatten(), minlength=experts) for indices in seen])

    @pytest.mark.parametrize("groups", [1, 4])
    def test_every_token_once(self, make_model, groups):
        model = make_model(**{**MODEL, "n_group": groups, "topk_group": max(groups // 2, 1)})
        tokens = torch.tensor(random_rows(3))
        expected = self.chosen(model, tokens, torch.ones(48, dtype=torch.bool))
        assert expected.sum() == 2 * 48 * 4
        assert torch.equal(counted(model, tokens)[:-1], expected)
        assert not counted(model, tokens)[-1].any(), "the MTP layer did not run"
        assert torch.equal(counted(model, tokens, tokens)[:-1], 2 * expected)

    def test_padding_is_not_counted(self, make_model):
        model = make_model(**MODEL)
        tokens = torch.tensor(random_rows(2))
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
        mask[1, 9:] = 0
        loads = counted(model, tokens, attention_mask=mask)
        assert torch.equal(loads[:-1].sum(dim=1), (mask.sum() * 4).expand(2))

    def test_evaluation_and_passes_without_gradient_are_not_counted(self, make_model):
        model = make_model(**MODEL)
        tokens = torch.tensor(random_rows(2))
        take_loads(model)
        model.eval()(tokens)
        with torch.no_grad():
            model.train()(tokens, use_cache=False)
        assert not take_loads(model)[0].any()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_counts_once_and_chooses_once(self, make_model, reentrant):
        tokens = torch.tensor(random_rows(2))
        expected = counted(make_model(mtp_loss_weight=0.3, **MODEL), tokens, labels=tokens)
        model = make_model(mtp_loss_weight=0.3, **MODEL)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss = model.train()(tokens, labels=tokens, use_cache=False).loss
        # Another choice than the first would be a wrong gradient: a bias that moved in between changes nothing
        for router in routers(model):
            router.e_score_correction_bias.copy_(torch.linspace(-5, 5, 16))
        loss.backward()
        assert torch.equal(take_loads(model)[0], expected)
        again = make_model(mtp_loss_weight=0.3, **MODEL).train()
        again(tokens, labels=tokens, use_cache=False).loss.backward()
        for (name, seen), (_, right) in zip(model.named_parameters(), again.named_parameters()):
            torch.testing.assert_close(seen.grad, right.grad, rtol=1e-4, atol=1e-6, msg=name)

    def test_mtp_layers_count_what_they_are_fed(self, make_model):
        model = make_model(mtp_loss_weight=0.3, **MODEL)
        tokens = torch.tensor(random_rows(2))
        # The last token has no next one to be fed
        assert counted(model, tokens, labels=tokens)[-1].sum() == 2 * 15 * 4
        positions = torch.cat([torch.arange(6), torch.arange(10)])[None].expand(2, -1)
        assert counted(model, tokens, labels=tokens, position_ids=positions)[-1].sum() == 2 * 14 * 4


class TestBias:
    @given(loads=st.lists(st.integers(0, 10**9), min_size=16, max_size=16), rate=st.floats(1e-5, 1.0))
    def test_rule(self, loads, rate):
        config = transformers_dsv3.Dsv3Config(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=16,
            num_experts_per_tok=2, n_group=1, topk_group=1, num_attention_heads=1, kv_lora_rank=4, q_lora_rank=None,
            qk_rope_head_dim=2, qk_nope_head_dim=2, v_head_dim=2, intermediate_size=4, moe_intermediate_size=2,
            num_nextn_predict_layers=0, num_key_value_heads=1,
        )  # fmt: skip
        model = transformers_dsv3.Dsv3Model(config)
        (router,) = routers(model)
        before = torch.linspace(-0.3, 0.3, 16)
        router.e_score_correction_bias.copy_(before)
        move_correction_bias(model, torch.tensor([loads]), rate)
        after = router.e_score_correction_bias
        mean = sum(loads) / 16
        signs = torch.tensor([(mean > load) - (mean < load) for load in loads], dtype=torch.float64)
        expected = before.double() + rate * signs
        if signs.any():
            expected = expected - expected.mean()
        torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-7)
        assert after.dtype == torch.float32

    def test_a_layer_without_tokens_stays(self, make_model):
        model = make_model(**MODEL)
        for router in routers(model):
            router.e_score_correction_bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
        before = biases(model)
        move_correction_bias(model, torch.zeros(3, 16, dtype=torch.int64), 0.1)
        assert torch.equal(biases(model), before)

    def test_accumulation_gives_the_same_bias(self, make_model, tmp_path):
        """Four micro-batches of one row move it as one of four rows does."""
        seen = []
        for batch, steps in ((4, 1), (1, 4)):
            model = make_model(**MODEL)
            train(
                model, tmp_path, random_rows(16), [LoadBalancingCallback()],
                per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            )  # fmt: skip
            seen.append(biases(model))
        assert seen[0].any()
        assert torch.equal(seen[0], seen[1])

    @pytest.mark.parametrize("groups", [1, 2, 4, 8])
    def test_balances_what_is_given(self, make_model, groups):
        """With the network held still, the loads come even: with groups of two experts as well."""
        model = make_model(**{**MODEL, "n_group": groups, "topk_group": max(groups // 2, 1), "num_hidden_layers": 2})
        (router, _) = routers(model)
        hidden = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0)) + 0.5
        callback, steps = LoadBalancingCallback(), 200

        def loads():
            return torch.bincount(router.eval()(hidden)[2].flatten(), minlength=16)[None]

        before = routing_statistics(loads()).mean()
        for step in range(steps):
            move_correction_bias(router, loads(), callback.update_rate(step, steps))
        after = routing_statistics(loads()).mean()
        assert before["utilisation"] < 0.7 and after["utilisation"] > 0.95

    def test_a_step_that_the_loss_scaler_skips_moves_nothing(self, make_model):
        class Optimizer:
            step_was_skipped = True

        model = make_model(**MODEL)
        callback = LoadBalancingCallback()
        arguments = TrainingArguments("unused", use_cpu=True, report_to="none")
        callback.on_train_begin(arguments, None, None, model=model, optimizer=None)
        for skipped in (True, False):
            tokens = torch.tensor(random_rows(4))
            model.train()(tokens, use_cache=False)
            before = biases(model)
            Optimizer.step_was_skipped = skipped
            state = TrainerState(global_step=0, max_steps=10)
            callback.on_pre_optimizer_step(None, None, None, model=model)
            callback.on_optimizer_step(None, state, None, model=model, optimizer=Optimizer())
            assert torch.equal(biases(model), before) == skipped

    def test_once_an_optimizer_step(self, make_model, tmp_path):
        model = make_model(**MODEL)
        before = biases(model)
        train(model, tmp_path, random_rows(16), [LoadBalancingCallback(0.125, decay_ratio=0.0)],
              max_steps=1, gradient_accumulation_steps=4)  # fmt: skip
        steps = (biases(model) - before)[:-1]
        # One step up or down (or none), then the mean taken off
        assert set((steps - steps[:, :1]).div(0.125).round(decimals=3).abs().flatten().tolist()) <= {0.0, 1.0, 2.0}

    def test_resumed_run_goes_on_exactly(self, make_model, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 3

        callbacks = [LoadBalancingCallback, MtpObjectiveCallback]
        arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        rows = random_rows(64)
        whole = make_model(**MODEL)
        train(whole, tmp_path / "whole", rows, [c() for c in callbacks], **arguments)
        train(make_model(**MODEL), tmp_path / "parts", rows, [*(c() for c in callbacks), Stop()], **arguments)
        resumed = make_model(**MODEL, seed=1)
        train(resumed, tmp_path / "parts", rows, [c() for c in callbacks], resume_from_checkpoint=True, **arguments)
        assert torch.equal(biases(resumed), biases(whole))
        for (name, seen), (_, expected) in zip(resumed.named_parameters(), whole.named_parameters()):
            torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6, msg=name)

    def test_loss_that_is_not_finite_moves_nothing(self, make_model, tmp_path):
        class Spoil(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                before.append(biases(model))

            def on_optimizer_step(self, args, state, control, model=None, **kwargs):
                after.append(biases(model))

        before, after = [], []

        class NanTrainer(Trainer):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                return loss * float("nan") if self.state.global_step == 2 else loss

        model = make_model(**MODEL)
        rows = random_rows(32)
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, max_grad_norm=0,
        )  # fmt: skip
        NanTrainer(model=model, args=args, train_dataset=data, callbacks=[LoadBalancingCallback(), Spoil()]).train()
        assert not torch.equal(before[1], after[1])
        assert torch.equal(before[2], after[2])
        assert not take_loads(model)[0].any(), "counts of the step are not kept for the next"

    def test_frozen_routers_and_adapters_keep_their_bias(self, make_model, tmp_path, caplog):
        base = make_model(**MODEL)
        before = biases(base)
        model = get_peft_model(base, LoraConfig(target_modules=["o_proj", "kv_b_proj"], task_type="CAUSAL_LM"))
        caplog.set_level(logging.WARNING)
        trainer = train(model, tmp_path, random_rows(16), [LoadBalancingCallback()])
        assert torch.equal(biases(base), before)
        assert any("router/utilisation" in entry for entry in trainer.state.log_history)
        with pytest.raises(ValueError, match="frozen under an adapter"):
            train(model, tmp_path, random_rows(16), [MtpObjectiveCallback()])

    def test_routers_frozen_by_hand_keep_their_bias(self, make_model, tmp_path):
        model = make_model(**MODEL)
        first, second, _ = routers(model)
        second.weight.requires_grad_(False)
        before = biases(model)
        train(model, tmp_path, random_rows(16), [LoadBalancingCallback()])
        assert not torch.equal(first.e_score_correction_bias, before[0])
        assert torch.equal(second.e_score_correction_bias, before[1])

    def test_routers_that_peft_trains_whole(self, make_model, tmp_path):
        base = make_model(**MODEL)
        config = LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        trainer = train(model, tmp_path, random_rows(16), [LoadBalancingCallback()])
        assert all(entry["tokens_per_second"] > 0 for entry in trainer.state.log_history if "loss" in entry)


class TestOtherWaysToTrain:
    """Callbacks that come late, models that are made late, and one model in several hands."""

    def trainer(self, make_model, tmp_path, callbacks=(), rows=16, cls=Trainer, **more):
        data = random_rows(rows)
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": data, "labels": data})
        return cls(args=args, train_dataset=data, callbacks=list(callbacks), **more)

    def test_model_init(self, make_model, tmp_path):
        callbacks = [LoadBalancingCallback(seq_aux_loss_weight=0.5), MtpObjectiveCallback()]
        trainer = self.trainer(make_model, tmp_path, callbacks, model_init=lambda: make_model(**MODEL))
        with pytest.raises(ValueError, match="optimizer was made without the MTP layers"):
            trainer.train()
        made = make_model(mtp_loss_weight=0.3, **MODEL)
        before = made.model.mtp_layers[0].eh_proj.weight.clone(), biases(made)
        self.trainer(make_model, tmp_path, callbacks, model_init=lambda: made).train()
        assert not torch.equal(made.model.mtp_layers[0].eh_proj.weight, before[0])
        assert not torch.equal(biases(made), before[1])

    def test_added_afterwards(self, make_model, tmp_path):
        model = make_model(**MODEL)
        trainer = self.trainer(make_model, tmp_path, model=model)
        trainer.add_callback(LoadBalancingCallback(seq_aux_loss_weight=0.25))
        seen = []

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(model.config.seq_aux_loss_weight)

        trainer.add_callback(Look())
        before = biases(model)
        trainer.train()
        assert not torch.equal(biases(model), before) and seen == [0.25, 0.25]
        assert model.config.seq_aux_loss_weight == 0
        dense = make_model(first_k_dense_replace=2, num_nextn_predict_layers=0)
        trainer = self.trainer(make_model, tmp_path, model=dense)
        trainer.add_callback(LoadBalancingCallback())
        with pytest.raises(ValueError, match="LoadBalancingCallback is for mixture-of-experts layers"):
            trainer.train()

    def test_settings_come_back_after_several_trainers(self, make_model, tmp_path):
        model = make_model(**MODEL)
        for _ in range(2):
            callbacks = [LoadBalancingCallback(seq_aux_loss_weight=0.1), MtpObjectiveCallback()]
            trainer = self.trainer(make_model, tmp_path, callbacks, model=model)
        trainer.train()
        assert model.config.mtp_loss_weight == model.config.seq_aux_loss_weight == 0

    def test_after_preference_training(self, make_model, tmp_path):
        model = make_model(**MODEL)
        model.add_model_tags(["trl", "dpo"])
        assert not model.base_model.training_state.trains_next_token_prediction
        model.add_model_tags(["trl", "sft"])
        model.add_model_tags("my-project")
        assert model.base_model.training_state.trains_next_token_prediction
        model.add_model_tags(["trl", "dpo"])
        before = biases(model)
        self.trainer(make_model, tmp_path, [LoadBalancingCallback(), MtpObjectiveCallback()], model=model).train()
        assert not torch.equal(biases(model), before)

    def test_label_smoothing_is_refused(self, make_model, tmp_path):
        with pytest.raises(ValueError, match="label_smoothing_factor"):
            train(make_model(**MODEL), tmp_path, random_rows(8), [MtpObjectiveCallback()], label_smoothing_factor=0.1)


class TestSchedule:
    def test_shapes(self):
        constant = LoadBalancingCallback(0.01, decay_ratio=0.0)
        assert {constant.update_rate(step, 100) for step in range(100)} == {0.01}
        line = LoadBalancingCallback(0.01, decay_ratio=1.0)
        rates = [line.update_rate(step, 100) for step in range(100)]
        assert rates == sorted(rates, reverse=True) and rates[0] < 0.01 and 0 < rates[-1] < 1e-4
        warm = LoadBalancingCallback(0.01, warmup_ratio=0.2, decay_ratio=0.3)
        rates = [warm.update_rate(step, 100) for step in range(100)]
        assert (
            max(rates) == 0.01 and rates[:20] == sorted(rates[:20]) and rates[70:] == sorted(rates[70:], reverse=True)
        )
        assert warm.update_rate(250, 100) == 0  # trained on past its end

    def test_default_suits_the_length(self):
        assert LoadBalancingCallback(decay_ratio=0.0).update_rate(0, 10**6) == 1e-3
        assert LoadBalancingCallback().update_rate(0, 2) <= 0.05
        for steps in (100, 400, 900):
            for ratios in ((0.0, 1.0), (0.0, 0.0), (0.1, 0.2)):
                callback = LoadBalancingCallback(None, *ratios)
                reach = sum(callback.update_rate(step, steps) for step in range(steps))
                assert reach == pytest.approx(1.0, rel=0.02)

    def test_mtp_weight(self):
        callback = MtpObjectiveCallback()
        assert [callback.weight_at(step, 100) for step in (0, 67, 68, 99)] == [0.3, 0.3, 0.1, 0.1]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"bias_update_rate": -1.0}, "bias_update_rate"),
            ({"warmup_ratio": 1.5}, "warmup_ratio"),
            ({"warmup_ratio": 0.6, "decay_ratio": 0.6}, "more than the whole run"),
            ({"seq_aux_loss_weight": -1e-4}, "seq_aux_loss_weight"),
            ({"bias_update_rate": float("nan")}, "bias_update_rate"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LoadBalancingCallback(**arguments)
        with pytest.raises(ValueError, match="final_ratio"):
            MtpObjectiveCallback(final_ratio=2.0)
        for weights in ((0.0, 0.1), (0.3, 0.0), (-0.3, 0.1)):
            with pytest.raises(ValueError, match="weight=.* must be above 0"):
                MtpObjectiveCallback(*weights)


class TestBadInput:
    def test_other_models_are_refused(self, make_model, native_twin, tmp_path):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                             num_attention_heads=2))  # fmt: skip
        adapted = get_peft_model(llama, LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"))
        for callback in (LoadBalancingCallback(), MtpObjectiveCallback()):
            for model in (llama, adapted):
                with pytest.raises(ValueError, match=f"{type(callback).__name__} .*, not for LlamaForCausalLM.$"):
                    train(model, tmp_path, random_rows(8), [callback])
            with pytest.raises(ValueError, match="not for DeepseekV3ForCausalLM. Import transformers_dsv3 before"):
                train(native_twin(make_model()), tmp_path, random_rows(8), [callback])
        dense = make_model(first_k_dense_replace=2, num_nextn_predict_layers=0)
        with pytest.raises(ValueError, match="`first_k_dense_replace=2` are dense"):
            train(dense, tmp_path, random_rows(8), [LoadBalancingCallback()])
        with pytest.raises(ValueError, match="this model has none .`num_nextn_predict_layers=0`"):
            train(dense, tmp_path, random_rows(8), [MtpObjectiveCallback()])

    def test_rounded_bias_is_refused(self, make_model):
        model = make_model(**MODEL)
        router = routers(model)[0]
        router.e_score_correction_bias = router.e_score_correction_bias.bfloat16()
        with pytest.raises(ValueError, match="bfloat16.*fp32"):
            LoadBalancingCallback().prepare(model, TrainingArguments("unused", use_cpu=True))

    def test_bias_stored_in_bf16_is_balanced_in_fp32(self, make_model, tmp_path):
        from safetensors.torch import load_file, save_file

        make_model(**MODEL).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        save_file({**state, name: torch.linspace(-1, 1, 16).bfloat16()}, file, {"format": "pt"})
        model = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(tmp_path)
        train(model, tmp_path / "out", random_rows(16), [LoadBalancingCallback(1e-4, decay_ratio=0.0)], max_steps=1)
        bias = biases(model)[0]
        assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float())

    def test_labels_without_targets_and_one_token(self, make_model, tmp_path):
        model = make_model(mtp_loss_weight=0.3, seq_aux_loss_weight=1e-3, **MODEL).train()
        tokens = torch.tensor(random_rows(2))
        for fed, labels in (
            (tokens, torch.full_like(tokens, -100)),
            (tokens[:1, :1], tokens[:1, :1]),
            (tokens[:1, :2], tokens[:1, :2]),
        ):
            for num_items in (None, torch.tensor(0)):
                model.zero_grad()
                loss = model(fed, labels=labels, num_items_in_batch=num_items, use_cache=False).loss
                loss.backward()
                assert torch.isfinite(loss)
                assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        with pytest.raises(ValueError, match="`labels` of shape"):
            model(tokens, labels=tokens[:, :3])
        for wrong in (96, -1):
            with pytest.raises(ValueError, match="`labels` range"):
                model(tokens, labels=tokens.clone().fill_(wrong))

    def test_training_without_the_callback_says_so_once(self, make_model, caplog):
        model = make_model(**MODEL).train()
        tokens = torch.tensor(random_rows(2))
        transformers_dsv3.models.dsv3.modeling_dsv3.logger.warning_once.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                model(tokens, labels=tokens, use_cache=False)
        assert sum("nothing balances the load" in record.getMessage() for record in caplog.records) == 1


class TestLogs:
    def test_figures_reach_reporters_that_stand_before(self, make_model, tmp_path):
        class Reporter(TrainerCallback):
            """As the callbacks of TensorBoard and others: made by the trainer, before those it is given."""

            seen = []

            def on_log(self, args, state, control, logs=None, **kwargs):
                self.seen.append(dict(logs))

        trainer = None
        model = make_model(**MODEL)
        callbacks = [Reporter(), LoadBalancingCallback(), MtpObjectiveCallback()]
        trainer = train(model, tmp_path, random_rows(32), callbacks)
        names = {"utilisation", "max_violation", "load_entropy", "dead_experts", "bias_update_rate"}
        wanted = {f"router/{name}" for name in names} | {"tokens_per_second", "mfu"}
        wanted |= {"mtp/loss", "mtp/acceptance", "mtp/loss_weight"}
        for entries in (Reporter.seen, trainer.state.log_history):
            steps = [entry for entry in entries if "loss" in entry]
            assert len(steps) == 4
            for entry in steps:
                assert wanted <= entry.keys()
                assert 1 / 16 <= entry["router/utilisation"] <= 1
                assert entry["tokens_per_second"] > 0 and 0 < entry["mfu"] < 1
        assert model.config.mtp_loss_weight == 0  # as before

    def test_waiting_for_data_is_time_too_and_evaluation_is_not(self, make_model, tmp_path, monkeypatch):
        passed = [0.0]  # by a clock that data alone move on, and each look at it a little

        def clock():
            passed[0] += 1e-4
            return passed[0]

        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=clock))
        monkeypatch.setattr(metrics, "matmul_rate", lambda device, dtype: 1e12)

        class Slow(torch.utils.data.Dataset):
            def __init__(self, seconds):
                self.rows, self.seconds = random_rows(16), seconds

            def __len__(self):
                return len(self.rows)

            def __getitem__(self, index):
                passed[0] += self.seconds
                row = torch.tensor(self.rows[index])
                return {"input_ids": row, "labels": row}

        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to="none", eval_steps=1,
            save_strategy="no", disable_tqdm=True, logging_steps=3, eval_strategy="steps",
        )  # fmt: skip
        trainer = Trainer(
            model=make_model(**MODEL), args=args, train_dataset=Slow(0.05), eval_dataset=Slow(0.1),
            callbacks=[LoadBalancingCallback()],
        )  # fmt: skip
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
        # 64 tokens in 0.2 s of waiting, and accelerate has one batch more by then; evaluation would make it 1.8 s
        assert 64 / 0.28 < entry["tokens_per_second"] < 64 / 0.2

    def test_utilisation_is_of_the_logged_steps(self, make_model, tmp_path):
        model = make_model(**MODEL)
        rows = random_rows(16)
        trainer = train(model, tmp_path, rows, [LoadBalancingCallback(0.0)], learning_rate=0.0, max_steps=2,
                        per_device_train_batch_size=16)  # fmt: skip
        loads = counted(model, torch.tensor(rows))[:-1].double()
        expected = (loads.mean(dim=1) / loads.amax(dim=1)).mean()
        for entry in trainer.state.log_history[:2]:
            assert entry["router/utilisation"] == pytest.approx(float(expected))


TWO_RANKS = """
import os, sys, torch, torch.distributed as dist
import transformers_dsv3
from transformers_dsv3.training.load_balancing import move_correction_bias, routers, take_loads
from transformers_dsv3.training.routing_statistics import routing_statistics

dist.init_process_group("gloo")
torch.manual_seed(0)
model = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(sys.argv[1]).train()
tokens = torch.load(sys.argv[2], weights_only=True)
rank = dist.get_rank()
if sys.argv[3] == "split":
    model(tokens[rank::2], use_cache=False)
elif rank == 0:  # the other one has no data
    model(tokens, use_cache=False)
loads, valid = take_loads(model)
move_correction_bias(model, loads, 0.01)
_, spoiled = take_loads(model, valid=rank == 0)
assert valid and not spoiled
torch.save(torch.stack([r.e_score_correction_bias for r in routers(model)]), f"{sys.argv[4]}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["split", "one rank has no data"])
def test_two_ranks_move_as_one(make_model, tmp_path, how):
    model = make_model(**MODEL)
    model.save_pretrained(tmp_path / "model")
    tokens = torch.tensor(random_rows(8))
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    paths = [tmp_path / name for name in ("ranks.py", "model", "tokens.pt")]
    result = programs.run_ranks(2, [*paths, how.split()[0], tmp_path])
    assert result.returncode == 0, result.stderr[-3000:]
    move_correction_bias(model, counted(model, tokens), 0.01)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), biases(model))
