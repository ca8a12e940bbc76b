"""Routing reports against native Transformers' router logits and plain loops, and the heat map."""

import dataclasses
import io
import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_dsv3.evaluation.routing import (
    LayerRouting,
    RoutingReport,
    routing_report,
    text_stream,
    text_windows,
)
from transformers_dsv3.evaluation.routing_plot import DPI, heat_map, map_inches
from transformers_dsv3.models.dsv3.moe_dsv3 import Dsv3TopkRouter


def stream_of(length, vocab_size=96, seed=0):
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def chosen_experts(logits_TE, bias_E, config):
    """Experts and their mixing weights of every token, one token after the other, by the definition."""
    size = config.n_routed_experts // config.n_group
    for logits_E in logits_TE.double():
        scores = logits_E.sigmoid().tolist()
        biased = [score + bias for score, bias in zip(scores, bias_E.tolist())]
        groups = [list(range(start, start + size)) for start in range(0, len(scores), size)]
        if config.n_group > 1:
            groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
            groups = groups[: config.topk_group]
        chosen = sorted((e for group in groups for e in group), key=lambda e: -biased[e])[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1
        yield [(e, scores[e] / total * config.routed_scaling_factor) for e in chosen]


@pytest.mark.parametrize(("n_group", "topk_group", "norm"), [(1, 1, True), (2, 1, True), (4, 2, False)])
def test_counts_equal_native_router_logits(make_model, native_twin, n_group, topk_group, norm):
    model = make_model(num_hidden_layers=3, n_group=n_group, topk_group=topk_group, norm_topk_prob=norm)
    native, stream = native_twin(model), stream_of(70)
    report = routing_report(model, stream, window=16, batch_size=3)

    counts, weights, nats = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.float64), 0.0
    for start in range(0, 70, 16):
        ids = stream[None, start : start + 16]
        with torch.no_grad():
            output = native(ids, output_router_logits=True, use_cache=False)
        for row, logits in enumerate(output.router_logits):
            bias = model.model.layers[1 + row].mlp.gate.e_score_correction_bias
            for token in chosen_experts(logits.view(-1, 8), bias, model.config):
                for expert, weight in token:
                    counts[row, expert] += 1
                    weights[row, expert] += weight
        nats += torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="sum").item()

    assert torch.equal(report.tokens_per_expert, counts)
    assert [layer.layer for layer in report.layers] == [1, 2]
    for row, layer in enumerate(report.layers):
        for mean, weight, count in zip(layer.mean_gate_weight, weights[row].tolist(), counts[row].tolist()):
            assert mean == (pytest.approx(weight / count, rel=1e-4) if count else None)
        assert layer.utilisation == pytest.approx(counts[row].double().mean().item() / counts[row].max().item())
        assert [counts[row, e].item() for e in layer.busiest_experts] == sorted(counts[row].tolist(), reverse=True)
        assert layer.relative_load == pytest.approx((counts[row] / (70 * 3 / 8)).tolist())
    assert report.loss == pytest.approx(nats / (70 - 5), rel=1e-5)
    assert (report.tokens, report.n_experts, report.experts_per_token) == (70, 8, 3)


def foreseen_position_by_position(model, stream, window):
    """Agreements, comparisons, nats and targets of each MTP layer, every position from its own prefix."""
    depths = len(model.model.mtp_layers)
    agreed, compared, nats, targets = ([0] * depths for _ in range(4))
    for start in range(0, len(stream), window):
        tokens = stream[start : start + window]
        for position in range(len(tokens)):
            hidden = model.model(tokens[None, : position + 1]).last_hidden_state
            places = torch.arange(position + 1)[None]
            for depth, layer in enumerate(model.model.mtp_layers):
                following = position + depth + 1
                if following >= len(tokens):
                    break
                fed = model.model.embed_tokens(tokens[depth + 1 : following + 1])[None]
                hidden = layer(hidden, fed, **model.model.attention_inputs(hidden, None, places, None))
                logits = model.lm_head(hidden[0, -1])
                main = model(tokens[None, : following + 1]).logits[0, -1]
                agreed[depth] += int(logits.argmax() == main.argmax())
                compared[depth] += 1
                if following + 1 < len(tokens):
                    nats[depth] -= logits.log_softmax(-1)[tokens[following + 1]].item()
                    targets[depth] += 1
    return agreed, compared, nats, targets


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_figures_equal_a_plain_loop(make_model, depths):
    # So few words that the layers agree now and then without having learned anything
    model, stream = make_model(seed=1, num_nextn_predict_layers=depths, vocab_size=5), stream_of(37, 5)
    report = routing_report(model, stream, window=12, batch_size=2)
    with torch.no_grad():
        agreed, compared, nats, targets = foreseen_position_by_position(model, stream, 12)
    assert all(0 < a < c for a, c in zip(agreed, compared))
    assert report.mtp.agreement == tuple(a / c for a, c in zip(agreed, compared))
    assert report.mtp.loss == pytest.approx([n / t for n, t in zip(nats, targets)], rel=1e-4)
    assert report.mtp.second_token_acceptance == agreed[0] / compared[0]
    assert report.mtp.mean_loss == pytest.approx(sum(report.mtp.loss) / depths)


