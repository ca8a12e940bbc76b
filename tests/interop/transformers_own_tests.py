"""Transformers' own tests of models, on native's `deepseek_v3` classes and on the plugin's, compared test by test.

    python tests/interop/transformers_own_tests.py FOLDER [pytest options]

Downloads the source package of the Transformers that is installed (its wheel has no tests) into FOLDER, and runs all
of `ModelTesterMixin` of its `tests/test_modeling_common.py` twice, each time in a process of its own. The source
package leaves out the mixins for generation and export, whose places are kept empty. Prints every test that only one
of the two passes, and exits with 1 where native's classes pass one that the plugin's do not.
"""

import argparse
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree


# What the mixin asks of a tester: a small model's config, and inputs for it
TESTS = """
import unittest

import torch

PLUGIN = {plugin!r}
if PLUGIN:
    import transformers_dsv3 as package
else:
    import transformers as package

from ..test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask


class Tester:
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    num_labels, pad_token_id = 3, 0
    base_model_class = package.DeepseekV3Model
    causal_lm_class = package.DeepseekV3ForCausalLM
    config_class = package.DeepseekV3Config

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=32, moe_intermediate_size=16,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=16,
            q_lora_rank=32, qk_rope_head_dim=16, v_head_dim=32, qk_nope_head_dim=32, n_group=2, topk_group=1,
            num_experts_per_tok=4, first_k_dense_replace=1, max_position_embeddings=512, initializer_range=0.02,
            pad_token_id=self.pad_token_id, bos_token_id=1, eos_token_id=2, num_mtp_layers=0,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {{
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3,
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }}
        return self.get_config(), inputs


class DeepseekV3ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        package.DeepseekV3Model,
        package.DeepseekV3ForCausalLM,
        package.DeepseekV3ForSequenceClassification,
        package.DeepseekV3ForTokenClassification,
    )
    all_generative_model_classes = (package.DeepseekV3ForCausalLM,)
    test_all_params_have_gradient = False  # not of experts that no token chose
    test_can_init_all_missing_weights_before_2023 = True  # whatever year a file tells
    model_split_percents = [0.5, 0.7, 0.8]

    def setUp(self):
        self.model_tester = Tester(self)

    def is_pipeline_test_to_skip(self, *args, **kwargs):
        return True
"""


def unpack(folder: Path) -> Path:
    """The tests of the installed Transformers, with empty places for what its source package leaves out."""
    name = f"transformers-{version('transformers')}"
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
        subprocess.run([sys.executable, "-m", *command, "--dest", str(folder), name.replace("-", "==")], check=True)
    with tarfile.open(archive) as source:
        members = [m for m in source.getmembers() if re.match(rf"{re.escape(name)}/tests/", m.name)]
        source.extractall(folder, members, filter="data")
    tests = folder / name / "tests"
    for place, mixin in (
        ("exporters/test_export", "ExportTesterMixin"),
        ("generation/test_utils", "GenerationTesterMixin"),
    ):
        file = tests / f"{place}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"class {mixin}:\n    pass\n", encoding="utf-8")
    for package in (tests, tests / "exporters", tests / "generation", tests / "dsv3"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    return tests


def outcomes(tests: Path, plugin: bool, options: list[str]) -> dict[str, str]:
    """What became of each test: "passed", "failed" or "skipped"."""
    which = "plugin" if plugin else "native"
    file = tests / "dsv3" / f"test_{which}.py"
    file.write_text(TESTS.format(plugin=plugin), encoding="utf-8")
    report = tests.parent / f"{which}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", "-p", "no:cacheprovider"]
    log = tests.parent / f"{which}.log"
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            [*command, "--rootdir", str(tests.parent), str(file), *options],
            cwd=tests.parent,
            stdout=output,
            stderr=output,
        )
    if not report.exists():
        raise SystemExit(f"no test ran, see {log}")
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.get("name", "")] = outcome
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the source package, the reports and the logs")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="for pytest, such as -k rope")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = unpack(folder)
    native, plugin = (outcomes(tests, which, arguments.options) for which in (False, True))
    for name, found in (("native", native), ("plugin", plugin)):
        counts = {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(name, ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    lost = [name for name, outcome in native.items() if outcome == "passed" and plugin.get(name) != "passed"]
    won = [name for name, outcome in plugin.items() if outcome == "passed" and native.get(name) != "passed"]
    for what, names in (("only native passes", lost), ("only the plugin passes", won)):
        print(f"{what}: {', '.join(names) or 'none'}")
    return 1 if lost or not plugin else 0


if __name__ == "__main__":
    sys.exit(main())
