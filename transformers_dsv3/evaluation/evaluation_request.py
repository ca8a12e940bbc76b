"""What an evaluation is asked to measure, checked before a weight is read; a refusal names the option at fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import sandbox
from .checkpoint_evaluation import EvaluationSettings, EvaluationText, HumanEvalSettings
from .harness import TaskError, TaskSuite
from .human_eval import human_eval_problem
from .loading import RefusedOption
from .routing_request import checked_stream, read_texts


def human_eval_settings(
    wanted: bool, agreed: bool, weak: bool, samples: int, temperature: float
) -> HumanEvalSettings | None:
    """How HumanEval is run, None where it is not.

    Args:
        agreed: whether code that the model writes may be run on this machine.
        weak: whether a hook inside Python will do where the system allows no sandbox.
        samples, temperature: see `HumanEvalSettings`.

    Raises:
        RefusedOption: without consent, without the problems, or without a sandbox.
    """
    if not wanted:
        return None
    if not agreed:
        raise RefusedOption(
            "--human-eval",
            "runs Python that the model writes on this machine, in a sandbox: add --execute-generated-code to agree",
        )
    if (problem := human_eval_problem()) is not None:
        raise RefusedOption("--human-eval", problem)
    isolation = sandbox.NAMESPACES
    if (problem := sandbox.sandbox_problem()) is not None:
        if not weak:
            raise RefusedOption(
                "--execute-generated-code",
                f"no sandbox can be made on this system ({problem}): run it where user namespaces are allowed, or be "
                "content with --weak-sandbox",
            )
        isolation = sandbox.AUDIT_HOOK
        if (problem := sandbox.sandbox_problem(isolation)) is not None:
            raise RefusedOption("--weak-sandbox", problem)
    return HumanEvalSettings(samples=samples, temperature=temperature, isolation=isolation)


def checked_window(checkpoint: str, config: Any, window: int | None) -> int:
    """Tokens of context that the model has."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise RefusedOption("CHECKPOINT", f"{checkpoint}: its configuration has no max_position_embeddings")
    if window is not None and window > positions:
        raise RefusedOption("--window", f"{window} is more than the {positions} positions of {checkpoint}")
    return min(256, positions) if window is None else window


def task_suite(names: tuple[str, ...], include_path: Sequence[Path] | None) -> TaskSuite | None:
    """The tasks with their data, None for none."""
    if not names:
        return None
    try:
        return TaskSuite(names, include_path or ())
    except TaskError as error:
        raise RefusedOption("--tasks", str(error)) from None


def evaluation_text(
    checkpoint: str, paths: Sequence[Path] | None, tokenizer: Any, settings: EvaluationSettings, vocab_size: int
) -> EvaluationText:
    """The text in the checkpoint's tokens, under a name that tells nothing of this machine's folders."""
    source, texts = read_texts(paths)
    if paths:
        source = ", ".join(path.resolve().name for path in paths)
    stream = checked_stream("CHECKPOINT", checkpoint, tokenizer, texts, settings.window, vocab_size)
    return EvaluationText(source, tuple(texts), stream)