def test_mtp_loss_is_the_one_of_training(make_model):
    model, ids = make_model(num_nextn_predict_layers=2, mtp_loss_weight=0.3), stream_of(64).view(4, 16)
    report = routing_report(model, ids.flatten(), window=16)
    expected = model.train()(ids, labels=ids).mtp_loss.item()
    assert report.mtp.mean_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_padding_is_not_counted(make_model, batch_size):
    model, stream = make_model(), stream_of(16 * 3 + 5)
    report = routing_report(model, stream, window=16, batch_size=batch_size)
    assert report.tokens_per_expert.sum(dim=1).tolist() == [53 * 3]
    alone = (
        sum(routing_report(model, piece, window=16).tokens_per_expert for piece in (stream[:16], stream[16:32]))
        + routing_report(model, stream[32:], window=16, batch_size=1).tokens_per_expert
    )
    assert torch.equal(report.tokens_per_expert, alone)


def test_a_window_of_one_token_behind_the_others(make_model):
    report = routing_report(make_model(), stream_of(17), window=16)
    assert report.tokens == 17 and report.tokens_per_expert.sum() == 17 * 3
    assert routing_report(make_model(), stream_of(2), window=16).mtp is None  # token 2 of a text of two


def test_a_head_in_several_pieces(make_model, monkeypatch):
    model, stream = make_model(), stream_of(60)
    whole = routing_report(model, stream, window=16)
    monkeypatch.setattr("transformers_dsv3.evaluation.routing.HEAD_TOKENS", 7)
    pieces = routing_report(model, stream, window=16)
    assert dataclasses.replace(pieces, loss=0, mtp=None) == dataclasses.replace(whole, loss=0, mtp=None)
    assert pieces.loss == pytest.approx(whole.loss) and pieces.mtp.loss == pytest.approx(whole.mtp.loss)


def test_experts_that_no_token_chooses(make_model):
    model = make_model(n_group=1)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.zero_()
    bias[5] = -100.0
    (layer,) = routing_report(model, stream_of(200), window=32).layers
    assert layer.dead_experts == 1 and layer.tokens_per_expert[5] == 0
    assert layer.mean_gate_weight[5] is None and None not in layer.mean_gate_weight[:5]
    assert layer.busiest_experts[-1] == 5


@pytest.mark.parametrize("fields", [{}, {"num_nextn_predict_layers": 0}])
def test_json_round_trip(make_model, fields):
    report = routing_report(make_model(**fields), stream_of(40), window=16)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert RoutingReport.from_dict(values) == report
    assert values["mean"] == report.statistics.mean()
    assert (values["mtp"] is None) == bool(fields)


def test_layers_are_numbered_as_in_the_checkpoint(make_model):
    model = make_model(num_hidden_layers=5, moe_layer_freq=2, num_nextn_predict_layers=2)
    assert model.config.moe_layers == [2, 4]
    assert model.config.moe_layers == [
        int(name.split(".")[2])
        for name, module in model.named_modules()
        if isinstance(module, Dsv3TopkRouter) and ".mtp." not in name
    ]
    assert [layer.layer for layer in routing_report(model, stream_of(20), window=10).layers] == [2, 4]


def test_the_model_is_left_as_it_was(make_model, monkeypatch):
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    routing_report(model, stream_of(20), window=10)
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        routing_report(model, stream_of(20), window=10)
    assert model.training and model.model.layers[1].mlp.gate.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_wrapped_models(make_model):
    from peft import LoraConfig, get_peft_model

    model, stream = make_model(), stream_of(40)
    plain = routing_report(model, stream, window=16)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"])).eval()
    assert torch.equal(routing_report(wrapped, stream, window=16).tokens_per_expert, plain.tokens_per_expert)


def test_models_without_experts_of_this_package_are_refused(make_model):
    with pytest.raises(ValueError, match="first_k_dense_replace=2"):
        routing_report(make_model(first_k_dense_replace=2), stream_of(20), window=10)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no DeepseekV3ForCausalLM"):
        routing_report(llama, stream_of(20), window=10)


