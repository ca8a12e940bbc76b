"""The losses beside next-token prediction: their gradients beside plain autograd's, under every trainer."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import transformers_dsv3
from transformers_dsv3.models.dsv3 import moe_dsv3, objectives_dsv3
from transformers_dsv3.models.dsv3.mtp_dsv3 import mtp_labels, second_token_acceptance, shift_left
from transformers_dsv3.models.dsv3.training_pass_dsv3 import TrainingPass
from transformers_dsv3.training.load_balancing import take_loads


MTP, ALPHA = 0.3, 0.05


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(seen, expected, rtol=1e-4):
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (seen[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < rtol, f"{name}: {error}"


def balance_loss(scores_TE, sequences, counted, top_k):
    """Equations 17 to 20 as they are written, one sequence at a time; a list of losses without α."""
    losses = []
    for number in range(int(max(sequences)) + 1):
        scores = scores_TE[(sequences == number) & counted]
        tokens, experts = scores.shape
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(top_k, dim=1)[1], 1.0)
        f = chosen.sum(dim=0) * experts / (top_k * tokens)
        p = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
        losses.append((f * p).sum())
    return losses


def written_out_loss(model, tokens, labels, mask, positions, num_items):
    """The whole objective as a loss value, from the model's parts in evaluation mode."""
    model = model.eval()
    depths = len(model.model.mtp_layers)
    scores = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, output: scores.append(output[0].sigmoid()))
        for module in model.modules()
        if isinstance(module, moe_dsv3.Dsv3TopkRouter)
    ]
    hidden = model.model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    targets = shift_left(labels, 1, -100)
    total = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="sum") / num_items
    embeds = model.model.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1])[None] if positions is None else positions
    counted = [torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()]
    counted = counted * (model.config.num_hidden_layers - model.config.first_k_dense_replace)
    for depth, layer in enumerate(model.model.mtp_layers):
        inputs = model.model.attention_inputs(embeds, mask, places, None)
        hidden = layer(hidden, shift_left(embeds, depth + 1, 0.0), **inputs)
        goals = mtp_labels(labels, depth, positions, mask)
        nll = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), goals.flatten(), reduction="sum")
        total = total + MTP / depths * nll / num_items
        same = shift_left(places, depth + 1, -1) == places + depth + 1
        counted.append(same & counted[0] & shift_left(counted[0], depth + 1, False))
    starts = torch.zeros_like(tokens)
    starts[:, 0] = 1
    if positions is not None:
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    sequences = starts.flatten().cumsum(0) - 1
    for scores_TE, counts in zip(scores, counted, strict=True):
        losses = balance_loss(scores_TE, sequences, counts.flatten(), model.config.num_experts_per_tok)
        for number, loss in enumerate(losses):
            predicted = targets.flatten()[sequences == number].ne(-100).sum()
            total = total + ALPHA * loss * predicted / num_items
    for hook in hooks:
        hook.remove()
    return total


def batch(kind):
    tokens = torch.randint(0, 96, (2, 14), generator=torch.Generator().manual_seed(1))
    labels, mask, positions = tokens.clone(), None, None
    if kind == "padded":
        mask = torch.ones_like(tokens)
        mask[0, 9:] = 0
        mask[1, :3] = 0
        labels = labels.masked_fill(mask == 0, -100)
    elif kind == "packed":
        positions = torch.stack([torch.tensor([*range(5), *range(9)]), torch.tensor([*range(11), *range(3)])])
        labels = labels.masked_fill(positions == 0, -100)
    elif kind == "masked prompt":
        labels[0, :6] = -100
        labels[1, 3:5] = -100
    return tokens, labels, mask, positions


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "masked prompt"])
def test_gradients_equal_the_written_out_objective(make_model, kind, checkpointing):
    tokens, labels, mask, positions = batch(kind)
    model = make_model(num_nextn_predict_layers=2, mtp_loss_weight=MTP, seq_aux_loss_weight=ALPHA)
    num_items = int(shift_left(labels, 1, -100).ne(-100).sum())
    written_out_loss(model, tokens, labels, mask, positions, num_items).backward()
    expected = gradients(model)

    model.zero_grad()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    output = model(tokens, labels=labels, attention_mask=mask, position_ids=positions, use_cache=False)
    plain = model.eval()(tokens, labels=labels, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-6)
    model.train()
    (3 * output.loss).backward()  # what follows the loss scales all alike
    assert_same_gradients({name: value / 3 for name, value in gradients(model).items()}, expected)


