"""The quickstart's folder: what a run there was started with, and what running the command again means.

Only the standard library is imported here, and every refusal comes before anything is computed. (Torch is loaded by
then: importing the package registers the plugin's classes.)

    FOLDER/                     the official checkpoint, its tokenizer and quickstart_results.json
    FOLDER/training/run.json    this file's `Run`
    FOLDER/training/tokenizer/  the tokenizer, kept from the first run
    FOLDER/training/checkpoint-N/  the trainer's resumable checkpoints
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_json, write_refusal
from ..option_error import OptionError
from . import checkpoints
from .checkpoints import checkpoint_step


RESULTS_NAME = "quickstart_results.json"


@dataclass(frozen=True)
class QuickstartSettings:
    """Sizes of the quickstart, chosen so that the whole command takes under five minutes on two CPU cores.

    Attributes:
        vocab_size: entries of the byte-level BPE.
        block_length: tokens an example, and the window of the evaluation.
        batch_size: examples a step.
        steps: optimizer steps of one command.
        learning_rate: AdamW's peak learning rate, reached after `warmup_steps`; it decays linearly to zero over the
            last `decay_share` of a command's steps.
        save_every: steps between two resumable checkpoints.
        min_text_bytes: least amount of text that is worth training on.
        max_text_bytes: most text that is read; one command sees about two megabytes of it.
        model: fields of the model's config.
    """

    vocab_size: int = 4096
    block_length: int = 256
    batch_size: int = 2
    steps: int = 1000
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.9
    save_every: int = 50
    min_text_bytes: int = 100_000
    max_text_bytes: int = 32_000_000
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 256,
            "intermediate_size": 768,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 1,
            "max_position_embeddings": 1024,
            # Wider than the default 0.02, which suits hidden sizes in the thousands: a 256-wide model starts slowly.
            "initializer_range": 0.05,
        }
    )


@dataclass(frozen=True)
class Run:
    """One folder's run.

    Attributes:
        settings: as plain values.
        text_source, text_fingerprint: the corpus, see `data.text_files.Corpus`.
        seed: of the weights and of the order of the data.
        start_step: step at which the latest command started.
        target_step: step at which it ends.
    """

    settings: dict[str, Any]
    text_source: str
    text_fingerprint: str
    seed: int
    start_step: int
    target_step: int


def training_folder(output: Path) -> Path:
    return output / "training"


def check_output(output: Path) -> None:
    """Refuse an output that is not a folder or lies in none, or that holds something other than a quickstart."""
    existing = output
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        so = "" if existing == output else f": {output} cannot be made"
        raise OptionError("--output", f"{existing} is a file, not a folder{so}")
    if output.is_dir() and not (training_folder(output) / "run.json").exists():
        # A quickstart killed before its first record leaves `training` and nothing else.
        others = sorted(path.name for path in output.iterdir() if path.name != "training" or not path.is_dir())
        if others:
            raise OptionError(
                "--output", f"{output} holds something else ({', '.join(others[:3])}): choose a new folder"
            )
    if (refusal := write_refusal(existing)) is not None:
        raise OptionError("--output", refusal)


def plan_run(
    output: Path,
    *,
    settings: QuickstartSettings,
    text_source: str,
    text_fingerprint: str,
    steps: int | None,
    seed: int | None,
) -> Run:
    """What this command has to do in `output`: start, finish what was interrupted, or train on from where it ended.

    `steps` and `seed` are None where the user did not give them.

    Raises:
        OptionError: the folder was trained on other text, with other sizes, or from another seed.
    """
    check_output(output)
    record = training_folder(output) / "run.json"
    if not record.exists():
        return Run(
            settings=asdict(settings),
            text_source=text_source,
            text_fingerprint=text_fingerprint,
            seed=0 if seed is None else seed,
            start_step=0,
            target_step=settings.steps if steps is None else steps,
        )
    try:
        run = Run(**json.loads(record.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise OptionError("--output", f"{record} is damaged ({error}): choose a new folder") from None
    if run.text_fingerprint != text_fingerprint:
        raise OptionError(
            "--text",
            f"{output} was trained on other text ({run.text_source}; its files are not the same now): "
            "give the same text to continue, or a new --output to start again",
        )
    if seed is not None and seed != run.seed:
        raise OptionError(
            "--seed",
            f"{output} was started with --seed {run.seed}: leave --seed out to continue, or give a new --output",
        )
    if _comparable(run.settings) != _comparable(asdict(settings)):
        raise OptionError(
            "--output", f"{output} was trained with other sizes, by another version: choose a new folder"
        )
    if finished_steps(output) >= run.target_step:
        added = settings.steps if steps is None else steps
        return replace(run, start_step=run.target_step, target_step=run.target_step + added)
    target = run.target_step if steps is None else run.start_step + steps
    checkpoint = latest_checkpoint(output)
    if checkpoint is not None and target < checkpoint_step(checkpoint) == run.target_step:
        raise OptionError(
            "--steps",
            f"{output} is trained up to step {run.target_step} but was stopped before it was measured: leave --steps "
            "out to finish it",
        )
    if checkpoint is not None and checkpoint_step(checkpoint) > target:
        raise OptionError(
            "--steps",
            f"{output} was interrupted at step {checkpoint_step(checkpoint)} of {run.target_step}, past the {target} "
            "asked for: leave --steps out to finish it",
        )
    return replace(run, target_step=target)


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    # How long to train and how often to save may change between two commands on one folder.
    return {
        key: value
        for key, value in settings.items()
        if key not in ("steps", "save_every", "min_text_bytes", "max_text_bytes")
    }


def record_run(output: Path, run: Run) -> None:
    training_folder(output).mkdir(parents=True, exist_ok=True)
    write_json(training_folder(output) / "run.json", asdict(run))


def finished_steps(output: Path) -> int:
    """Steps behind the results in the folder: 0 where no command has finished there."""
    try:
        return int(json.loads((output / RESULTS_NAME).read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def latest_checkpoint(output: Path) -> Path | None:
    """The newest resumable checkpoint that was written to its end; half-written ones are removed."""
    return checkpoints.latest_checkpoint(training_folder(output))
