"""Expert-specialised fine-tuning beside loops written out, and what it must leave alone."""

import copy
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, Trainer, TrainingArguments

import transformers_dsv3
from tests import programs
from transformers_dsv3.compression.quantize import quantize
from transformers_dsv3.training.esft import SelectedExperts, TrainedShare
from transformers_dsv3.training.expert_scores import SELECTION_FILE, ExpertScores


ESFTCallback, ExpertSelection = transformers_dsv3.ESFTCallback, transformers_dsv3.ExpertSelection
SELECTION = ExpertSelection({1: (2, 5), 2: (0, 3, 7)}, n_experts=8, score="token", p=0.4)
THREE_LAYERS = {"num_hidden_layers": 3}


class Rows(torch.utils.data.Dataset):
    """Rows of which every second one ends in padding."""

    def __init__(self, count, length=16):
        self.rows = torch.randint(1, 96, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        mask = torch.ones_like(self.rows[index])
        mask[len(mask) - 5 * (index % 2) :] = 0
        return {
            "input_ids": self.rows[index],
            "attention_mask": mask,
            "labels": self.rows[index].masked_fill(mask == 0, -100),
        }


def arguments(folder, **fields):
    values = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **fields,
    }
    return TrainingArguments(output_dir=str(folder), **values)


def train(model, folder, selection=SELECTION, resume=None, **fields):
    trainer = Trainer(
        model=model, args=arguments(folder, **fields), train_dataset=Rows(32), callbacks=[ESFTCallback(selection)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def unselected(state, selection=SELECTION):
    """All tensors of a state dict, of the experts' stacks those of experts that are not selected."""
    kept = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[-1] in ("gate_up_proj", "down_proj") and int(parts[2]) in selection.experts:
            others = [e for e in range(len(tensor)) if e not in selection.experts[int(parts[2])]]
            tensor = tensor[others]
        kept[name] = tensor.clone()
    return kept


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def naive_scores(model, batches):
    """Gate score and token selection ratio, equation by equation, in float64 with Python's loops."""
    config, inputs = model.config, {}
    gates = [layer.mlp.gate for layer in model.model.layers[1 : config.num_hidden_layers]]
    handles = [
        gate.register_forward_pre_hook(lambda gate, args: inputs.__setitem__(gate, args[0].double())) for gate in gates
    ]
    gate_LE = torch.zeros(len(gates), config.n_routed_experts, dtype=torch.float64)
    token_LE, rows = torch.zeros_like(gate_LE), 0
    group_size = config.n_routed_experts // config.n_group
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        rows += len(batch["input_ids"])
        for place, gate in enumerate(gates):
            hidden_BSD = inputs[gate].view(*batch["input_ids"].shape, -1)
            for row, mask in enumerate(batch["attention_mask"]):
                for token in mask.nonzero().flatten().tolist():
                    scores = torch.sigmoid(gate.weight.double() @ hidden_BSD[row, token])
                    biased = (scores + gate.e_score_correction_bias.double()).tolist()
                    groups = [range(start, start + group_size) for start in range(0, len(biased), group_size)]
                    best = max(groups, key=lambda group: sum(sorted(biased[e] for e in group)[-2:]))
                    chosen = sorted(best, key=lambda e: -biased[e])[: config.num_experts_per_tok]
                    for expert in chosen:
                        gate_LE[place, expert] += scores[expert] / scores[chosen].sum() / int(mask.sum())
                        token_LE[place, expert] += 1 / len(chosen) / int(mask.sum())
    for handle in handles:
        handle.remove()
    return gate_LE / rows, token_LE / rows


def test_scores_are_the_papers(make_model):
    model = make_model(**THREE_LAYERS)
    data = Rows(6)
    batches = [
        {key: torch.stack([data[i][key] for i in pair]) for key in ("input_ids", "attention_mask")}
        for pair in ((0, 1), (2, 3, 4), (5,))
    ]
    expected_gate, expected_token = naive_scores(model, batches)
    model.train()
    scores = transformers_dsv3.score_experts(model, batches)
    assert model.training and model.model.training
    assert scores.layers == (1, 2) and scores.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    torch.testing.assert_close(scores.token, expected_token, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.gate, expected_gate, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores.gate.sum(1), torch.ones(2, dtype=torch.float64))
    # Row by row as a data set gives them, and with a row that is all padding
    alone = transformers_dsv3.score_experts(model, Rows(6))
    torch.testing.assert_close(alone.token, expected_token, rtol=1e-12, atol=1e-12)
    empty = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    torch.testing.assert_close(transformers_dsv3.score_experts(model, [*batches, empty]).token, scores.token)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.2, 0.5, 0.99, 1.0])
