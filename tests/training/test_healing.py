"""Healing of pruned models: the loss beside its definition, what rides in it, resuming, the control, and bad input."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

from transformers_dsv3 import MtpObjectiveCallback
from transformers_dsv3.compression.expert_pruning import prune_experts
from transformers_dsv3.data.byte_bpe import TokenBlocks
from transformers_dsv3.option_error import OptionError
from transformers_dsv3.training.healing import DistillationTrainer, heal, healing_arguments, summed_divergence


BLOCKS = TokenBlocks(torch.randint(0, 96, (640,), generator=torch.Generator().manual_seed(0)), 16)


@pytest.fixture(scope="module")
def teacher(make_model):
    return make_model()


@pytest.fixture
def pruned(teacher):
    model = copy.deepcopy(teacher)
    prune_experts(model, 0.25, by="random")
    return model


def arguments(folder, steps=2, **options):
    return healing_arguments(folder, steps, use_cpu=True, disable_tqdm=True, full_determinism=True, **options)


def test_divergence_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 11, generator=generator) for _ in range(2))
    targets, temperature = torch.tensor([3, -100, 0, 7, -100]), 2.5
    expected = 0.0
    for place in (0, 2, 3):
        p, q = ((x[place].double() / temperature).softmax(0) for x in (teacher, student))
        expected += temperature**2 * (p * (p / q).log()).sum().item()
    student.requires_grad_()
    total = summed_divergence(student, teacher, targets, temperature)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    assert student.grad[[1, 4]].abs().max() == 0 and student.grad[[0, 2, 3]].abs().min() > 0
    assert summed_divergence(teacher, teacher, targets, temperature).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num_items", [None, 50])
def test_the_loss_is_the_models_own_and_the_divergence(teacher, pruned, tmp_path, num_items):
    trainer = DistillationTrainer(
        model=pruned,
        args=arguments(tmp_path),
        train_dataset=BLOCKS,
        teacher=teacher,
        weight=0.5,
        temperature=2.0,
        callbacks=[MtpObjectiveCallback(weight=0.3)],
    )
    tokens = BLOCKS.blocks[:2]
    labels = tokens.clone()
    labels[0, :5] = -100
    inputs = {"input_ids": tokens, "labels": labels}
    with torch.no_grad():
        own, whole = copy.deepcopy(pruned).eval()(**inputs).loss, teacher(tokens).logits
        logits = pruned.eval()(tokens).logits
        predicted = labels[:, 1:].flatten() != -100
        student, true = (x[:, :-1].flatten(0, 1)[predicted] / 2 for x in (logits, whole))
        divergence = 4 * F.kl_div(student.log_softmax(-1), true.softmax(-1), reduction="sum")
    items = int(predicted.sum()) if num_items is None else num_items
    expected = own * predicted.sum() / items + 0.5 * divergence / items

    mtp = pruned.model.mtp_layers[0].eh_proj.weight
    pruned.train()
    loss = trainer.compute_loss(pruned, dict(inputs), num_items_in_batch=num_items and torch.tensor(num_items))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    # The MTP layers' objective rides in the model's own loss, whose weight is 1
    carried, mtp.grad = mtp.grad.clone(), None
    pruned(**inputs, num_items_in_batch=num_items and torch.tensor(num_items)).loss.backward()
    assert carried.abs().max() > 0
    torch.testing.assert_close(carried, mtp.grad)
    # Evaluation is of the text alone
    assert trainer.compute_loss(pruned.eval(), dict(inputs)).item() == pytest.approx(own.item(), rel=1e-5)


def test_healing_brings_the_student_nearer(teacher, pruned, tmp_path):
    before = copy.deepcopy(pruned)
    options = {"per_device_train_batch_size": len(BLOCKS), "learning_rate": 2e-3, "save_strategy": "no"}
    args = arguments(tmp_path, 8, logging_steps=4, **options)
    trainer = heal(pruned, BLOCKS, args, teacher, weight=100.0)
    logged = [entry for entry in trainer.state.log_history if "distillation/loss" in entry]
    with torch.no_grad():
        of_teacher, healed, not_healed = (model(BLOCKS.blocks).logits for model in (teacher, pruned, before))
    divergences = [
        summed_divergence(logits.flatten(0, 1), of_teacher.flatten(0, 1), BLOCKS.blocks.flatten(), 1.0)
        for logits in (healed, not_healed)
    ]
    assert len(logged) == 2 and divergences[0] < 0.9 * divergences[1], divergences
    assert {"mtp/loss", "router/utilisation"} <= logged[0].keys()
    assert not pruned.training and pruned.config.seq_aux_loss_weight == 0 and pruned.config.mtp_loss_weight == 0
    moved = [
        not torch.equal(now, was)
        for (name, now), was in zip(pruned.state_dict().items(), before.state_dict().values())
        if "correction_bias" in name or "experts" in name
    ]
    assert all(moved)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_a_run_that_was_stopped_ends_at_the_same_weights(teacher, pruned, tmp_path):
    twins = [copy.deepcopy(pruned) for _ in range(2)]
    args = arguments(tmp_path, 4, save_steps=2, save_total_limit=2)
    heal(pruned, BLOCKS, args, teacher)
    for twin in twins:  # behind the last step, and behind the second
        trainer = heal(twin, BLOCKS, args, teacher)
        assert trainer.state.global_step == 4 and not twin.training
        for (name, one), other in zip(pruned.state_dict().items(), twin.state_dict().values()):
            assert torch.equal(one, other), name
        shutil.rmtree(tmp_path / "checkpoint-4")


def test_the_control_is_trained_alone(teacher, tmp_path):
    control = copy.deepcopy(teacher)
    trainer = heal(control, BLOCKS, arguments(tmp_path, save_strategy="no"))
    assert type(trainer) is not DistillationTrainer
    assert "distillation/loss" not in trainer.state.log_history[0] and trainer.state.global_step == 2
    assert not torch.equal(control.lm_head.weight, teacher.lm_head.weight)


def test_bad_input_is_named(teacher, pruned, make_model, tmp_path):
    with pytest.raises(OptionError, match="1 or more") as refused:
        healing_arguments(tmp_path, 0)
    assert refused.value.option == "--heal"
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 64"):
        heal(pruned, BLOCKS, args, make_model(vocab_size=64))
    with pytest.raises(ValueError, match="is the model that is trained"):
        heal(pruned, BLOCKS, args, pruned)
    for options in ({"weight": 0.0}, {"temperature": float("inf")}):
        with pytest.raises(ValueError, match="must be above 0"):
            heal(pruned, BLOCKS, args, teacher, **options)
