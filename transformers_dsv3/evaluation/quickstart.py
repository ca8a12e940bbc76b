"""The whole quickstart: a small model trained, saved, loaded back and measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.text_files import build_corpus, read_documents, standard_library
from ..files import write_json
from ..training.quickstart_run import (
    RESULTS_NAME,
    QuickstartSettings,
    checkpoint_step,
    latest_checkpoint,
    plan_run,
    training_folder,
)
from .machine import is_busy, load_average


def run_quickstart(
    output: Path,
    *,
    text: Path | None,
    steps: int | None,
    seed: int | None,
    settings: QuickstartSettings,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The whole quickstart but for the printed table; what it returns is also in DIR/quickstart_results.json.

    Raises:
        TextError, OptionError: before any training, and before anything is written.
    """
    started = time.perf_counter()
    skipped: list[str] = []
    if text is None:
        documents, source = standard_library(), "the Python standard library"
    else:
        documents, skipped = read_documents(text, exclude=output)
        source = str(text)
    corpus = build_corpus(
        documents,
        source,
        skipped=skipped,
        min_bytes=settings.min_text_bytes,
        max_bytes=settings.max_text_bytes,
    )
    run = plan_run(
        output,
        settings=settings,
        text_source=corpus.source,
        text_fingerprint=corpus.fingerprint,
        steps=steps,
        seed=seed,
    )
    say(
        f"Text: {corpus.source}, {corpus.train_bytes / 1e6:.1f} MB to train on, "
        f"{corpus.held_out_bytes / 1e6:.2f} MB held out ({corpus.split})."
    )
    if corpus.skipped:
        say(f"Left out, empty or not UTF-8 text: {names_of(corpus.skipped)}.")
    if (training_folder(output) / "run.json").exists():
        checkpoint = latest_checkpoint(output)
        step = 0 if checkpoint is None else checkpoint_step(checkpoint)
        say(f"Continuing {output} from step {step:,} up to step {run.target_step:,}.")
    else:
        say(f"Training a new model for {run.target_step:,} steps.")

    if "OMP_NUM_THREADS" not in os.environ and is_busy(load_average(), os.cpu_count() or 1):
        say(
            "Other programs are running, and threads of so small a model then wait for each other. If a step takes "
            "more than a second, stop, and put OMP_NUM_THREADS=1 in front of the same command."
        )

    # Behind all that may be refused: these import Trainer, which takes seconds
    from ..training.quickstart import BALANCE_LOSS_WEIGHT, train_and_save
    from .quickstart_report import PYTHON_PROMPTS, measure_checkpoint, prompts_from
    from .training_record import result, save_training_record

    outcome = train_and_save(output, run, corpus, settings)
    prompts = PYTHON_PROMPTS if text is None else prompts_from(corpus)
    results = {
        "steps": run.target_step,
        "seed": run.seed,
        "text": {
            "source": corpus.source,
            "split": corpus.split,
            "train_bytes": corpus.train_bytes,
            "held_out_bytes": corpus.held_out_bytes,
            "fingerprint": corpus.fingerprint,
        },
        "parameters": {"total": outcome.parameters, "active": outcome.active_parameters},
        "training": {
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "seconds": outcome.seconds,
            "tokens_per_second": outcome.tokens / outcome.seconds if outcome.seconds else None,
        },
        **measure_checkpoint(output, corpus, window=settings.block_length, prompts=prompts, seed=run.seed, say=say),
    }
    held_out = results["held_out"]
    save_training_record(
        output,
        method="pre-training",
        arguments=outcome.arguments,
        state=outcome.state,
        data={**results["text"], "fingerprint_of": "names and texts of the files"},
        block_size=settings.block_length,
        settings={"block_size": settings.block_length, "seq_aux_loss_weight": BALANCE_LOSS_WEIGHT},
        results=[
            result(
                "bits_per_byte",
                "held-out text",
                held_out["bits_per_byte"],
                beside={"zlib -9": held_out["zlib_bits_per_byte"], "lzma -9e": held_out["lzma_bits_per_byte"]},
            )
        ],
        extra={"routing": results["routing"], "completions": results["completions"]},
    )
    results["seconds"] = time.perf_counter() - started
    # Last: this file is what tells the next command that this one has finished.
    write_json(output / RESULTS_NAME, results)
    return results


def names_of(files: Sequence[str]) -> str:
    """The first three names and how many there are: `1 file (a.png)`, `5 files (a.png, b.png, c.png, …)`."""
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{count} ({', '.join([*files[:3], *(['…'] if len(files) > 3 else [])])})"
