"""The same weights in Transformers' own DeepSeek-V3 and in ours: logits, gradients, text.

The end of the run prints the largest relative errors, ‖a − b‖ / ‖b‖, that were measured.
"""

import itertools
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from transformers_dsv3 import Dsv3ForCausalLM
from transformers_dsv3.kernels.backends import ABSORBED, EXPANDED
from transformers_dsv3.models.dsv3 import attention_dsv3


TOLERANCE = 1e-4

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
FACTORS = {
    "q_lora_rank": [12, None],
    "groups": [(1, 1), (2, 1), (4, 2)],  # n_group, topk_group
    "n_shared_experts": [0, 1, 2],
    "rope_parameters": [None, YARN],
    "tie_word_embeddings": [False, True],
    "num_nextn_predict_layers": [0, 1, 2],
    "rope_interleave": [True, False],
    "attention_bias": [False, True],
    "norm_topk_prob": [True, False],
    "padding": ["none", "left", "right"],
    "attn_implementation": ["sdpa", "eager"],
    "experts_implementation": ["grouped_mm", "eager"],
}


def pairwise(factors):
    """Combinations in which every pair of values of two factors occurs at least once."""
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    chooser = random.Random(0)
    while missing:
        candidates = []
        for _ in range(300):
            row = {name: chooser.randrange(len(values)) for name, values in factors.items()}
            candidates.append((missing & set(itertools.combinations(row.items(), 2)), row))
        covered, row = max(candidates, key=lambda candidate: len(candidate[0]))
        missing -= covered
        if covered:
            yield {name: factors[name][i] for name, i in row.items()}


CASES = list(pairwise(FACTORS))


def name_of(case):
    groups, padding = case["groups"][0], case["padding"]
    parts = [
        f"q{case['q_lora_rank'] or 0}",
        f"groups{groups}",
        f"shared{case['n_shared_experts']}",
        f"mtp{case['num_nextn_predict_layers']}",
        "yarn" if case["rope_parameters"] else "",
        "tied" if case["tie_word_embeddings"] else "",
        "" if case["rope_interleave"] else "halves",
        "bias" if case["attention_bias"] else "",
        "" if case["norm_topk_prob"] else "unnormed",
        "" if padding == "none" else padding,
        case["attn_implementation"],
        case["experts_implementation"],
    ]
    return "-".join(part for part in parts if part)


@pytest.fixture
def check(measured):
    def check(kind, ours, native, what=""):
        assert ours.shape == native.shape and bool(torch.isfinite(ours).all())
        assert native.norm() > 0, f"{what}: nothing to compare"
        error = float((ours - native).norm() / native.norm())
        figure = f"largest relative error, {kind}"
        measured[figure] = max(measured.get(figure, 0.0), error)
        assert error <= TOLERANCE, f"{kind} {what}: {error:.1e}"

    return check


@pytest.fixture
def paths(monkeypatch):
    """Counts the calls of each way through attention."""
    counts = {"absorbed": 0, "expanded": 0}

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for owner, function, name in (
        (attention_dsv3, "absorbed_attention", "absorbed"),
        (attention_dsv3.Dsv3Attention, "_expand", "expanded"),
        (ABSORBED["cpu"], "undispatched", "absorbed"),
        (EXPANDED["cpu"], "function", "expanded"),
    ):
        monkeypatch.setattr(owner, function, count(name, getattr(owner, function)))
    return counts


@pytest.fixture
def pair(make_model, native_twin):
    """Function from a case to our model and the native one, which runs its plain experts."""

    def make(case):
        fields = {
            key: value for key, value in case.items() if key not in ("groups", "padding", "experts_implementation")
        }
        fields["n_group"], fields["topk_group"] = case.get("groups", (2, 1))
        ours = make_model(**fields)
        native = native_twin(ours)
        ours.set_experts_implementation(case.get("experts_implementation", "grouped_mm"))
        native.set_experts_implementation("eager")
        return ours, native

    return make