def test_compiled(make_model):
    tokens, labels, _, _ = batch("masked prompt")
    seen = []
    for compiled in (False, True):
        model = make_model(mtp_loss_weight=MTP, experts_implementation="grouped_mm").train()
        run = torch.compile(model, backend="eager") if compiled else model
        run(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        seen.append((gradients(model), take_loads(model)[0]))
    assert_same_gradients(seen[1][0], seen[0][0])
    assert torch.equal(seen[1][1], seen[0][1])
    model = make_model(seq_aux_loss_weight=ALPHA).train()
    with pytest.raises(Exception, match="Under torch.compile"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens, labels=labels, use_cache=False)


def test_logits_part_by_part_give_the_same_gradients(make_model, monkeypatch):
    tokens, labels, mask, _ = batch("padded")
    seen, logits = [], []
    for limit in (2**29, 4 * 96 * 5):  # five positions at a time
        monkeypatch.setattr(objectives_dsv3, "LOGITS_BYTES", limit)
        model = make_model(mtp_loss_weight=MTP).train()
        output = model(tokens, labels=labels, attention_mask=mask)
        output.loss.backward()
        seen.append((output.loss.detach(), output.mtp_loss, gradients(model)))
        logits.append(output.logits)
    # Nobody read them before: those of the second are made here, with their graph
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    assert logits[1].requires_grad and output["logits"] is output.logits and output[1] is output.logits
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(seen[1][1], seen[0][1], rtol=1e-6, atol=0)
    assert_same_gradients(seen[1][2], seen[0][2], rtol=1e-5)


@pytest.mark.parametrize("weights", [(MTP, 0.0), (0.0, ALPHA), (MTP, ALPHA)])
def test_nothing_is_kept_when_a_step_is_over(make_model, weights):
    """The pass and its graph hold each other where one is not careful, beyond what Python's collector sees."""
    model = make_model(mtp_loss_weight=weights[0], seq_aux_loss_weight=weights[1]).train()
    tokens, labels, _, _ = batch("plain")
    for backward in (True, False):
        loss = model(tokens, labels=labels, use_cache=False).loss
        if backward:
            loss.backward()
        del loss
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, TrainingPass)]


