"""Muon beside the polynomial on singular values, torch's own optimizers, and one expert at a time; under `Trainer`."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests import programs
from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback, muon
from transformers_dsv3.training.muon import COEFFICIENTS, Muon, muon_groups, orthogonalised


def by_singular_values(matrices, steps=5):
    """What the iterations give, in float64: they change singular values alone, each by the same polynomial."""
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / matrices.double().norm(dim=(-2, -1)).clamp(min=1e-7)[..., None]
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ v


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_newton_schulz(batch, rows, columns, steps, scale):
    torch.manual_seed(rows + 20 * columns)
    matrices = scale * torch.randn(*batch, rows, columns)
    expected = by_singular_values(matrices, steps)
    exact = orthogonalised(matrices, steps, torch.float32)
    torch.testing.assert_close(exact, expected.float(), rtol=1e-3, atol=1e-3)
    rough = orthogonalised(matrices, steps)
    assert rough.dtype == torch.bfloat16 and rough.shape == matrices.shape
    assert (rough - expected).norm() <= 0.12 * expected.norm()


def test_singular_values_become_nearly_one_and_zeros_stay():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(4, 24, 64), dtype=torch.float32))
    assert 0.6 < values.min() and values.max() < 1.25
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4, dtype=torch.bfloat16))


def steps_of(optimizer, parameters, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_as_torchs_on_matrices(shape):
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    steps_of(Muon([{"params": [mine], "matrices": True}], lr=0.02), [mine])
    steps_of(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), [theirs])
    moved = (theirs - 1).norm()
    assert moved > 0.01 and (mine - theirs).norm() < 0.02 * moved


def test_as_torchs_adamw_on_the_rest():
    mine, theirs = ([nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(7))] for _ in range(2))
    optimizer = Muon([{"params": mine[:1]}, {"params": mine[1:], "weight_decay": 0.0}], lr=0.02)
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    steps_of(optimizer, mine)
    steps_of(torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), fused=True), theirs)
    for one, other in zip(mine, theirs):
        assert torch.equal(one, other)


def test_every_expert_by_itself_gate_and_up_apart():
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(3, 12, 10))
    each = [nn.Parameter(experts.detach()[e, rows]) for e in range(3) for rows in (slice(6), slice(6, 12))]
    exact = {"lr": 0.1, "newton_schulz_dtype": torch.float32}
    together = Muon([{"params": [experts], "matrices": True, "stacked": 2}], **exact)
    apart = Muon([{"params": each, "matrices": True}], **exact)
    for _ in range(3):
        experts.grad = torch.randn(3, 12, 10)
        for index, parameter in enumerate(each):
            parameter.grad = experts.grad[index // 2].unflatten(0, (2, 6))[index % 2].contiguous()
        together.step(), apart.step()
    torch.testing.assert_close(experts, torch.stack(each).view(3, 12, 10), rtol=1e-5, atol=1e-6)


def test_updates_are_as_large_as_adamws_in_the_mean():
    """0.2 of the learning rate, whatever the shape and the gradient's size."""
    for shape, size in (((3, 12, 10), 1e-3), ((64, 8), 1.0), ((8, 64), 1e3)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = size * torch.randn(shape)
        Muon([{"params": [weight], "matrices": True}], lr=0.5).step()
        assert 0.15 < weight.square().mean().sqrt() / 0.5 < 0.25


def test_which_parameters_are_matrices(make_model):
    model = make_model(mtp_loss_weight=0.3, attention_bias=True).train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        (group["matrices"], group["stacked"]): group for group in muon_groups(model, 0.3) if group["weight_decay"]
    }
    assert {names[id(p)] for p in groups[False, 1]["params"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {names[id(p)].rpartition(".")[2] for p in groups[True, 2]["params"]} == {"gate_up_proj"}
    matrices = {names[id(p)] for p in groups[True, 1]["params"]}
    assert {"model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight"} <= matrices
    assert {"model.layers.0.self_attn.kv_b_proj.weight", "model.mtp.0.eh_proj.weight"} <= matrices
    (rest,) = [group for group in muon_groups(model, 0.3) if not group["weight_decay"]]
    assert all(parameter.dim() == 1 for parameter in rest["params"]) and not rest["matrices"]
    without = [group for group in muon_groups(model, experts=False) if group["matrices"]]
    assert {p.dim() for group in without for p in group["params"]} == {2}
    every = [id(p) for group in muon_groups(model) for p in group["params"]]
    assert len(every) == len(set(every)) == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no parameter that is trainable"):
        muon_groups(make_model().requires_grad_(False))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0"),
        ({"lr": 0.1, "betas": (0.9, 1.5)}, r"betas\[1\]=1.5"),
        ({"lr": 0.1, "newton_schulz_steps": 0}, "newton_schulz_steps=0"),
    ],
)
def test_numbers_out_of_range(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        muon(**arguments)


def test_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"stacks of 2, not a parameter of shape \(5, 4\)"):
        Muon([{"params": [nn.Parameter(torch.ones(5, 4))], "matrices": True, "stacked": 2}], lr=0.1)


class Rows(Dataset):
    def __init__(self, vocab_size):
        self.tokens = torch.randint(0, vocab_size, (32, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.fixture
def train(tmp_path):
    def train(model, steps=4, resume=None, callbacks=(), optimizer=None, **options):
        args = TrainingArguments(
            output_dir=tmp_path / "run",
            max_steps=steps,
            per_device_train_batch_size=4,
            lr_scheduler_type="linear",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            use_cpu=True,
            **{"save_strategy": "no", **options},
        )
        data = Rows(model.config.vocab_size)
        callbacks = [LoadBalancingCallback(), MtpObjectiveCallback(), *callbacks]
        optimizer = muon(lr=0.02) if optimizer is None else optimizer
        trainer = Trainer(
            model=model, args=args, train_dataset=data, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def test_under_trainer_and_resumed(make_model, train, tmp_path):
    model = make_model(initializer_range=0.05)
    other = copy.deepcopy(model)
    trainer = train(model, save_strategy="steps", save_steps=2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}  # the schedule ends there, for all groups
    train(other, resume=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(one, two), name


@pytest.mark.slow
def test_the_study(tmp_path):
    study = [Path(__file__).parents[2] / "examples" / "optimizer_study.py", "--steps", 4, "--batch", 1, "--seeds", 1]
    files = ["--rates", 3e-3, "--results", tmp_path / "study.json"]
    done = programs.run([*study, *files, "--optimizers", "adamw", "muon"])
    assert done.returncode == 0, done.stderr[-4000:]
    entries = json.loads((tmp_path / "study.json").read_text())
    rates = {(entry["setting"]["optimizer"], entry["setting"]["rate"]) for entry in entries}
    assert {("adamw", 1.5e-3), ("adamw", 6e-3), ("muon", 3e-3)} <= rates
    assert "AdamW: rate" in done.stdout and "Muon: rate" in done.stdout
    done = programs.run([*study, *files, "--plot", tmp_path / "study.png"])
    assert done.returncode == 0 and (tmp_path / "study.png").exists()
