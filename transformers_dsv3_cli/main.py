"""The `transformers-dsv3` command and its verbs.

Verbs import torch, transformers and `transformers_dsv3` inside their functions: `--help` waits for none of them.
"""

from __future__ import annotations

import typer

from .bench import bench
from .card import card
from .compress import compress
from .evaluate import evaluate
from .explain import explain
from .export_gguf import export_gguf
from .filter import filter as filter_text
from .plan import plan
from .pull import pull
from .push import push
from .quickstart import quickstart
from .routing import routing
from .run import run
from .serve import serve
from .waiting import wait_less


wait_less()

app = typer.Typer(
    name="transformers-dsv3",
    help="""DeepSeek-V3 in Hugging Face Transformers: train, run, serve and inspect `deepseek_v3` checkpoints.

    New here? `transformers-dsv3 quickstart` trains a small DeepSeek-V3 on this machine in a few minutes
    and leaves an official checkpoint in ./dsv3-quickstart.""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # scripts started by `run` show their own tracebacks
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

# What follows the script's name belongs to that program, its own --help included.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

app.command(short_help="Train a small DeepSeek-V3 on real text, now.")(quickstart)
app.command(short_help="Run a script or module with the plugin registered.", context_settings=PASS_THROUGH)(run)
app.command(short_help="Serve a checkpoint to many at once: OpenAI's endpoints and a page.")(serve)
app.command(short_help="Measure speed here, beside native Transformers.")(bench)
app.command(short_help="Say which backend serves which part of a model.")(explain)
app.command(short_help="Report how evenly a model uses its experts on a text.")(routing)
app.command(short_help="Measure a checkpoint: text, routing, speed, lm-eval's tasks, HumanEval.")(evaluate)
app.command(short_help="Plan training on many GPUs: memory, time, idle time, days, money.")(plan)
app.command(short_help="Compress a checkpoint: fewer experts, 8, 4 or 3 bits a weight.")(compress)
app.command(name="filter", short_help="Keep the best part of a text, and say why the rest was dropped.")(filter_text)
app.command(short_help="Write a model card from a checkpoint's records.")(card)
app.command(name="export-gguf", short_help="Write a GGUF file for llama.cpp.")(export_gguf)
app.command(short_help="Upload a checkpoint or an adapter to the Hugging Face Hub.")(push)
app.command(short_help="Download a model from the Hub and check every file's hash.")(pull)


if __name__ == "__main__":
    app()
