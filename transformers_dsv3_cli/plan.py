"""`transformers-dsv3 plan`: what training a model takes on so many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .refusals import as_bad_parameters
from .training_plan_table import print_idle, print_plans, print_published, print_replay


def plan(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A config.json, a checkpoint's folder, or the name of a published model: deepseek-v3.",
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="How many.")] = None,
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h800, h200, b200 or mi300x.")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(metavar="GB", help="Of one, where it differs.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Of one in BF16, where they differ.")] = None,
    network: Annotated[float | None, typer.Option(metavar="GB/S", help="To other machines, of one GPU.")] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of one sequence.")] = 4096,
    global_batch: Annotated[int, typer.Option(help="Sequences of one optimizer step.")] = 15360,
    micro_batch: Annotated[int, typer.Option(help="Sequences of one forward pass.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Passes through the pipeline for one step.")] = 1,
    mtp: Annotated[bool, typer.Option(help="Train the MTP layers.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    tp: Annotated[
        int | None, typer.Option(help="Tensor parallel size. Default: whatever is fastest, as below.")
    ] = None,
    pp: Annotated[int | None, typer.Option(help="Ranks of the pipeline.")] = None,
    ep: Annotated[int | None, typer.Option(help="GPUs that share the experts.")] = None,
    schedule: Annotated[str | None, typer.Option(help="GPipe, 1F1B, Interleaved1F1B, ZBV or DualPipeV.")] = None,
    recompute: Annotated[str | None, typer.Option(help="none, selective or full.")] = None,
    fp8: Annotated[bool | None, typer.Option("--fp8/--bf16", help="What products are in.")] = None,
    tokens: Annotated[str, typer.Option(help="To train on: 14.8T, 300B, …")] = "14.8T",
    price_per_hour: Annotated[float, typer.Option(help="Dollars for one GPU.")] = 2.0,
    top: Annotated[int, typer.Option(help="How many ways to divide the GPUs to print.")] = 8,
    idle: Annotated[
        bool, typer.Option("--idle", help="Print idle time by schedule, size and cut of CONFIG's pipeline instead.")
    ] = False,
    published: Annotated[
        bool,
        typer.Option("--published", help="Print what is predicted for published runs beside their figures instead."),
    ] = False,
    replay: Annotated[
        Path | None, typer.Option(metavar="TRACE", help="Simulate the measured step of a JSON file instead.")
    ] = None,
    gantt: Annotated[
        Path | None,
        typer.Option(metavar="PATH.png", help="Draw the pipeline of the fastest, of --idle or of --replay."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the plans with all their figures.")] = None,
) -> None:
    """Plan the training of a model from its configuration: memory and time of a GPU, idle time, days and dollars.

    Every sensible split over tensor, pipeline, expert and data parallelism is looked at, with and without
    recomputation and FP8; of each way to divide the GPUs the fastest variant that fits is printed. Idle time is
    simulated: torch's own table of each schedule is run with the time of every stage. Where the pipeline is cut,
    between layers or between attention and network, is chosen by what shortens the step.

    Times are modelled: operations over the rates that GPUs reach, bytes over bandwidths. --published shows how far
    that is from runs that were published: within a fifth. Nothing is read but the configuration, and no GPU is needed.

    \b
    A TRACE is {"ranks": [[["0F0", start, end], …], …]}: by rank what it did and when, in seconds; a stage, then F
    (forward), I (gradient of inputs), W (of weights) or B (both), then a microbatch.

    \b
    Examples:
      transformers-dsv3 plan deepseek-v3 --gpus 2048 --gpu h800
      transformers-dsv3 plan deepseek-v3 --gpus 2048 --gpu h800 --tp 1 --pp 16 --ep 64 --gantt schedule.png
      transformers-dsv3 plan moonlight-16b-a3b --gpus 64 --tokens 1T --global-batch 2048 --price-per-hour 2.5
      transformers-dsv3 plan ./dsv3-quickstart --gpus 8 --global-batch 512 --sequence 1024 --tokens 10B
      transformers-dsv3 plan deepseek-v3 --idle
      transformers-dsv3 plan --published
    """
    from transformers_dsv3.compression.plan import model_config
    from transformers_dsv3.files import file_refusal, write_whole
    from transformers_dsv3.option_error import OptionError
    from transformers_dsv3.training.plan.gpus import find_gpu
    from transformers_dsv3.training.plan.idle import idle_table, idle_timelines
    from transformers_dsv3.training.plan.picture import gantt as draw
    from transformers_dsv3.training.plan.picture import picture_refusal
    from transformers_dsv3.training.plan.published import bills, compare
    from transformers_dsv3.training.plan.report import drawn, parse_tokens, write_plans
    from transformers_dsv3.training.plan.search import Wanted, fastest
    from transformers_dsv3.training.plan.splits import Workload
    from transformers_dsv3.training.plan.trace import replay as replayed

    with as_bad_parameters():
        for option, path in (("--gantt", gantt), ("--json", json)):
            if path is not None and (reason := file_refusal(path)) is not None:
                raise OptionError(option, reason)
        if gantt is not None and (reason := picture_refusal()) is not None:
            raise OptionError("--gantt", reason)
        asked = [name for name, value in (("--idle", idle), ("--published", published), ("--replay", replay)) if value]
        if len(asked) > 1:
            raise OptionError(asked[1], f"prints something else than {asked[0]}: give one of them")
        if not price_per_hour > 0:
            raise OptionError("--price-per-hour", f"must be above 0, not {price_per_hour}")
        timelines = []
        if published:
            comparisons = compare(model_config)
            print_published(comparisons, bills(comparisons[0].plan), price_per_hour)
        elif replay is not None:
            step = replayed(replay)
            print_replay(step)
            timelines = [("measured", step.measured), ("simulated", step.simulated)]
        elif config is None:
            raise OptionError("CONFIG", "is needed: a config.json, a folder, or the name of a published model")
        elif idle:
            print_idle(idle_table(model_config(config), sequence), config)
            timelines = idle_timelines(model_config(config), sequence) if gantt is not None else []
        else:
            if gpus is None:
                raise OptionError("--gpus", "is needed")
            trained_on = parse_tokens(tokens)
            which = find_gpu(gpu, gpu_memory, gpu_tflops, network)
            workload = Workload(
                model_config(config), sequence, global_batch, micro_batch, accumulation, mtp, optimizer
            )
            plans = fastest(workload, gpus, which, Wanted(tp, pp, ep, schedule, recompute, fp8), top)
            print_plans(plans, config, trained_on, price_per_hour)
            if json is not None:
                write_plans(json, plans, trained_on, price_per_hour)
            timelines = drawn(plans[0])
        if gantt is not None:
            if not timelines:
                raise OptionError("--gantt", "there is no pipeline to draw")
            write_whole(gantt, draw(timelines, "operations of one token" if idle else "seconds"))
            typer.echo(f"The schedule is in {gantt}.")
