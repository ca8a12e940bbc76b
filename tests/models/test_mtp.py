"""MTP layers against Transformers' own, and the MTP loss against a loop over single positions."""

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_layers import MtpModel

import transformers_dsv3
from transformers_dsv3.models.dsv3.checkpoint_conversion_dsv3 import MTP_NORMS
from transformers_dsv3.models.dsv3.mtp_dsv3 import mtp_labels, shift_left


def native_mtp(model, native):
    """Transformers' `MtpModel` on the weights of the plugin's MTP layers."""
    depths = len(model.model.mtp_layers)
    mtp = MtpModel(native, depths).eval()
    renamed = {}
    for depth, layer in enumerate(model.model.mtp_layers):
        for name, tensor in layer.state_dict().items():
            if name == "shared_head.norm.weight":
                name = "post_norm.weight"
            elif (norm := name.split(".")[0]) in MTP_NORMS:
                name = f"{MTP_NORMS[norm]}.weight"
            elif norm != "eh_proj":
                name = f"mtp_block.{name}"
            renamed[f"layers.{depth}.{name}"] = tensor
    result = mtp.load_state_dict(renamed, strict=False)
    assert not result.unexpected_keys
    assert all(not key.startswith("layers.") for key in result.missing_keys)
    return mtp


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_drafts_equal_native_mtp(make_model, native_twin, depths):
    model = make_model(num_nextn_predict_layers=depths)
    native = native_twin(model)
    mtp = native_mtp(model, native)
    tokens = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.model(tokens[:, :-1]).last_hidden_state
        positions = torch.arange(1, 20)[None]
        _, expected, _ = mtp(tokens[:, 1:], hidden, torch.ones_like(positions), positions, None)
        inputs = model.model.attention_inputs(hidden, None, positions - 1, None)
        embeds, drafts = model.model.embed_tokens(tokens[:, 1:]), []
        for layer in model.model.mtp_layers:
            hidden = layer(hidden, embeds, **inputs)
            drafts.append(model.lm_head(hidden[:, -1:]))
            embeds = torch.cat([embeds[:, 1:], model.model.embed_tokens(drafts[-1].argmax(-1))], dim=1)
    torch.testing.assert_close(torch.cat(drafts, dim=1), expected, rtol=1e-4, atol=1e-4)


def loss_by_single_positions(model, tokens, labels):
    """MTP loss of one unpadded row, each position computed alone from its own prefix."""
    losses = [[] for _ in model.model.mtp_layers]
    for position in range(tokens.shape[0]):
        hidden = model.model(tokens[None, : position + 1]).last_hidden_state
        for depth, layer in enumerate(model.model.mtp_layers):
            target = position + depth + 2
            if target >= tokens.shape[0]:
                break
            fed = model.model.embed_tokens(tokens[depth + 1 : position + depth + 2])[None]
            places = torch.arange(position + 1)[None]
            hidden = layer(hidden, fed, **model.model.attention_inputs(hidden, None, places, None))
            if labels[target] != -100:
                logits = model.lm_head(hidden[0, -1])
                losses[depth].append(F.cross_entropy(logits, labels[target]))
    return torch.stack([torch.stack(by_depth).mean() for by_depth in losses]).mean()


def test_loss_equals_single_positions(make_model):
    model = make_model(num_nextn_predict_layers=2, mtp_loss_weight=0.3)
    tokens = torch.randint(0, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[0, 4] = -100
    expected = loss_by_single_positions(model, tokens[0], labels[0])
    output = model.train()(tokens, labels=labels)
    torch.testing.assert_close(output.mtp_loss, expected, rtol=1e-5, atol=1e-5)
    plain = model.eval()(tokens, labels=labels)
    assert plain.mtp_loss is None
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-5)  # apart, see tests/training


