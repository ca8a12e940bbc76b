"""`transformers-dsv3 run`: any script or module, with the plugin registered."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer


# Modules and programs that start others: what these load would be Transformers' own, and nothing would say so.
LAUNCHERS = frozenset({"accelerate", "accelerate-launch", "deepspeed", "torchrun", "trl"})
LAUNCHER_PACKAGES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands",
    "deepspeed",
    "trl.cli",  # `trl sft` is `accelerate launch`; trl.scripts.sft is the script itself
)
LAUNCHER_MESSAGE = (
    "{target} starts processes of its own, where the plugin is not registered. Let it start this command instead:\n"
    "  torchrun --nproc_per_node 2 -m transformers_dsv3.cli run script.py …\n"
    "  accelerate launch -m transformers_dsv3.cli run script.py …"
)


def run(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT_OR_MODULE",
            help="A path to a Python script, or the name of a module as for `python -m`.",
        ),
    ],
) -> None:
    """Run a script or module with the plugin registered, so that whatever it loads as `deepseek_v3` is the plugin's.

    Everything after SCRIPT_OR_MODULE is passed to it untouched, options included. A name that ends in .py, has a
    slash in it or is that of a file here is a script; anything else is a module.

    \b
    Examples:
      transformers-dsv3 run my_training.py --learning_rate 1e-4
      transformers-dsv3 run trl.scripts.sft --help
      transformers-dsv3 run lm_eval --model hf --tasks arc_easy \\
        --model_args pretrained=./dsv3-quickstart
      torchrun --nproc_per_node 2 -m transformers_dsv3.cli run my_training.py
    """
    if target == "-m":
        module = context.args[0] if context.args else "MODULE"
        raise typer.BadParameter(f"leave -m out: transformers-dsv3 run {module}", param_hint="SCRIPT_OR_MODULE")
    if target.startswith("-"):
        raise typer.BadParameter(
            f"{target!r} comes before the script or module; its options go behind it", param_hint="SCRIPT_OR_MODULE"
        )
    if _is_launcher(target):
        raise typer.BadParameter(LAUNCHER_MESSAGE.format(target=target), param_hint="SCRIPT_OR_MODULE")
    is_script = target.endswith(".py") or "/" in target or "\\" in target or Path(target).is_file()
    if is_script and not Path(target).is_file():
        raise typer.BadParameter(f"no such script: {target}", param_hint="SCRIPT_OR_MODULE")
    # As `python` does: a script finds its neighbours, a module the files of the current folder.
    sys.path[0:0] = [str(Path(target).resolve().parent) if is_script else ""]
    if not is_script and not _module_exists(target):
        raise typer.BadParameter(
            f"no module named {target!r} in this environment and no such file",
            param_hint="SCRIPT_OR_MODULE",
        )

    import transformers_dsv3

    transformers_dsv3.register(names=True)
    sys.argv = [target, *context.args]
    if is_script:
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def _is_launcher(target: str) -> bool:
    if "/" in target or "\\" in target:
        return Path(target).name in LAUNCHERS
    return target in LAUNCHERS or any(f"{target}.".startswith(f"{package}.") for package in LAUNCHER_PACKAGES)


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
