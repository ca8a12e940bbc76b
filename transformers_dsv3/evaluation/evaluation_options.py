"""What an evaluation is asked to do. What cannot be meant is refused by its option, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import file_refusal
from ..option_error import OptionError
from .checkpoint_evaluation import EvaluationSettings, EvaluationText, HumanEvalSettings
from .harness import TaskError, TaskSuite, harness_refusal
from .held_out_text import checked_stream, read_texts
from .human_eval import human_eval_refusal
from .loading import check_device, check_dtype
from .sandbox import AUDIT_HOOK, NAMESPACES, sandbox_refusal


def check_options(
    values: dict[str, Any], given: Callable[[str], bool], parts: Sequence[str], tasks: Sequence[str]
) -> None:
    """Refuse values that cannot be meant, and options that would do nothing.

    Args:
        values: of all options of `transformers-dsv3 evaluate`, by their Python names.
        given: whether an option was typed.
        parts, tasks: `values["what"]` and `values["tasks"]`, taken apart.

    Raises:
        OptionError: see above.
    """
    known = EvaluationSettings.what
    for part in parts:
        if part not in known:
            raise OptionError("--what", f"{part!r} is none of {', '.join(known)}, none")
    if len(set(parts)) < len(parts):
        raise OptionError("--what", f"{values['what']!r} names a part twice")
    if not parts and not tasks and not values["human_eval"]:
        raise OptionError("--what", "nothing to measure: no part, no --tasks, no --human-eval")
    check_dtype(values["dtype"])
    lowest = {"window": 2, "batch_size": 1, "num_fewshot": 0, "limit": 1, "human_eval_samples": 1}
    for name, least in lowest.items():
        if values[name] is not None and values[name] < least:
            raise OptionError(_option(name), f"{values[name]} is not at least {least}")
    if not (temperature := values["human_eval_temperature"]) > 0:
        raise OptionError("--human-eval-temperature", f"{temperature} is not above 0")
    if not 0 <= values["seed"] < 2**31:
        raise OptionError("--seed", f"{values['seed']} does not lie between 0 and 2**31 - 1")
    needed = {
        "text": ("--what text, routing or speed", bool(parts)),
        **dict.fromkeys(("include_path", "num_fewshot", "chat_template"), ("--tasks", bool(tasks))),
        **dict.fromkeys(
            ("execute_generated_code", "weak_sandbox", "human_eval_samples", "human_eval_temperature"),
            ("--human-eval", values["human_eval"]),
        ),
    }
    for name, (other, there) in needed.items():
        if given(name) and not there:
            raise OptionError(_option(name), f"does nothing without {other}")
    for folder in values["include_path"] or ():
        if not folder.is_dir() or not any(folder.rglob("*.yaml")):
            raise OptionError("--include-path", f"{folder} is no folder with task files (.yaml)")
    if (refusal := file_refusal(values["json"])) is not None:
        raise OptionError("--json", refusal)
    check_device(values["device"])


def human_eval_settings(agreed: bool, weak: bool, samples: int, temperature: float) -> HumanEvalSettings:
    """How HumanEval is run.

    Args:
        agreed: that Python which the model writes runs here.
        weak: whether a sandbox that is none of the system's will do, where the system allows no other.

    Raises:
        OptionError: without consent, the problems or a sandbox.
    """
    if not agreed:
        raise OptionError(
            "--human-eval",
            "runs Python that the model writes on this machine, in a sandbox: add --execute-generated-code to agree",
        )
    if (refusal := human_eval_refusal()) is not None:
        raise OptionError("--human-eval", refusal)
    isolation = NAMESPACES
    if (refusal := sandbox_refusal()) is not None:
        if not weak:
            raise OptionError(
                "--execute-generated-code",
                f"no sandbox can be made on this system ({refusal}): run it where user namespaces are allowed, or be "
                "content with --weak-sandbox",
            )
        isolation = AUDIT_HOOK
        if (refusal := sandbox_refusal(isolation)) is not None:
            raise OptionError("--weak-sandbox", refusal)
    return HumanEvalSettings(samples=samples, temperature=temperature, isolation=isolation)


def check_harness(tasks: Sequence[str]) -> None:
    """Refuse tasks where the harness is not there. Raises `OptionError`."""
    if tasks and (refusal := harness_refusal()) is not None:
        raise OptionError("--tasks", refusal)


def task_suite(tasks: Sequence[str], include_path: Sequence[Path] | None) -> TaskSuite | None:
    """The tasks with their data, None for none. Raises `OptionError`."""
    if not tasks:
        return None
    try:
        return TaskSuite(tasks, include_path or ())
    except TaskError as error:
        raise OptionError("--tasks", str(error)) from error


def checked_window(checkpoint: str, config: Any, window: int | None) -> int:
    """Tokens of context that the model has. Raises `OptionError`."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise OptionError("CHECKPOINT", f"{checkpoint}: its configuration has no max_position_embeddings")
    if window is not None and window > positions:
        raise OptionError("--window", f"{window} is more than the {positions} positions of {checkpoint}")
    return min(256, positions) if window is None else window


def evaluation_text(
    checkpoint: str, paths: Sequence[Path] | None, tokenizer: Any, window: int, vocab_size: int
) -> EvaluationText:
    """The text in the checkpoint's tokens, under a name that tells nothing of this machine's folders.

    Raises:
        OptionError: the text cannot be read, or is not enough, or not of this tokenizer's model.
    """
    source, texts = read_texts(paths)
    if paths:
        source = ", ".join(path.resolve().name for path in paths)
    stream = checked_stream("CHECKPOINT", checkpoint, tokenizer, texts, window, vocab_size)
    return EvaluationText(source, tuple(texts), stream)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
