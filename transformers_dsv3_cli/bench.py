"""`transformers-dsv3 bench`: how fast a model runs here, beside native Transformers and other programs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from rich.console import Console


def bench(
    source: Annotated[
        str,
        typer.Argument(
            metavar="[CHECKPOINT_OR_PRESET]",
            help="A folder, a repository id on the Hub, or a model of random weights: bench-2b (1.94 B parameters, "
            "5 GiB in bf16), moonlight (the shape of Moonlight-16B-A3B, cut to fit memory), small (107 M parameters).",
            show_default=True,
        ),
    ] = "bench-2b",
    what: Annotated[
        str,
        typer.Option(
            help="Any of decode, prefill, batched, mtp, train, load (to the first token, in a process of its own); of "
            "one layer by itself, experts and attention; serving, many clients at a time."
        ),
    ] = "decode,prefill",
    device: Annotated[
        str, typer.Option(help="cpu, cuda (a GPU, NVIDIA's or AMD's), or auto: a GPU where torch sees one.")
    ] = "auto",
    contenders: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Only these of plugin, plugin static, plugin MTP, transformers, transformers static (and plugin int8 "
            "and the like, as --weights says). Default: all, static ones on a GPU only.",
        ),
    ] = "",
    contexts: Annotated[
        str, typer.Option(help="Cached tokens at which decoding is timed; k is 1,024. mtp takes the smallest.")
    ] = "128,1k,8k",
    prefill: Annotated[str, typer.Option(help="Lengths of the prompts of prefill.")] = "2k",
    batch: Annotated[str, typer.Option(help="Batch sizes of batched decode.")] = "32",
    batch_context: Annotated[str, typer.Option(help="Cached tokens a row of batched decode.")] = "1k",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or both.")] = "bf16",
    weights: Annotated[
        str,
        typer.Option(
            help="Forms of the plugin's weights, any of plain, int8 and int4 (in groups of 32, activations rounded to "
            "8 bits), int8-whole-activations and int4-whole-activations."
        ),
    ] = "plain",
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 6,
    new_tokens: Annotated[int, typer.Option(help="Tokens timed in a turn of decoding, fewer where slow.")] = 16,
    train_batch: Annotated[int, typer.Option(help="Sequences of a training step.")] = 4,
    train_length: Annotated[int, typer.Option(help="Tokens of each sequence of a training step.")] = 512,
    expert_tokens: Annotated[str, typer.Option(help="Tokens that experts are given.")] = "1,32,4k",
    attention: Annotated[
        str, typer.Option(metavar="ROWSxTOKENS,...", help="Rows and cached tokens of attention.")
    ] = "1x8k,64x8k",
    clients: Annotated[str, typer.Option(help="Clients that ask at a time, of serving.")] = "1,10,100,300",
    static_batches: Annotated[str, typer.Option(help="Sizes of static batches, of serving.")] = "8,32,64,100",
    lengths: Annotated[
        str,
        typer.Option(metavar="PROMPT,OUTPUT", help="Mean tokens of the prompts and of the answers, of serving."),
    ] = "140,59",
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME=PYTHON,...",
            help="Other programs, vllm, llama.cpp and ik_llama.cpp, each with the interpreter that has it.",
        ),
    ] = "",
    converter: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="llama.cpp's convert_hf_to_gguf.py. Default: llama.cpp/ beside the bin/ of its interpreter.",
        ),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files that other programs read in this folder.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of a preset. Default: all, or what fits memory.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of every contender. Default: torch's own choice.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights, tokens and cached latents.")] = 0,
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write everything measured, updated after every round.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH.png", help="Draw the result.")] = None,
) -> None:
    """Measure how fast a DeepSeek-V3 model runs on this machine, beside native Transformers.

    Both implementations run in this process on the same weights and take turns (A B, B A, ...), and between the turns
    the machine's own ceilings are measured: how fast its memory reads and how fast it multiplies matrices. The table
    gives the median of each, its quartiles, how many times faster it is, its share of the floor (the time that
    reading the weights once, or computing what must be computed, takes at those ceilings), and of decoding the host's
    time a step beside its kernels, with how many it calls. Of a checkpoint with a tokenizer it also says how many bits
    a byte each form of the weights needs, on text that quickstart holds out.

    Decoding is the model's own generate(), from a cache that already holds the context. Run it on a machine that does
    nothing else.

    On a GPU (--device) both also decode with cache_implementation="static", for which Transformers compiles the steps
    and replays CUDA graphs; what compiling took is told apart. Times are those of events on the GPU, and the ceilings
    are its own copies and matrix products. With --what experts,attention each backend runs these parts of one layer by
    themselves, beside the error of each against float64.

    --what serving has clients ask for answers at a time, each for its next one when it has the last (--clients), and
    measures the engine's dynamic batches beside static batches of generate (--static-batches): tokens a second, and
    the time from asking to the end for each token of an answer. All static batches take the first round, and the best
    of them goes on beside the engine.

    --against runs other programs too, in their own interpreters and between the same turns: vLLM's CPU build on the
    checkpoint, llama.cpp on GGUF files (bf16, Q8_0, Q4_0) that its own programs make of it, ik_llama.cpp on the same
    files. They run on the CPU, with bf16 only. One that fails is reported with its reason.

    \b
    Examples:
      transformers-dsv3 bench small
      transformers-dsv3 bench bench-2b --contexts 128,1k,8k,32k --json bench.json --plot bench.png
      transformers-dsv3 bench ./dsv3-quickstart --what decode,mtp --contexts 128
      transformers-dsv3 bench bench-2b --weights plain,int8 --contexts 128,1k
      transformers-dsv3 bench bench-2b --what batched --batch 8,32
      transformers-dsv3 bench small --what train --dtype fp32
      transformers-dsv3 bench small --what serving --rounds 2 --json serving.json --plot serving.png
      transformers-dsv3 bench moonlight --device cuda --contexts 1k,8k --what decode,batched,prefill
      transformers-dsv3 bench moonlight --device cuda --what experts,attention
      transformers-dsv3 bench bench-2b --against vllm=~/vllm/bin/python,llama.cpp=~/llama/bin/python
    """
    from transformers_dsv3.benchmark.settings import BenchSettings, interpreters, names, numbers, shapes
    from transformers_dsv3.option_error import OptionError

    with as_bad_parameters():
        cached = numbers("--batch-context", batch_context)
        if len(cached) != 1:
            raise OptionError("--batch-context", f"{batch_context!r} is not one number")
        settings = BenchSettings(
            source=source,
            what=names(what),
            device=device,
            contenders=names(contenders),
            contexts=numbers("--contexts", contexts),
            prefill=numbers("--prefill", prefill),
            batches=numbers("--batch", batch),
            batch_context=cached[0],
            dtypes=names(dtype),
            weights=names(weights),
            rounds=rounds,
            new_tokens=new_tokens,
            train_batch=train_batch,
            train_length=train_length,
            expert_tokens=numbers("--expert-tokens", expert_tokens),
            attention=shapes("--attention", attention),
            clients=numbers("--clients", clients),
            static_batches=numbers("--static-batches", static_batches),
            lengths=numbers("--lengths", lengths),
            peers=interpreters(against),
            converter=converter,
            keep=keep,
            layers=layers,
            threads=threads,
            seed=seed,
            json_path=json,
            plot_path=plot,
        )
        run_bench(settings)


def run_bench(settings: Any) -> None:
    """Run, print the table, draw the plot. An interruption prints what there is.

    Raises:
        OptionError: for settings that cannot be measured, before anything is computed.
    """
    from rich.console import Console

    from transformers_dsv3.benchmark.report import plot
    from transformers_dsv3.benchmark.serving_report import plot_serving
    from transformers_dsv3.evaluation.routing_plot import plot_refusal
    from transformers_dsv3.option_error import OptionError

    if settings.plot_path is not None and (refusal := plot_refusal()) is not None:
        raise OptionError("--plot", refusal)

    from transformers_dsv3.benchmark.benchmark import Benchmark

    console = Console(stderr=True)
    interrupted = False
    with Bar(console) as bar:
        benchmark = Benchmark(settings, bar)
        for warning in benchmark.results["warnings"]:
            console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
        # A request to end leaves no gigabytes of files behind, as Ctrl-C leaves none
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            benchmark.run()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGTERM, before)
    show(benchmark.results)
    if settings.plot_path is not None and any(entry["contenders"] for entry in benchmark.results["workloads"]):
        plot(benchmark.results, settings.plot_path)
    if settings.plot_path is not None and any(entry["contenders"] for entry in benchmark.results.get("serving", ())):
        alone = not benchmark.results["workloads"]
        path = settings.plot_path
        plot_serving(benchmark.results, path if alone else path.with_stem(f"{path.stem}-serving"))
    if interrupted:
        typer.echo("Stopped: the rounds above are those that were complete.", err=True)
        raise typer.Exit(130)


class Bar:
    """A progress bar on a terminal; nothing anywhere else."""

    def __init__(self, console: Console):
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading and saving, which would break into this one

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.shown = console.is_terminal
        self.task = self.progress.add_task("starting", total=None)
        self.begun = 0

    def __enter__(self) -> Bar:
        if self.shown:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.shown:
            self.progress.stop()

    def say(self, message: str) -> None:
        self.progress.update(self.task, description=message)

    def plan(self, turns: int) -> None:
        self.begun = 0
        self.progress.reset(self.task, total=turns)

    def turn(self, workload: str, contender: str) -> None:
        # Called when a turn starts: the ones before it are done
        self.progress.update(self.task, description=f"{workload}: {contender}", completed=self.begun)
        self.begun += 1


def show(results: dict[str, Any]) -> None:
    """Print the table and what belongs below it."""
    from rich.console import Console
    from rich.table import Table

    from transformers_dsv3.benchmark.report import HEADINGS, KERNEL_HEADINGS, kernel_rows, notes, table_rows
    from transformers_dsv3.benchmark.serving_report import SERVING_HEADINGS, serving_rows

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a file or a pipe has no width of its own, and 80 columns break every cell
    for headings, rows in (
        (KERNEL_HEADINGS, list(kernel_rows(results))),
        (SERVING_HEADINGS, list(serving_rows(results))),
        (HEADINGS, list(table_rows(results))),
    ):
        if rows:
            table = Table(*headings)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in notes(results):
        console.print(line, highlight=False, soft_wrap=True)
