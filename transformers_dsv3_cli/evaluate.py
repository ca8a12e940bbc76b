"""`transformers-dsv3 evaluate`: what a checkpoint can do, in one record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, Dtype, Text
from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from transformers_dsv3.evaluation.checkpoint_source import CheckpointSource
    from transformers_dsv3.evaluation.evaluation_record import EvaluationRecord


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A folder or a repository id on the Hub, of a checkpoint or of a PEFT adapter."
        ),
    ],
    text: Text = None,
    what: Annotated[
        str, typer.Option(help="Any of text, routing, speed; none for tasks and HumanEval alone.")
    ] = "text,routing,speed",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Tasks, groups or patterns of lm-evaluation-harness, of --include-path, or task files (.yaml).",
        ),
    ] = "",
    include_path: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder with task files of your own. Functions that they name are run."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a prompt. Default: the task's own.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="So many documents of each task, and problems of HumanEval. For a try only.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put the tasks' prompts into the tokenizer's chat template.")
    ] = False,
    human_eval: Annotated[
        bool, typer.Option("--human-eval", help="HumanEval's 164 problems; needs --execute-generated-code.")
    ] = False,
    execute_generated_code: Annotated[
        bool,
        typer.Option(
            "--execute-generated-code",
            help="Agree that Python code which the model writes is run on this machine: in processes without network, "
            "without sight of your files, and with limits on time, memory and disk.",
        ),
    ] = False,
    weak_sandbox: Annotated[
        bool,
        typer.Option(
            "--weak-sandbox",
            help="Where the system allows no such processes, be content with a hook inside Python, which stops "
            "accidents and no attacks.",
        ),
    ] = False,
    human_eval_samples: Annotated[
        int, typer.Option(help="Solutions a problem: 1 is greedy; more are sampled, for pass@10 and pass@100.")
    ] = 1,
    human_eval_temperature: Annotated[float, typer.Option(help="Of sampling solutions.")] = 0.8,
    window: Annotated[
        int | None, typer.Option(help="Tokens of context for text and routing. Default: 256, or what the model has.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository on the Hub.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Of an adapter, where the one that it names is not there.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of few-shot examples and of sampling.")] = 0,
    json: Annotated[Path, typer.Option(metavar="PATH", help="The record.")] = Path("evaluation.json"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over the record of another evaluation.")
    ] = False,
) -> None:
    """Measure a checkpoint: held-out text, use of experts, speed, tasks of lm-evaluation-harness, HumanEval.

    \b
    text      bits per byte and perplexity, beside what zlib and lzma make of the same text
    routing   how evenly each layer's tokens spread over its experts, as `transformers-dsv3 routing`
    speed     prefill and decoding here, with MTP drafts where the checkpoint has them, bytes of cache a token
    --tasks   the harness's own prompts and metrics (pip install "transformers-dsv3[evaluate]")

    One JSON file has all of it, with the checkpoint's digest, versions, seed, commit, machine and command. It is
    written after each part, and the same command goes on where one was interrupted. `transformers-dsv3 card` makes
    tables of it.

    Data of tasks come from the Hub, or from folders: in a folder that has openai/gsm8k/, fetched by
    `hf download --repo-type dataset openai/gsm8k --local-dir openai/gsm8k`, gsm8k needs no network.

    \b
    Examples:
      transformers-dsv3 evaluate ./dsv3-quickstart
      transformers-dsv3 evaluate ./dsv3-quickstart --text ~/held-out --json held_out.json
      transformers-dsv3 evaluate ./my-adapter --what text --base-model ./dsv3-quickstart
      transformers-dsv3 evaluate ./my-model --tasks gsm8k,mmlu --what none --device cuda --batch-size 32
      transformers-dsv3 evaluate ./my-model --tasks my_task --include-path ./my_tasks --what none
      transformers-dsv3 evaluate ./my-model --human-eval --execute-generated-code --what none
    """
    from transformers_dsv3.benchmark.settings import names
    from transformers_dsv3.data.local_paths import load_refusal
    from transformers_dsv3.evaluation.checkpoint_evaluation import CheckpointEvaluation, EvaluationSettings, parts_of
    from transformers_dsv3.evaluation.evaluation_options import (
        check_harness,
        check_options,
        checked_window,
        evaluation_text,
        human_eval_settings,
        task_suite,
    )
    from transformers_dsv3.evaluation.harness import TaskError
    from transformers_dsv3.evaluation.record_fields import RecordError
    from transformers_dsv3.evaluation.sandbox import AUDIT_HOOK
    from transformers_dsv3.option_error import OptionError

    chosen, task_names = names(what), names(tasks)
    if chosen == ("none",):
        chosen = ()
    with as_bad_parameters():
        check_options(context.params, lambda name: typed(context, name), chosen, task_names)
        solving = None
        if human_eval:
            solving = human_eval_settings(
                execute_generated_code, weak_sandbox, human_eval_samples, human_eval_temperature
            )
            if solving.isolation == AUDIT_HOOK:
                typer.echo("Weak sandbox: code of the model is held back by a hook in Python alone.", err=True)
        check_harness(task_names)
        source, config, tokenizer = find(checkpoint, revision, base_model)
        parts = parts_of(config, chosen)
        if parts != chosen and typed(context, "what"):
            raise OptionError("--what", f"{checkpoint} has no mixture-of-experts layer of this package")
        if chat_template and not tokenizer.chat_template:
            raise OptionError("--chat-template", f"the tokenizer of {checkpoint} has none")
        settings = EvaluationSettings(
            what=parts,
            window=checked_window(checkpoint, config, window),
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            seed=seed,
            num_fewshot=num_fewshot,
            limit=limit,
            chat_template=chat_template,
            human_eval=solving,
        )
        suite = task_suite(task_names, include_path)
        held_out = None
        if parts:
            held_out = evaluation_text(checkpoint, text, tokenizer, settings.window, config.vocab_size)
    try:
        evaluation = CheckpointEvaluation(
            source,
            settings,
            text=held_out,
            tokenizer=tokenizer,
            suite=suite,
            command=command_line(context),
            path=json,
            overwrite=overwrite,
        )
        with naming_the_hub(checkpoint):
            source.fetch()
        evaluation.identify()
    except RecordError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from None
    except (OSError, ValueError) as error:  # files that are broken
        raise typer.BadParameter(load_refusal(checkpoint, error), param_hint="CHECKPOINT") from None
    if evaluation.resumed:
        typer.echo(f"Going on with {json}, which has {', '.join(evaluation.resumed)}.", err=True)
    try:
        try:
            evaluation.load()
        except (OSError, ValueError) as error:
            raise typer.BadParameter(load_refusal(checkpoint, error), param_hint="CHECKPOINT") from None
        record = evaluation.run(lambda part: typer.echo(f"{part} …", err=True))
    except TaskError as error:
        typer.echo(f"Error: {error}. What was measured before is in {json}.", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        kept = f"The same command goes on from what is in {json}." if json.exists() else "Nothing was measured yet."
        typer.echo(f"\nStopped. {kept}", err=True)
        raise typer.Exit(130) from None
    show(record, json)


def find(checkpoint: str, revision: str | None, base_model: str | None) -> tuple[CheckpointSource, Any, Any]:
    """The checkpoint's files, its configuration and its tokenizer; weights on the Hub stay there for now."""
    from transformers_dsv3.data.local_paths import load_refusal
    from transformers_dsv3.evaluation.checkpoint_source import find_checkpoint

    with naming_the_hub(checkpoint):
        try:
            source = find_checkpoint(checkpoint, revision, base_model)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="CHECKPOINT") from None
    try:
        config = source.load_config()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(load_refusal(checkpoint, error), param_hint="CHECKPOINT") from None
    try:
        return source, config, source.load_tokenizer()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{checkpoint} has no tokenizer that can be loaded ({load_refusal(checkpoint, error)}): save one "
            "there with tokenizer.save_pretrained(...)",
            param_hint="CHECKPOINT",
        ) from None