@pytest.mark.parametrize("rows", [1, 3, 16, 20])
def test_acceptance_is_sampled_all_over_the_rows(rows):
    """Targets in the second half of each row, where half of the drafts are right."""
    hidden = torch.eye(7)[torch.randint(0, 7, (rows, 200), generator=torch.Generator().manual_seed(0))]
    right = (torch.arange(200) % 2 == 0).expand(rows, -1)
    drafts = torch.where(right[..., None], shift_left(hidden, 1, 0.0), 1 - shift_left(hidden, 1, 0.0))
    targets = torch.full((rows, 200), -100)
    targets[:, 100:198] = 1
    compared, accepted = second_token_acceptance(hidden, drafts, targets, torch.nn.Identity())
    assert compared == (rows if rows > 8 else 16 // rows * rows)
    assert 0.2 <= accepted / compared <= 0.8


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(gradients(model))


def rows(count=8):
    """Of several lengths, with a part of the prompt left out of the loss."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        tokens = torch.randint(4, 96, (6 + 5 * number % 17,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * (number % 3) + tokens[number % 3 :]})
    return rows


def pad(features):
    width = max(len(row["input_ids"]) for row in features)
    return {
        name: torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in features])
        for name, fill in (("input_ids", 3), ("labels", -100), ("attention_mask", 0))
    }


def train(trainer_class, config_class, model, folder, data, **arguments):
    callback = KeepGradients()
    args = config_class(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **arguments,
    )
    trainer = trainer_class(model=model, args=args, callbacks=[callback], **data)
    trainer.train()
    return callback.seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_same_gradients_under_trainer_and_sft_trainer(make_model, byte_tokenizer, tmp_path):
    """Micro-batches with unlike numbers of targets, and accumulation: only what a token weighs is the same."""
    data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows()])
    results = []
    for trainer_class, config_class, more in (
        (Trainer, TrainingArguments, {"remove_unused_columns": False}),
        (SFTTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}),
    ):
        model = make_model(vocab_size=len(byte_tokenizer), mtp_loss_weight=MTP, seq_aux_loss_weight=ALPHA)
        bundle = {"train_dataset": data, "data_collator": pad, "processing_class": byte_tokenizer}
        results.append(train(trainer_class, config_class, model, tmp_path, bundle, **more))
    (by_trainer, losses), (by_sft, sft_losses) = results
    assert len(by_trainer) == len(by_sft) == 2
    for seen, expected in zip(by_sft, by_trainer):
        assert any(".mtp." in name for name in expected)
        assert_same_gradients(seen, expected, rtol=2e-4)
    torch.testing.assert_close(torch.tensor(sft_losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    # And they do act: without them, other gradients
    model = make_model(vocab_size=len(byte_tokenizer))
    bundle = {"train_dataset": data, "data_collator": pad, "processing_class": byte_tokenizer}
    plain, _ = train(Trainer, TrainingArguments, model, tmp_path, bundle, remove_unused_columns=False)
    name = "model.layers.1.mlp.gate.weight"
    assert (plain[0][name] - by_sft[0][name]).norm() > 1e-3 * plain[0][name].norm()


@pytest.mark.parametrize("trainer_class, config_class", [(Trainer, TrainingArguments), (SFTTrainer, SFTConfig)])
def test_bf16_autocast_over_fp32_weights(make_model, byte_tokenizer, tmp_path, trainer_class, config_class):
    """`--bf16`: products in bf16, master weights and optimizer state in fp32."""
    data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows()])
    results = []
    for bf16 in (False, True):
        model = make_model(vocab_size=len(byte_tokenizer), mtp_loss_weight=MTP, seq_aux_loss_weight=ALPHA)
        more = {"dataset_kwargs": {"skip_prepare_dataset": True}} if config_class is SFTConfig else {}
        args = config_class(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_grad_norm=0, save_strategy="no",
            report_to="none", use_cpu=True, bf16=bf16, disable_tqdm=True, remove_unused_columns=False, **more,
        )  # fmt: skip
        callback = KeepGradients()
        bundle = {"train_dataset": data, "data_collator": pad, "processing_class": byte_tokenizer}
        trainer_class(model=model, args=args, callbacks=[callback], **bundle).train()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        results.append(callback.seen[0])
    # Only the MTP loss reaches these: a wrong weight of its would be a wrong size
    for name in ("model.mtp.0.eh_proj.weight", "model.mtp.0.mlp.experts.down_proj"):
        seen, expected = results[1][name], results[0][name]
        assert (seen - expected).norm() < 0.1 * expected.norm(), name


def test_preference_training_is_left_alone(make_model, byte_tokenizer, tmp_path):
    pairs = [
        {"prompt": f"def f{n}():", "chosen": f" return {n}", "rejected": " pass  # nothing", "n": n} for n in range(8)
    ]
    data = Dataset.from_list(pairs).remove_columns("n")
    results = []
    for weights in ({"mtp_loss_weight": MTP, "seq_aux_loss_weight": ALPHA}, {}):
        make_model(vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / "model")  # read again as the reference
        model = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(tmp_path / "model", **weights)
        bias = [b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")]
        mtp = copy.deepcopy(model.model.mtp_layers[0].state_dict())
        bundle = {"train_dataset": data, "processing_class": byte_tokenizer}
        results.append(train(DPOTrainer, DPOConfig, model, tmp_path, bundle))
        assert model.model.training_state.mtp_totals is None, "the MTP layers ran"
        for before, (_, after) in zip(
            bias, [(n, b) for n, b in model.named_buffers() if n.endswith("correction_bias")], strict=True
        ):
            assert torch.equal(before, after)
        for name, tensor in model.model.mtp_layers[0].state_dict().items():
            assert torch.equal(tensor, mtp[name]), name
    for seen, expected in zip(results[0][0], results[1][0], strict=True):
        assert_same_gradients(seen, expected, rtol=1e-6)


def test_a_loss_of_another_kind_carries_nothing(make_model):
    """A trainer that computes something else from the last hidden state."""
    tokens, labels, _, _ = batch("plain")
    seen, left_out = [], []
    for weight in (MTP, 0.0):
        model = make_model(mtp_loss_weight=weight, seq_aux_loss_weight=weight).train()

        def forward(input_ids, labels, training_pass=None, model=model):
            hidden = model.model(input_ids, training_pass=training_pass).last_hidden_state
            logprobs = model.lm_head(hidden).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(-1)
            return -F.logsigmoid(logprobs[0] - logprobs[1])

        model.forward = forward
        model(input_ids=tokens, labels=labels).backward()
        seen.append(gradients(model))
        left_out.append(int(model.model.training_state.losses_left_out or 0) + (weight == 0))
    mtp = {name: value for name, value in seen[0].items() if ".mtp." in name}
    assert mtp and not any(value.any() for value in mtp.values())
    assert left_out == [1, 1]
    assert_same_gradients({k: v for k, v in seen[0].items() if k not in mtp}, seen[1], rtol=1e-6)
