"""What does not need torch does not wait for it, and importing the plugin brings nothing that native does not need.

Modules are compared, not times: a busy machine changes no result.
"""

import json
import os
import subprocess
import sys

import pytest

from transformers_dsv3_cli.main import app


VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]
HEAVY = {"torch", "transformers", "transformers_dsv3"}
NATIVE = "from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM"


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600, check=True
    ).stdout


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS)], ids=lambda words: " ".join(words) or "none")
def test_help_waits_for_nothing_heavy(words):
    code = (
        "import json, sys, time\n"
        "from transformers_dsv3_cli.main import app\n"
        "app([*sys.argv[1:], '--help'], prog_name='transformers-dsv3', standalone_mode=False)\n"
        "print()\n"
        "print(json.dumps({'seconds of CPU': round(time.process_time(), 2), 'modules': sorted(sys.modules)}))"
    )
    text, last = run(code, *words).rstrip().rsplit("\n", 1)
    assert f"Usage: {' '.join(['transformers-dsv3', *words])}" in text
    answer = json.loads(last)
    print(words, answer["seconds of CPU"], "s of CPU")
    assert not HEAVY & set(answer["modules"])


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}], ids=str)
def test_threads_wait_a_moment_unless_told_otherwise(given):
    code = (
        "import os, sys, transformers_dsv3_cli.main\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    others = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.run([sys.executable, "-c", code], env=others | given, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == {"{}": "5000", "{'GOMP_SPINCOUNT': '77'}": "77"}.get(str(given), "None")


def test_the_verbs_are_those_of_the_command():
    assert len(VERBS) == 14 and "quickstart" in VERBS


def test_importing_brings_no_module_of_others_but_natives():
    code = (
        "import json, sys, time\n"
        f"{NATIVE}\n"
        "native, before = time.process_time(), set(sys.modules)\n"
        "import transformers_dsv3\n"
        "whole = time.process_time()\n"
        "assert transformers_dsv3.is_registered()\n"
        "print(json.dumps([native, whole, sorted(set(sys.modules) - before)]))"
    )
    native, whole, brought = json.loads(run(code))
    print(f"{whole:.2f} s of CPU beside native's {native:.2f}: {whole / native:.3f} times")
    others = [name for name in brought if name.split(".")[0] != "transformers_dsv3"]
    # Transformers' table of GGUF configs, which imports nothing
    assert others in ([], ["transformers.integrations.gguf.gguf_config_mapping"])
    # What only asks, trains, measures or shares comes when it is named
    parts = {".".join(name.split(".")[1:2]) for name in brought if name not in others}
    assert parts <= {"", "compression", "generation", "imports", "kernels", "memory", "models", "registration"}
    assert not {"transformers_dsv3.kernels.explain", "transformers_dsv3.generation.engine"} & set(brought)


# Each in a process of its own, since PEFT is imported once; LoHa's default argument is made when PEFT is imported
TUNERS = "print(table[peft.PeftType.LORA].__module__.split('.')[0], HadaWeight.forward.__defaults__[0].device)\n"
PEFT = (
    "print('peft' in sys.modules)\n"
    "import peft\n"
    "from peft import PEFT_TYPE_TO_TUNER_MAPPING as table\n"
    "from peft.tuners.loha.layer import HadaWeight\n"
) + TUNERS  # fmt: skip


def test_pefts_tuners_come_with_peft():
    code = (
        "import importlib.util, pickle, sys, torch, transformers_dsv3\n"
        "from transformers.utils import is_peft_available\n"
        "config = pickle.loads(pickle.dumps(transformers_dsv3.DeepseekV3Config(num_hidden_layers=3)))\n"
        "print(is_peft_available(), importlib.util.find_spec('peft').origin[-16:])\n"
        f"{PEFT}"
        f"transformers_dsv3.unregister()\n{TUNERS}"
        f"transformers_dsv3.register()\n{TUNERS}"
        "import inspect\n"
        "loaders = peft.__loader__, peft.__spec__.loader\n"
        "print(*(type(loader).__name__ for loader in loaders), len(inspect.getsource(peft)) > 99)\n"
        "print([finder for finder in sys.meta_path if getattr(finder, 'name', '') == 'peft'])\n"
    )
    assert run(code).splitlines() == [
        *("True peft/__init__.py", "False", "transformers_dsv3 cpu"),
        *("peft cpu", "transformers_dsv3 cpu"),
        *("SourceFileLoader SourceFileLoader True", "[]"),
    ]


def test_pefts_tuners_come_at_once_where_peft_is_there():
    code = f"import peft, sys, transformers_dsv3\n{PEFT}"
    assert run(code).split() == ["True", "transformers_dsv3", "cpu"]


def test_pefts_tuners_stay_its_own_where_the_plugin_is_taken_away_before():
    code = f"import sys, transformers_dsv3\ntransformers_dsv3.unregister()\n{PEFT}"
    assert run(code).split() == ["False", "peft", "cpu"]


def test_pefts_tuners_come_where_two_threads_import_it():
    code = (
        "import sys, threading, transformers_dsv3\n"
        "found = []\n"
        "def bring():\n"
        "    import peft\n"
        "    found.append(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__module__.split('.')[0])\n"
        "threads = [threading.Thread(target=bring) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(*found)\n"
    )
    assert run(code).split() == ["transformers_dsv3"] * 2