@pytest.mark.parametrize(
    ("length", "options", "says"),
    [
        (20, {"window": 1}, "window=1 is not at least 2"),
        (20, {"window": 8, "max_tokens": 7}, "max_tokens=7 is less than one window of 8"),
        (1, {"window": 8}, "two or more"),
    ],
)
def test_bad_windows_are_refused(make_model, length, options, says):
    with pytest.raises(ValueError, match=says):
        routing_report(make_model(), stream_of(length), **options)


@given(length=st.integers(2, 400), window=st.integers(2, 50), most=st.none() | st.integers(2, 500))
def test_windows_cover_the_text_evenly_and_never_twice(length, window, most):
    if most is not None and most < window:
        return
    stream = torch.arange(length)
    windows = text_windows(stream, window, most)
    taken = torch.cat(windows)
    assert torch.equal(taken, taken.unique())
    assert all(piece.numel() == window for piece in windows[:-1])
    if most is None or most >= length:
        assert torch.equal(taken, stream)
    else:
        assert len(windows) == most // window and taken.numel() == len(windows) * window
        starts = [int(piece[0]) // window for piece in windows]
        assert starts[0] == 0 and (len(starts) == 1 or starts[-1] == length // window - 1)
        gaps = [b - a for a, b in zip(starts, starts[1:])]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_text_stream_marks_the_ends_that_the_tokenizer_knows(byte_tokenizer):
    end = byte_tokenizer.eos_token_id
    texts = ["ab", "c" * 5000]  # no warning of its length: the stream is cut anyway
    stream = text_stream(byte_tokenizer, texts)
    a, b, c = (byte_tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    assert byte_tokenizer.bos_token_id is None
    assert stream.tolist() == [a, b, end, *[c] * 5000, end] and stream.dtype == torch.int64


def made_up(layers, experts, seed=0):
    counts = torch.randint(1, 1000, (layers, experts), generator=torch.Generator().manual_seed(seed))
    rows = [
        LayerRouting(row + 3, tuple(loads), (1.0,) * experts, (0,), 0.5, 1.0, 0.9, 0, 0.8)
        for row, loads in enumerate(counts.tolist())
    ]
    return RoutingReport(experts, 2, int(counts[0].sum()) // 2, 256, 2.0, tuple(rows), None)


def png_size(png):
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (1, 1), (26, 64), (61, 256)])
def test_heat_map_has_room_for_every_cell(layers, experts):
    pytest.importorskip("matplotlib")
    report = made_up(layers, experts)
    width, height = png_size(heat_map([("a", report)]))
    cells_wide, cells_high = map_inches(report)
    assert width > cells_wide * DPI >= 6 * experts and height > cells_high * DPI >= 18 * layers
    assert max(width, height) < 2000


@pytest.mark.parametrize(("experts", "stacked"), [(64, False), (65, True)])
def test_two_maps(experts, stacked):
    pytest.importorskip("matplotlib")
    alone = png_size(heat_map([("a", made_up(4, experts))]))
    both = png_size(heat_map([("a", made_up(4, experts)), ("b", made_up(4, experts, 1))]))
    grown = [b / a for a, b in zip(alone, both)]
    assert grown[stacked] > 1.7 and math.isclose(grown[not stacked], 1, abs_tol=0.01)


def test_colours(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr("transformers_dsv3.evaluation.routing_plot.NUMBERED", 0)
    settings = dict(matplotlib.rcParams)

    def shares_of_colours(*loads):
        layer = LayerRouting(3, loads, (1.0,) * 4, (0,), 0.5, 1.0, 0.9, 0, 0.8)
        png = heat_map([("a", RoutingReport(4, 2, 100, 256, 2.0, (layer,), None))])
        image = torch.tensor(matplotlib.image.imread(io.BytesIO(png)))[..., :3]
        inside = image[image.shape[0] * 2 // 5 : image.shape[0] // 2, image.shape[1] // 5 : image.shape[1] * 3 // 5]
        red, blue = inside[..., 0] - inside[..., 2] > 0.2, inside[..., 2] - inside[..., 0] > 0.2
        black = (inside < 0.1).all(dim=-1)
        return [colour.double().mean().item() > 0.1 for colour in (red, blue, black)]

    assert shares_of_colours(50, 50, 50, 50) == [False, False, False]
    assert shares_of_colours(150, 25, 150, 25) == [True, True, False]
    assert shares_of_colours(100, 0, 100, 0) == [True, False, True]
    assert dict(matplotlib.rcParams) == settings
