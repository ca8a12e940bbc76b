"""`transformers-dsv3 quickstart`: train a small DeepSeek-V3 on real text, save it, and show what it does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from transformers_dsv3.training.quickstart_run import QuickstartSettings


def quickstart(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the checkpoint goes. A folder of an earlier run is continued.")
    ] = Path("dsv3-quickstart"),
    text: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A UTF-8 text file, or a folder with some. Default: Python's own library."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of this command. Default: 1000, three minutes on two cores.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order of the data. Default: 0.")] = None,
) -> None:
    """Train a small DeepSeek-V3 (MLA, mixture of experts, MTP) from scratch on real text, in a few minutes.

    It reads the Python standard library's own source (or your text), trains a byte-level BPE and the model on most
    of it, saves an official checkpoint with its tokenizer, loads it back through AutoModelForCausalLM, completes
    three prompts, and measures it on the files it has not seen. Nothing is downloaded.

    Run the same command again to go on: an interrupted run is finished, a finished one is trained further.

    \b
    Examples:
      transformers-dsv3 quickstart
      transformers-dsv3 quickstart --output ./my-notes-model --text ~/notes
      transformers-dsv3 quickstart --steps 3000
    """
    from transformers_dsv3.data.text_files import TextError
    from transformers_dsv3.training.quickstart_run import QuickstartError, QuickstartSettings

    if steps is not None and steps < 1:
        raise typer.BadParameter(f"{steps} is not at least 1", param_hint="--steps")
    if seed is not None and not 0 <= seed < 2**32:
        raise typer.BadParameter(f"{seed} does not lie between 0 and 2**32 - 1", param_hint="--seed")
    try:
        results = run_quickstart(output, text=text, steps=steps, seed=seed, settings=QuickstartSettings())
    except TextError as error:
        raise typer.BadParameter(str(error), param_hint="--text") from None
    except QuickstartError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
    except KeyboardInterrupt:
        typer.echo(
            f"\nStopped. The same command goes on from the last checkpoint; one is saved every "
            f"{QuickstartSettings.save_every} steps.",
            err=True,
        )
        raise typer.Exit(130) from None
    show(results, output)


def run_quickstart(
    output: Path, *, text: Path | None, steps: int | None, seed: int | None, settings: QuickstartSettings
) -> dict[str, Any]:
    """The whole quickstart but for the printed table; what it returns is also in DIR/quickstart_results.json.

    Raises:
        TextError, QuickstartError: before any training, and before anything is written.
    """
    from transformers_dsv3.data.text_files import build_corpus, read_documents, standard_library
    from transformers_dsv3.training.quickstart_run import (
        RESULTS_NAME,
        checkpoint_step,
        latest_checkpoint,
        plan_run,
        training_folder,
        write_json,
    )

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
    typer.echo(
        f"Text: {corpus.source}, {corpus.train_bytes / 1e6:.1f} MB to train on, "
        f"{corpus.held_out_bytes / 1e6:.2f} MB held out ({corpus.split})."
    )
    if corpus.skipped:
        typer.echo(f"Left out, empty or not UTF-8 text: {names_of(corpus.skipped)}.")
    if (training_folder(output) / "run.json").exists():
        checkpoint = latest_checkpoint(output)
        step = 0 if checkpoint is None else checkpoint_step(checkpoint)
        typer.echo(f"Continuing {output} from step {step:,} up to step {run.target_step:,}.")
    else:
        typer.echo(f"Training a new model for {run.target_step:,} steps.")

    from transformers_dsv3.evaluation.quickstart_report import PYTHON_PROMPTS, measure_checkpoint, prompts_from
    from transformers_dsv3.evaluation.training_record import result, save_training_record
    from transformers_dsv3.training.quickstart import BALANCE_LOSS_WEIGHT, train_and_save

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
        **measure_checkpoint(
            output, corpus, window=settings.block_length, prompts=prompts, seed=run.seed, say=typer.echo
        ),
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


def show(results: dict[str, Any], output: Path) -> None:
    """Print the completions and the table of figures."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for completion in results["completions"]:
        text = Text(completion["prompt"], style="bold")
        text.append(completion["text"], style="not bold")
        console.print(Panel(text, title="completion", title_align="left"))

    held_out, decode, cache = results["held_out"], results["decode"], results["cache_bytes_per_token"]
    rate = results["training"]["tokens_per_second"]
    table = Table("measured", "figure", "beside it", title=f"{output} after {results['steps']:,} steps")
    table.add_row(
        "held-out bits per byte",
        f"{held_out['bits_per_byte']:.3f}",
        f"zlib -9 {held_out['zlib_bits_per_byte']:.3f}, lzma -9e {held_out['lzma_bits_per_byte']:.3f}, same text",
    )
    table.add_row(
        "parameters",
        f"{results['parameters']['total'] / 1e6:.1f} M",
        f"{results['parameters']['active'] / 1e6:.1f} M active a token",
    )
    routing = results["routing"]["mean"]
    table.add_row(
        "held-out utilisation of experts",
        f"{routing['utilisation']:.0%}",
        f"mean over largest load; load entropy {routing['load_entropy']:.3f}, {routing['dead_experts']:.0f} dead",
    )
    table.add_row(
        "training tokens/s",
        f"{rate:,.0f}" if rate else "no step was left to train",
        f"{results['training']['tokens']:,} tokens in {results['training']['seconds']:.0f} s",
    )
    table.add_row(
        "greedy decode tokens/s",
        f"{decode['greedy_tokens_per_second']:.0f}",
        f"native Transformers {decode['native_greedy_tokens_per_second']:.0f}, same weights",
    )
    if "mtp_acceptance_rate" in decode:
        table.add_row(
            "MTP drafts accepted, greedy",
            f"{decode['mtp_acceptance_rate']:.0%}",
            f"{decode['greedy_mtp_tokens_per_second']:.0f} tokens/s with use_mtp=True; "
            f"sampling {decode['mtp_acceptance_rate_sampled']:.0%}",
        )
    table.add_row(
        "cache bytes a token", f"{cache['plugin']:,.0f}", f"native Transformers {cache['native']:,.0f}, same weights"
    )
    table.add_row("whole command", f"{results['seconds']:.0f} s", "")
    console.print(table)
    console.print(f"An official deepseek_v3 checkpoint is in {output}; run the same command to train it further.")
