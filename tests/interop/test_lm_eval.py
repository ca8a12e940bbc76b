"""lm-evaluation-harness: its `hf` model runs the plugin's class, with native's log-likelihoods."""

import json
import os
from pathlib import Path

import pytest

import transformers_dsv3


# Each of two programs reads 14,000 files of tasks first; of those that are not slow, tests/evaluation/test_harness.py
# compares the same log-likelihoods, and tests/cli/test_run.py says which class `run` gives a program
pytestmark = [pytest.mark.interop, pytest.mark.slow]

# Each names a data file beside it; the harness needs nothing from outside
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture
def tasks(tmp_path, text):
    """Lines of a text to complete by their own second half or by that of another line, and to score as a whole."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 30][:16]
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
    documents = [
        {"context": context, "choices": [ending, halves[i - 1][1]]} for i, (context, ending) in enumerate(halves)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, fields in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **fields,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def scores(folder):
    """Log-likelihood and, where the harness asks for it, greediness of every request; and the parameter count."""
    flat = []
    for task in TASKS:
        (file,) = folder.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        flat += [response for sample in samples for response in sample["filtered_resps"]]
    # (log-likelihood, greedy) of a choice; the log-likelihood alone of a text
    pairs = [(float(response), None) if isinstance(response, str) else response for response in flat]
    (file,) = folder.rglob("results_*.json")
    report = json.loads(file.read_text())
    metrics = {task: {k: v for k, v in report["results"][task].items() if "," in k} for task in TASKS}
    return (
        [float(value) for value, _ in pairs],
        [greedy for _, greedy in pairs],
        metrics,
        report["config"]["model_num_parameters"],
    )


def test_same_log_likelihoods(peer, save, tasks, tmp_path):
    harness = peer("DSV3_LM_EVAL_PYTHON", "lm_eval", "lm-eval")
    model = save(tmp_path / "saved", n_group=4, topk_group=2)
    package = str(Path(transformers_dsv3.__file__).parents[1])
    environment = {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HOME": str(tmp_path / "cache"),
    }
    launchers = {"native": ["-m", "lm_eval"], "plugin": ["-m", "transformers_dsv3.cli", "run", "lm_eval"]}
    for name, launcher in launchers.items():
        harness.run(
            *launcher,
            *("run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'saved'},dtype=float32"),
            *("--tasks", ",".join(TASKS), "--include_path", tasks, "--device", "cpu", "--batch_size", "4"),
            *("--output_path", tmp_path / name, "--log_samples"),
            **environment,
        )
    native, native_greedy, native_metrics, native_size = scores(tmp_path / "native")
    plugin, plugin_greedy, plugin_metrics, plugin_size = scores(tmp_path / "plugin")
    # The plugin's class has the MTP layer, native's has not
    assert plugin_size == model.num_parameters() > native_size
    assert len(plugin) == len(native) == 3 * len((tasks / "data.jsonl").read_text().splitlines()) > 30
    difference = max(abs(ours - theirs) for ours, theirs in zip(plugin, native))
    print(f"lm-eval: {len(plugin)} log-likelihoods, max |difference| {difference:.2e}, {plugin_metrics}")
    assert difference <= 1e-4
    assert plugin_greedy == native_greedy
    for task, metrics in native_metrics.items():
        assert plugin_metrics[task] == pytest.approx(metrics, abs=1e-4, nan_ok=True)