def test_selection_is_the_smallest_set(p):
    shares = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 2
    shares[1] = 1.0  # all alike
    shares[2, 3:] = 0.0
    shares /= shares.sum(dim=1, keepdim=True)
    scores = ExpertScores((1, 2, 5), gate=shares.flip(1), token=shares, tokens=1)
    for by, values in (("token", shares), ("gate", shares.flip(1))):
        selection = scores.select(by=by, p=p)
        assert list(selection.experts) == [1, 2, 5] and selection.n_experts == 7
        for chosen, row in zip(selection.experts.values(), values.tolist()):
            sums = {
                size: max(sum(row[e] for e in subset) for subset in itertools.combinations(range(7), size))
                for size in range(1, 8)
            }
            assert len(chosen) == min(size for size, total in sums.items() if total >= p - 1e-9)
            assert sum(row[e] for e in chosen) == pytest.approx(sums[len(chosen)])
    assert scores.select().p == 0.2 and scores.select(by="gate").p == 0.1


@pytest.mark.parametrize("implementation", ["auto", "eager", "grouped_cpu", "grouped_mm"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_gradients_are_slices_of_those_of_the_whole(make_model, implementation, checkpointing):
    model = make_model(**THREE_LAYERS).train()
    model.set_experts_implementation(implementation)
    whole = copy.deepcopy(model)
    data = Rows(4)
    batch = {key: torch.stack([data[i][key] for i in range(4)]) for key in data[0]}
    whole(**batch).loss.backward()
    transformers_dsv3.train_selected_experts(model, SELECTION)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model(**batch).loss.backward()
    seen = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        stack, _, expert = name.rpartition("_of_")
        expected = whole.get_parameter(stack).grad[int(expert)]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
        # Not a part of the gradient of all experts that would be kept with it
        assert parameter.grad.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        seen += 1
    assert seen == 10


def test_training_is_that_of_the_slices_alone(make_model, tmp_path, measured):
    """Beside a loop that keeps copies of the selected slices in its optimizer and puts them into a plain model."""
    model = make_model(**THREE_LAYERS).train()
    plain, before = copy.deepcopy(model), unselected(model.state_dict())
    trainer = train(model, tmp_path, optim="adamw_torch")

    places = [
        (plain.get_parameter(f"model.layers.{layer}.mlp.experts.{name}"), expert)
        for layer, experts in SELECTION.experts.items()
        for name in ("gate_up_proj", "down_proj")
        for expert in experts
    ]
    slices = [stack.detach()[expert].clone().requires_grad_() for stack, expert in places]
    optimizer = torch.optim.AdamW(slices, lr=1e-2, weight_decay=0.1)
    loader = iter(Trainer(model=plain, args=arguments(tmp_path), train_dataset=Rows(32)).get_train_dataloader())
    for _ in range(4):
        batches = [next(loader) for _ in range(2)]
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        plain.zero_grad()
        for batch in batches:
            plain(**batch, num_items_in_batch=targets).loss.backward()
        for piece, (stack, expert) in zip(slices, places):
            piece.grad = stack.grad[expert].clone()
        torch.nn.utils.clip_grad_norm_(slices, 0.5)
        optimizer.step()
        with torch.no_grad():
            for piece, (stack, expert) in zip(slices, places):
                stack[expert] = piece

    state = model.state_dict()
    error = max(float((state[name] - tensor).abs().max()) for name, tensor in plain.state_dict().items())
    measured["ESFT: largest difference of a weight from the loop written out, 4 steps of AdamW"] = error
    assert error < 1e-5
    assert_same(unselected(state), before)
    assert not torch.equal(
        state["model.layers.1.mlp.experts.down_proj"][2], before["model.layers.1.mlp.experts.down_proj"][2]
    )
    # Moments are of the selected experts alone
    moments = [values["exp_avg"].numel() for values in trainer.optimizer.state.values()]
    share = next(c.share for c in trainer.callback_handler.callbacks if isinstance(c, ESFTCallback))
    assert sum(moments) == share.trained == 5 * 3 * 24 * 32


def test_two_ranks_train_as_one():
    script = Path(__file__).with_name("ddp_esft_steps.py")
    run = programs.run_ranks(2, [script])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "as one process" in run.stdout


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused"])
def test_no_optimizer_reaches_the_others(make_model, tmp_path, optim, bf16):
    model = make_model(**THREE_LAYERS, mtp_loss_weight=0.3).train()
    before, all_before = unselected(model.state_dict()), copy.deepcopy(model.state_dict())
    train(model, tmp_path, optim=optim, gradient_checkpointing=True, bf16=bf16)
    state = model.state_dict()
    assert_same(unselected(state), before)
    for layer, experts in SELECTION.experts.items():
        for expert in experts:
            for name in ("gate_up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{name}"
                assert not torch.equal(state[name][expert], all_before[name][expert])


def test_resumed_run_equals_an_uninterrupted_one(make_model, tmp_path):
    whole = train(make_model(**THREE_LAYERS), tmp_path / "whole", max_steps=6).model
    train(make_model(**THREE_LAYERS), tmp_path / "parts", max_steps=3, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert ExpertSelection.load(checkpoint) == SELECTION
    # The weights of the checkpoint replace whatever the model has
    other = make_model(**THREE_LAYERS, seed=1)
    resumed = train(other, tmp_path / "parts", max_steps=6, resume=str(checkpoint)).model
    assert_same(resumed.state_dict(), whole.state_dict())
    swapped = ExpertSelection({1: (2, 6), 2: (0, 3, 7)}, 8, "token", 0.4)
    with pytest.raises(ValueError, match=f"trained other experts.*`{SELECTION_FILE}`"):
        train(make_model(**THREE_LAYERS), tmp_path / "parts", swapped, str(checkpoint), max_steps=6)


def test_checkpoints_are_official(make_model, tmp_path):
    model = make_model(**THREE_LAYERS)
    model.save_pretrained(tmp_path / "before")
    trainer = train(model, tmp_path / "run", save_strategy="steps", save_steps=4)
    trainer.save_model(str(tmp_path / "after"))
    before = load_file(tmp_path / "before" / "model.safetensors")
    for folder in (tmp_path / "after", tmp_path / "run" / "checkpoint-4"):
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
            for layer, experts in SELECTION.experts.items()
            for expert in experts
            for part in ("gate", "up", "down")
        }
        native = DeepseekV3ForCausalLM.from_pretrained(folder)
        ids = torch.randint(0, 96, (2, 9))
        opened = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(opened(ids).logits, native(ids).logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(opened(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_sft_trainer(make_model, byte_tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = make_model(**THREE_LAYERS, vocab_size=len(byte_tokenizer))
    before, all_before = unselected(model.state_dict()), copy.deepcopy(model.state_dict())
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.1, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    texts = Dataset.from_dict({"text": ["def double(x): return 2 * x", "import os\n"] * 12})
    callbacks = [ESFTCallback(SELECTION)]
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=texts, processing_class=byte_tokenizer, callbacks=callbacks
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_same(unselected(model.state_dict()), before)
    assert any(not torch.equal(all_before[name], tensor) for name, tensor in model.state_dict().items())


def test_share_says_what_trains(make_model):
    model = make_model(**THREE_LAYERS)
    total = model.num_parameters()
    layer = sum(parameter.numel() for parameter in model.model.layers[2].parameters())
    share = transformers_dsv3.train_selected_experts(model, SELECTION)
    assert isinstance(share, TrainedShare) and share.total == total
    assert share.layers[2].trained == 3 * 3 * 24 * 32 and share.layers[2].total == layer
    assert share.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"layer 2: 3 of 8 experts, 6,912 of {layer:,} parameters" in str(share)
    assert str(share).endswith(f"in all: {share.trained:,} of {total:,} ({share.trained / total:.1%})")


def test_another_selection_replaces_the_first(make_model):
    model = make_model(**THREE_LAYERS)
    names, total = set(model.state_dict()), model.num_parameters()
    transformers_dsv3.train_selected_experts(model, SELECTION)
    other = ExpertSelection({1: (0,), 2: (1,)}, 8, "gate", 0.1)
    share = transformers_dsv3.train_selected_experts(model, other)
    assert share.total == total and share.trained == 2 * 3 * 24 * 32
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == share.trained
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    "move",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model.to(torch.float64)],
    ids=["deepcopy", "pickle", "to"],
)
def test_parameters_stay_views_of_the_stacks(make_model, move):
    model = make_model(**THREE_LAYERS)
    transformers_dsv3.train_selected_experts(model, SELECTION)
    model = move(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj_of_5").fill_(7.0)
    stack = model.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert (stack[5] == 7).all() and not (stack[4] == 7).any()
    model.load_state_dict(make_model(**THREE_LAYERS, seed=1).to(model.dtype).state_dict())
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, SelectedExperts) and experts.is_tied()
    assert torch.equal(model.get_parameter("model.layers.1.mlp.experts.down_proj_of_5"), experts.down_proj[5])


def test_selection_round_trip(tmp_path):
    path = SELECTION.save(tmp_path)
    assert path == tmp_path / SELECTION_FILE
    assert ExpertSelection.load(tmp_path) == ExpertSelection.load(path) == SELECTION
    values = json.loads(path.read_text())
    assert values["experts"] == {"1": [2, 5], "2": [0, 3, 7]}
    with pytest.raises(FileNotFoundError):
        ExpertSelection.load(tmp_path / "nowhere")
    for broken, message in (
        ("{", "is no selection of experts"),
        ("[]", "is no selection of experts"),
        (json.dumps({**values, "experts": {"1": []}}), "one or more"),
        (json.dumps({**values, "experts": {"1": [8]}}), "from 0 to 7"),
        (json.dumps({**values, "experts": {"1": [3, 3]}}), "all different"),
        (json.dumps({**values, "shared_experts": True}), "only routed ones"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            ExpertSelection.load(path)


def test_bad_input(make_model, native_twin, tmp_path):
    model = make_model(**THREE_LAYERS)
    ids = {"input_ids": torch.arange(8)}
    scores = transformers_dsv3.score_experts(model, [ids])
    for p in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            scores.select(p=p)
    with pytest.raises(ValueError, match="must be one of 'gate', 'token'"):
        scores.select(by="loss")
    for nothing in ([], [{"input_ids": torch.zeros(0, dtype=torch.long)}], [{**ids, "attention_mask": [0] * 8}]):
        with pytest.raises(ValueError, match="no token to score"):
            transformers_dsv3.score_experts(model, nothing)
    with pytest.raises(ValueError, match=r"`attention_mask` \(1, 7\)"):
        transformers_dsv3.score_experts(model, [{**ids, "attention_mask": [1] * 7}])
    assert not any(layer.mlp.gate._forward_hooks for layer in model.model.layers[1:3])

    train_selected = transformers_dsv3.train_selected_experts
    with pytest.raises(ValueError, match="of 16 experts a layer, the model has 8"):
        train_selected(model, ExpertSelection({1: (9,), 2: (1,)}, 16, "token", 0.2))
    for layers in ({1: (0,)}, {1: (0,), 2: (0,), 3: (0,)}, {0: (0,), 1: (0,)}):
        with pytest.raises(ValueError, match=r"mixture-of-experts layers are \[1, 2\]"):
            train_selected(model, ExpertSelection(layers, 8, "token", 0.2))
    for other in (make_model(first_k_dense_replace=3, **THREE_LAYERS), native_twin(model), torch.nn.Linear(2, 2)):
        for call in (lambda m: transformers_dsv3.score_experts(m, [ids]), lambda m: train_selected(m, SELECTION)):
            with pytest.raises(ValueError, match="mixture-of-experts layers, and this .* has none"):
                call(other)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".mtp." not in name)

    adapted = get_peft_model(make_model(**THREE_LAYERS), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        train_selected(adapted, SELECTION)
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        train(adapted, tmp_path)
    quantised = quantize(make_model(**THREE_LAYERS, moe_intermediate_size=32))
    with pytest.raises(ValueError, match="not plain floating-point"):
        train_selected(quantised, SELECTION)


def test_callback_refuses_what_it_cannot_train(make_model, tmp_path):
    args = arguments(tmp_path)
    late = Trainer(model=make_model(**THREE_LAYERS), args=args, train_dataset=Rows(8))
    late.create_optimizer()
    late.add_callback(ESFTCallback(SELECTION))
    with pytest.raises(ValueError, match="made without the selected experts"):
        late.train()
    made = Trainer(
        model_init=lambda: make_model(**THREE_LAYERS),
        args=args,
        train_dataset=Rows(8),
        callbacks=[ESFTCallback(SELECTION)],
    )
    with pytest.raises(ValueError, match="let it call `train_selected_experts`"):
        made.train()
