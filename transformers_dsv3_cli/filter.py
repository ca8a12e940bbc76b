"""`transformers-dsv3 filter`: the best part of a text, and why the rest was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from rich.console import Console


def filter(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make; of --explain, that of a run.")],
    input: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="JSONL (also .gz, .zst), Parquet and text files, and folders of them; may be given several times.",
        ),
    ] = None,
    seed_text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Some clean text of every domain, by which the rest is judged: a folder for each, or a column that "
            "names it. From 50 kB on; a few MB are plenty.",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of the tokens after exact deduplication. Default: what no stage drops."),
    ] = None,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="Evaluation sets of which nothing may be kept: humaneval, lm-eval:TASK, or a file or folder; may be "
            "given several times.",
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Which to run, with commas between. Default: all that the other options make possible.",
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="A model that chooses, by perplexity, among twice what is to be kept."
        ),
    ] = None,
    shares: Annotated[
        str,
        typer.Option(
            help="By what the budget is shared out: pool (what each domain and language has left), or seed (each "
            "domain's share of the seed)."
        ),
    ] = "pool",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose tokens are counted. Default: four bytes are one.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column of the text.")] = "text",
    domain_column: Annotated[str, typer.Option(help="The column of the domain, where there is one.")] = "domain",
    min_bytes: Annotated[int, typer.Option(help="Shorter documents are dropped.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    executor: Annotated[str, typer.Option(help="datatrove's: local or ray.")] = "local",
    explain: Annotated[
        str | None,
        typer.Option(metavar="DOC", help="Say what each stage of the run in --output says of a text file or an id."),
    ] = None,
) -> None:
    """Keep the best part of a text, by domain and language, and say why each other document was dropped.

    \b
    Stages, cheap to dear, each on what those before it left:
      exact          the same text, but for spaces
      entropy        of bytes: empty, too short, compressed or encoded data
      statistics     mojibake, base64, markup, logs and tables, legal text, repetition, beyond what the seed has
      contamination  12 words in a row of an evaluation set
      near           near duplicates by MinHash: the best scored of a cluster is kept
      ngram          bits a byte by a 6-gram model of the seed: the best of each domain and language, up to a quota
      model          the same by a checkpoint's perplexity (--scorer)

    DIR/kept and DIR/dropped are Parquet files with the text unchanged, the latter with stage and reason.
    DIR/report.html has the funnel, scores, samples at each threshold and rates. DIR/mixture.json is what
    `examples/pretrain.py --data DIR` reads. Killed, the same command goes on. Needs
    `pip install "transformers-dsv3[data]"`.

    \b
    Examples:
      transformers-dsv3 filter --input ./crawl --seed-text ./clean --keep 0.19 --output ./filtered
      transformers-dsv3 filter --input ./crawl --seed-text ./clean --output ./new --decontaminate humaneval --workers 8
      transformers-dsv3 filter --input ./train.jsonl --stages contamination --decontaminate ./tests --output ./clean
      transformers-dsv3 filter --output ./filtered --explain ./page.txt
    """
    from rich.console import Console

    from transformers_dsv3.data.filtering.explain import explain_document
    from transformers_dsv3.data.filtering.inputs import Columns
    from transformers_dsv3.data.filtering.pipeline import filter_text
    from transformers_dsv3.data.filtering.plan import FilterSettings, usual_stages
    from transformers_dsv3.option_error import OptionError

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    with as_bad_parameters():
        if explain is not None:
            for stage, told in explain_document(output, explain):
                console.print(f"{stage:17} {told}", highlight=False, markup=False, soft_wrap=True)
            return
        if not input:
            raise OptionError("--input", "is needed: what to filter")
        named = usual_stages(bool(seed_text), bool(decontaminate), scorer is not None)
        if stages is not None:
            named = tuple(name.strip() for name in stages.split(",") if name.strip())
        settings = FilterSettings(
            keep=keep,
            stages=named,
            tokenizer=tokenizer,
            min_bytes=min_bytes,
            columns=Columns(text_column, domain_column),
            shares=shares,
            scorer=scorer,
        )
        try:
            report = filter_text(
                input,
                output,
                settings,
                seed_text=seed_text or (),
                decontaminate=decontaminate or (),
                workers=workers,
                executor=executor,
                progress=lambda line: typer.echo(f"… {line}", err=True),
            )
        except KeyboardInterrupt:
            typer.echo("\nStopped. The same command goes on where it was.", err=True)
            raise typer.Exit(130) from None
    show(report, output, console)


def show(report: dict[str, Any], output: Path, console: Console) -> None:
    """Print the funnel and where the rest is."""
    from rich.table import Table

    table = Table("stage", "dropped", "left", "MB left", "reasons")
    for row in report["funnel"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in row["reasons"].items())
        table.add_row(
            row["stage"], f"{row['dropped']:,}", f"{row['left']:,}", f"{row['left_bytes'] / 1e6:,.2f}", reasons
        )
    console.print(table)
    for reason, count in report["unreadable_reasons"].items():
        console.print(f"Not read: {count:,}, {reason}", highlight=False, markup=False)
    console.print(
        f"Kept {report['kept']:,} of {report['read']:,} documents and {report['kept_share']:.1%} of "
        f"{report['tokens']:,} tokens, in {output / 'kept'}; why not the others: {output / 'report.html'}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