@pytest.mark.parametrize("depths", [1, 2])
def test_packed_and_padded_loss_equal_separate_rows(make_model, depths):
    model = make_model(num_nextn_predict_layers=depths, mtp_loss_weight=1.0).train()
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(0, 96, (1, n), generator=generator) for n in (7, 11))

    def totals(*inputs, **kwargs):
        """Sum of the MTP losses and number of their targets."""
        model.model.training_state.mtp_totals = None
        model(*inputs, **kwargs)
        return model.model.training_state.mtp_totals[:2]

    separate = sum(totals(row, labels=row) for row in (first, second))
    assert separate[1] == (5 + 9 if depths == 1 else 5 + 9 + 4 + 8)

    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(11)])[None]
    labels = packed.clone()
    labels[:, 7] = -100  # as data collators mark it: nothing predicts the first token of a sequence
    for given in (labels, packed):  # MTP layers predict nothing across sequences either way
        torch.testing.assert_close(
            totals(packed, labels=given, position_ids=positions), separate, rtol=1e-5, atol=1e-5
        )

    for side in ("left", "right"):
        padding = torch.zeros(1, 4, dtype=torch.long)
        parts = [padding, first] if side == "left" else [first, padding]
        rows = torch.cat([torch.cat(parts, dim=1), second])
        mask = torch.ones_like(rows)
        mask[0, slice(0, 4) if side == "left" else slice(7, None)] = 0
        labels = rows.masked_fill(mask == 0, -100)
        seen = totals(rows, labels=labels, attention_mask=mask)
        torch.testing.assert_close(seen, separate, rtol=1e-5, atol=1e-5)


def test_mtp_layers_train_only_when_asked(make_model):
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(4))
    for weight in (0.0, 0.3):
        model = make_model(mtp_loss_weight=weight).train()
        model(tokens, labels=tokens).loss.backward()
        gradients = [parameter.grad is not None for parameter in model.model.mtp_layers[0].parameters()]
        # Routed experts are one parameter, so every parameter of the layer takes part
        assert all(gradients) if weight else not any(gradients)


def test_gradient_checkpointing_keeps_mtp_gradients(make_model):
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(5))
    gradients = []
    for checkpointing in (False, True):
        model = make_model(num_nextn_predict_layers=2, mtp_loss_weight=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


def test_shift_and_labels():
    tokens = torch.tensor([[10, 11, 12, 13, 14]])
    assert shift_left(tokens, 2, -100).tolist() == [[12, 13, 14, -100, -100]]
    assert shift_left(tokens, 9, -100).tolist() == [[-100] * 5]
    assert shift_left(torch.ones(1, 3, 2), 1, 0.0)[0, :, 0].tolist() == [1, 1, 0]
    assert mtp_labels(tokens, 0, None).tolist() == [[12, 13, 14, -100, -100]]
    assert mtp_labels(tokens, 1, torch.tensor([[0, 1, 0, 1, 2]])).tolist() == [[-100] * 5]
    assert mtp_labels(tokens, 0, torch.tensor([[0, 1, 0, 1, 2]])).tolist() == [[-100, -100, 14, -100, -100]]


def test_idle_mtp_layers_are_frozen_and_thawed(make_model):
    """Idle layers must not be waited for by DistributedDataParallel nor decay in the optimizer."""

    def trainable(model):
        return {parameter.requires_grad for parameter in model.base_model.mtp_layers[0].parameters()}

    model = make_model()
    assert trainable(model) == {False}
    model.config.mtp_loss_weight = 0.3
    assert trainable(model.train()) == {True}
    model.config.mtp_loss_weight = 0.0
    assert trainable(model.eval()) == {False}
    assert trainable(make_model(cls=transformers_dsv3.Dsv3ForTokenClassification, mtp_loss_weight=0.3)) == {False}
    # What the user froze stays frozen
    model = make_model(mtp_loss_weight=0.3)
    model.model.mtp_layers[0].requires_grad_(False)
    assert trainable(model.train()) == {False}


def test_frozen_after_loading(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = transformers_dsv3.Dsv3ForCausalLM.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.model.mtp_layers[0].parameters())
    assert all(parameter.requires_grad for parameter in model.model.layers[0].parameters())


def test_no_target_is_no_loss(make_model):
    model = make_model(mtp_loss_weight=0.3).train()
    tokens = torch.ones(1, 2, dtype=torch.long)
    output = model(tokens, labels=tokens)
    assert output.mtp_loss == 0 and torch.isfinite(output.loss)
