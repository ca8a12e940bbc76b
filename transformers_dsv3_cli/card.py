"""`transformers-dsv3 card`: the README.md of a model's repository, from what its records know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A folder: a checkpoint, an adapter, or an earlier card's folder without weights.",
        ),
    ],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="A record of `transformers-dsv3 evaluate`, or a folder with some; may be given several times. Those "
            "in CHECKPOINT are taken in any case.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the card there, with the records to make it again, without the weights."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What the model is called: NAMESPACE/NAME on the Hub. Default: the folder's name."),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Its identifier on the Hub: apache-2.0, mit, other, … Default: it is not stated."),
    ] = None,
    license_name: Annotated[
        str | None, typer.Option(help="With --license other: a short name, my-license-1.0.")
    ] = None,
    license_link: Annotated[
        str | None, typer.Option(help="With --license other: LICENSE, for that file in the folder, or an address.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Name on the Hub of what the model was trained from.")
    ] = None,
    language: Annotated[str, typer.Option(metavar="CODE,...", help="Of its text: en, zh, code, multilingual, …")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Write over a README.md that was written or changed by hand.")
    ] = False,
) -> None:
    """Write the model card (README.md) of a checkpoint or an adapter, from its files and records.

    \b
    from the weights' headers   parameters in all and active a token, cache, types, sizes, a digest
    training_record.json        data, commands, steps, time, machine, arguments, curves, what the run measured
                                (`quickstart` and the example scripts leave it beside their checkpoint)
    evaluation.json             text, experts, speed, tasks and HumanEval, each with its command
    config.json                 how the model is loaded here, by plain Transformers, vLLM and llama.cpp, or why not

    What no record knows is said to be unknown. A record of other weights is refused: records and weights are compared
    by digest. Loss curves and a heat map of the experts go into figures/ (pip install "transformers-dsv3[plot]").
    Options are remembered in the card: written again, it keeps them. The same records give the same bytes.

    `transformers-dsv3 push` uploads the folder with its card.

    \b
    Examples:
      transformers-dsv3 evaluate ./dsv3-quickstart
      transformers-dsv3 card ./dsv3-quickstart --results evaluation.json --license apache-2.0
      transformers-dsv3 card ./my-adapter --name me/my-adapter --base-model me/my-model
      transformers-dsv3 card ./dsv3-quickstart --results ./results --output ./model_cards/dsv3-quickstart
    """
    from transformers_dsv3.evaluation.record_fields import RecordError
    from transformers_dsv3.hub.model_card import CardError, write_card
    from transformers_dsv3.hub.model_folder import CheckpointError

    languages = [code.strip() for code in language.split(",") if code.strip()]
    try:
        written, path = write_card(
            checkpoint,
            results or (),
            output=output,
            force=force,
            name=name,
            license=license,
            license_name=license_name,
            license_link=license_link,
            base_model=base_model,
            language=languages or None,
        )
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint="CHECKPOINT") from None
    except RecordError as error:
        raise typer.BadParameter(str(error), param_hint="--results") from None
    except CardError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        typer.echo(f"Error: the card was not written: {error}", err=True)
        raise typer.Exit(1) from None
    for remark in written.remarks:
        typer.echo(f"Note: {remark}.", err=True)
    pictures = "".join(f", {name}" for name in written.figures)
    typer.echo(f"{path}{f' with figures/{pictures[2:]}' if pictures else ''}")