@contextmanager
def naming_the_hub(checkpoint: str) -> Iterator[None]:
    """What a download fails of, in one line."""
    from transformers_dsv3.hub.hub_errors import HTTPError, reason

    try:
        yield
    except (OSError, HTTPError) as error:
        raise typer.BadParameter(
            f"{checkpoint} is no folder here, and from the Hub: {reason(error)}", param_hint="CHECKPOINT"
        ) from None


def command_line(context: typer.Context) -> str:
    """What was typed, as others would type it: without this machine's folders."""
    from transformers_dsv3.evaluation.shareable import shareable_command

    words: list[str] = []
    for parameter in context.command.params:
        # A record is the same wherever it is written, and whatever stood there before
        if parameter.name in ("json", "overwrite") or not typed(context, parameter.name):
            continue
        given = context.params[parameter.name]
        for value in given if isinstance(given, (list, tuple)) else [given]:
            words += [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
            words += [] if value is True else [str(value)]
    return shareable_command(["transformers-dsv3", "evaluate", *words])


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def show(record: EvaluationRecord, path: Path) -> None:
    """Print the table of figures."""
    from rich.console import Console
    from rich.table import Table

    from transformers_dsv3.evaluation.evaluation_table import figures_of

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    table = Table("measured", "figure", "beside it", title=record.checkpoint.name)
    for row in figures_of(record):
        table.add_row(*row)
    console.print(table)
    console.print(f"The record is in {path}.", highlight=False, soft_wrap=True)