def batch(length, padding, rows=3, bare=0):
    """Token ids, mask and positions of rows padded unevenly: the first not at all, the last `bare` tokens nowhere."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(96, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    if padding != "none":
        end = length - bare
        for row in range(1, rows):
            hidden = min(end - 1, 2 * row + 1)
            mask[row, slice(0, hidden) if padding == "left" else slice(end - hidden, end)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return tokens, mask, positions


def test_cases_cover_every_pair():
    for (a, values_a), (b, values_b) in itertools.combinations(FACTORS.items(), 2):
        for value_a, value_b in itertools.product(values_a, values_b):
            assert any(case[a] == value_a and case[b] == value_b for case in CASES), (a, value_a, b, value_b)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_prefill_and_decode(case, pair, check, paths):
    """Logits of a prefill, then of one more token on 1, 100 and 1,000 cached ones."""
    ours, native = pair(case)
    for cached in (1, 100, 1000):
        # Padding on the right stays as a gap before the new token
        tokens, mask, positions = batch(cached + 1, case["padding"], bare=1)
        inputs = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
        step = {"attention_mask": mask, "position_ids": positions[:, -1:]}
        results, caches = [], []
        with torch.no_grad():
            for model in (ours, native):
                cache = DynamicCache(config=model.config)
                prefill = model(tokens[:, :-1], past_key_values=cache, **inputs).logits
                paths["absorbed"] = 0
                decode = model(tokens[:, -1:], past_key_values=cache, **step).logits
                results.append((prefill, decode))
                caches.append(cache)
                if model is ours:
                    assert paths["absorbed"] == ours.config.num_hidden_layers
        real = inputs["attention_mask"].bool()
        check("prefill logits", results[0][0][real], results[1][0][real], f"{cached} tokens")
        check(f"decode logits after {cached:,} tokens", results[0][1], results[1][1])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients_of_every_parameter(case, pair, check):
    ours, native = pair(case)
    tokens, mask, positions = batch(24, case["padding"])
    labels = tokens.masked_fill(mask == 0, -100)
    losses = []
    for model in (ours.train(), native.train()):
        loss = model(tokens, attention_mask=mask, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach()[None])
    check("training loss", *losses)
    native_gradients = {name: parameter.grad for name, parameter in native.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name in native_gradients:
            expected = native_gradients.pop(name)
            if parameter.numel() > 0:  # no shared experts are some of width 0
                check("gradients", parameter.grad, expected, name)
        else:
            assert ".mtp." in name
            assert parameter.grad is None, f"{name} of an MTP layer is not trained with mtp_loss_weight=0"
    assert not native_gradients


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_chunked_prefill(attn_implementation, padding, pair, check, paths):
    """Several queries on a cache, on both sides of the point where absorbing stops to pay."""
    ours, native = pair({"attn_implementation": attn_implementation})
    tokens, mask, positions = batch(400, padding)
    with torch.no_grad():
        whole = native(tokens, attention_mask=mask, position_ids=positions).logits
        cache, logits, taken = DynamicCache(config=ours.config), [], []
        start = 0
        for size in (150, 140, 1, 60, 3, 46):
            end = start + size
            before = dict(paths)
            output = ours(
                tokens[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            layers = {name: paths[name] - before[name] for name in paths}
            assert sorted(layers.values()) == [0, ours.config.num_hidden_layers]
            taken.append(max(layers, key=layers.get))
            assert (taken[-1] == "absorbed") == ours.model.layers[0].self_attn.is_absorbed_cheaper(size, end)
            logits.append(output.logits)
            start = end
    assert taken == ["expanded", "expanded", "absorbed", "absorbed", "absorbed", "absorbed"]
    real = mask.bool()
    check("chunked prefill logits", torch.cat(logits, dim=1)[real], whole[real])


def test_both_paths_agree_around_the_crossover(pair, check, paths):
    """The choice between the paths falls at a number of queries; its neighbours match native alike."""
    ours, native = pair({})
    attention = ours.model.layers[0].self_attn
    cached = 40
    crossover = next(q for q in range(1, 1000) if not attention.is_absorbed_cheaper(q, cached + q))
    assert attention.is_absorbed_cheaper(crossover - 1, cached + crossover - 1)
    for q_len in (crossover - 1, crossover):
        tokens, _, _ = batch(cached + q_len, "none")
        with torch.no_grad():
            expected = native(tokens).logits[:, cached:]
            cache = ours(tokens[:, :cached], use_cache=True).past_key_values
            paths["absorbed"] = 0
            logits = ours(tokens[:, cached:], past_key_values=cache).logits
        assert (paths["absorbed"] > 0) == (q_len < crossover)
        check("logits around the crossover", logits, expected, f"{q_len} queries")


def test_comparison_sees_every_part(pair):
    """Leaving out a bias, a norm's weight or a tenth of YaRN's scale moves logits by far more than the tolerance."""
    _, native = pair({"attention_bias": True, "rope_parameters": YARN})
    tokens, _, _ = batch(100, "none")
    layer = native.model.layers[1]
    attention = layer.self_attn

    def moved():
        logits = native(tokens).logits
        return float((logits - expected).norm() / expected.norm())

    with torch.no_grad():
        expected = native(tokens).logits
        for part in (layer.mlp.gate.e_score_correction_bias, attention.q_a_proj.bias, attention.kv_a_layernorm.weight):
            kept = part.clone()
            part.zero_()
            assert moved() > 10 * TOLERANCE
            part.copy_(kept)
        attention.scaling *= 0.9
        assert moved() > TOLERANCE


@pytest.fixture(scope="module")
def bf16_folder(_trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    _trained.save_pretrained(folder)
    return folder


def test_bf16_greedy_text(bf16_folder, training_bytes):
    """The same 64 tokens from a trained model in bf16, alone and in a batch padded on the left."""
    ours = AutoModelForCausalLM.from_pretrained(bf16_folder, dtype=torch.bfloat16)
    config = DeepseekV3Config.from_pretrained(bf16_folder)
    native = DeepseekV3ForCausalLM.from_pretrained(bf16_folder, config=config, dtype=torch.bfloat16)
    assert type(ours) is Dsv3ForCausalLM and ours.dtype == native.dtype == torch.bfloat16
    lengths = [50, 40, 61, 20]
    prompts = [training_bytes[start : start + length] for start, length in zip((0, 300, 620, 900), lengths)]
    settings = {"max_new_tokens": 64, "do_sample": False}
    for prompt in prompts:
        texts = [model.generate(prompt[None], **settings) for model in (ours, native)]
        assert texts[0].shape[1] == len(prompt) + 64
        assert torch.equal(*texts)
    rows = torch.stack(
        [torch.cat([prompt.new_full((max(lengths) - len(prompt),), 256), prompt]) for prompt in prompts]
    )
    texts = [model.generate(rows, attention_mask=(rows != 256).long(), **settings) for model in (ours, native)]
    assert torch.equal(*texts)
