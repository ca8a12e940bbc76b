"""Tasks of lm-evaluation-harness: native's log-likelihoods, the harness's own figures, and what is refused early."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from transformers_dsv3 import Dsv3ForCausalLM
from transformers_dsv3.evaluation import harness
from transformers_dsv3.evaluation.evaluation_record import read_record
from transformers_dsv3.evaluation.harness import TaskError, TaskSuite, harness_model, harness_refusal, task_entries
from transformers_dsv3.evaluation.held_out_text import read_texts
from transformers_dsv3.evaluation.quickstart import run_quickstart
from transformers_dsv3.evaluation.quickstart_report import native_model
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3_cli.main import app


lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.usefixtures("one_task_index")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Neither a network nor data that were loaded before."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    """The bytes that `trained_model` was trained on: each token's id is its byte."""
    tokens = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def suite(harness_tasks):
    return TaskSuite(["halves", "halves_text"], [harness_tasks])


def documents(harness_tasks):
    return [json.loads(line) for line in (harness_tasks / "halves.jsonl").read_text().splitlines()]


def responses(results, task):
    return [r for s in sorted(results["samples"][task], key=lambda s: s["doc_id"]) for r in s["filtered_resps"]]


def log_probability(model, context, target):
    """Sum over the target's tokens, in float64, from one pass over exactly these tokens."""
    ids = torch.tensor([context + target])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].double()
    chosen = logits.log_softmax(-1)[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
    return float(chosen[-len(target) :].sum())


def largest_difference(plugin, native, tokenizer, suite):
    """Of the log-likelihoods of both models, how many there were; all else that the harness asks must be the same."""
    assert type(native) is DeepseekV3ForCausalLM and isinstance(plugin, Dsv3ForCausalLM)
    wrapped = [harness_model(model, tokenizer, 4) for model in (plugin, native)]
    largest, count = 0.0, 0
    for group, task in (("halves", "halves_choice"), ("halves_text", "halves_text")):
        ours, theirs = (responses(suite.run(group, model), task) for model in wrapped)
        for one, other in zip(ours, theirs, strict=True):
            one, other = (pair if isinstance(pair, (tuple, list)) else (pair, None) for pair in (one, other))
            largest, count = max(largest, abs(one[0] - other[0])), count + 1
            assert one[1] == other[1]
    ours, theirs = (responses(suite.run("halves", model), "halves_writing") for model in wrapped)
    assert ours == theirs
    return largest, count


def test_log_likelihoods_are_natives(trained_model, native_twin, tokenizer, suite, measured):
    largest, count = largest_difference(trained_model, native_twin(trained_model), tokenizer, suite)
    measured["lm-eval: largest difference of log-likelihoods to native"] = largest
    assert largest <= 1e-4 and count == 3 * 16


@pytest.mark.slow
def test_log_likelihoods_are_natives_on_the_quickstarts_model(tmp_path, write_harness_tasks, measured):
    """Of its size, tokenizer and text, after 100 of its steps."""
    folder = tmp_path / "dsv3-quickstart"
    run_quickstart(folder, text=None, steps=100, seed=None, settings=QuickstartSettings())
    held_out = [line for text in read_texts(None)[1] for line in text.splitlines() if 40 <= len(line.strip())]
    write_harness_tasks(tmp_path, held_out[:: len(held_out) // 300])
    suite = TaskSuite(["halves", "halves_text"], [tmp_path])
    plugin, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    command = ["evaluate", str(folder), "--what", "none", "--tasks", ",".join(suite.names), "--batch-size", "4"]
    command += ["--include-path", str(tmp_path), "--json", str(tmp_path / "evaluation.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = read_record(tmp_path / "evaluation.json")
    with native_model(folder) as native:
        largest, count = largest_difference(plugin, native, tokenizer, suite)
        # And what the command says of them
        wrapped = harness_model(native, tokenizer, 4)
        entries = {n: e for name in suite.names for n, e in task_entries(suite.run(name, wrapped)).items()}
    assert record.tasks.keys() == entries.keys()
    for name, entry in entries.items():
        values = {metric: figure["value"] for metric, figure in entry["metrics"].items()}
        found = {metric: figure["value"] for metric, figure in record.tasks[name]["metrics"].items()}
        assert found == pytest.approx(values, rel=1e-4)
    measured["lm-eval on the quickstart's model: largest difference of log-likelihoods to native"] = largest
    assert largest <= 1e-4 and count >= 900


def test_log_likelihoods_are_the_models(trained_model, tokenizer, harness_tasks, suite):
    """Made again without the harness, and the figures from them."""
    wrapped = harness_model(trained_model, tokenizer, 3)
    choice = suite.run("halves", wrapped)
    expected = []
    for document in documents(harness_tasks):
        # Blanks between the two belong to what is predicted, by the harness's rule
        start = document["start"].rstrip()
        blanks = document["start"][len(start) :]
        ends = [list((blanks + end).encode()) for end in document["ends"]]
        expected.append([log_probability(trained_model, list(start.encode()), end) for end in ends])
    found = [value for value, _ in responses(choice, "halves_choice")]
    assert found == pytest.approx([value for pair in expected for value in pair], abs=1e-4)

    entry = task_entries(choice)["halves_choice"]
    right = [pair[0] > pair[1] for pair in expected]
    share = sum(right) / len(right)
    metric = entry["metrics"]["acc,none"]
    assert metric["value"] == share and metric["higher_is_better"] is True
    assert metric["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert entry["n"] == entry["n_total"] == len(right) and entry["num_fewshot"] == 0 and entry["version"] == 1.5
    assert entry["dataset"] == "json" and entry["subtasks"] == []

    whole = task_entries(suite.run("halves_text", wrapped))["halves_text"]
    lines = [(document["start"] + document["ends"][0]).encode() for document in documents(harness_tasks)]
    end = tokenizer.eos_token_id  # what the harness puts before a text where there is no token for a beginning
    nats = -sum(log_probability(trained_model, [end], list(line)) for line in lines)
    perplexity = math.exp(nats / sum(map(len, lines)))
    assert whole["metrics"]["byte_perplexity,none"]["value"] == pytest.approx(perplexity, rel=1e-5)
    assert whole["metrics"]["byte_perplexity,none"]["higher_is_better"] is False


def test_groups_limits_examples_and_seeds(trained_model, tokenizer, harness_tasks):
    wrapped = harness_model(trained_model, tokenizer, 8)

    def run(**options):
        suite = TaskSuite(["halves"], [harness_tasks])
        assert suite.members("halves") == {"halves", "halves_choice", "halves_writing"}
        return suite.run("halves", wrapped, limit=5, **options)

    results = run(num_fewshot=2)
    entries = task_entries(results)
    assert entries["halves"]["subtasks"] == ["halves_choice", "halves_writing"]
    assert (
        entries["halves"]["metrics"]["acc,none"]["value"] == entries["halves_choice"]["metrics"]["acc,none"]["value"]
    )
    assert (entries["halves_choice"]["n"], entries["halves_choice"]["n_total"]) == (5, 16)
    group = entries["halves"]
    assert (group["n"], group["n_total"], group["num_fewshot"], group["dataset"]) == (10, 32, 2, "json")
    assert entries["halves_choice"]["num_fewshot"] == 2
    prompt = results["samples"]["halves_choice"][0]["arguments"][0][0]
    assert prompt.count("\n\n") == 2
    assert task_entries(run(num_fewshot=2)) == entries
    other = task_entries(run(num_fewshot=2, seed=1))
    assert other["halves_choice"]["samples_sha256"] != entries["halves_choice"]["samples_sha256"]  # other examples


def test_the_checkpoints_own_generation_settings_stay_out(trained_model, tokenizer, suite):
    """The quickstart's checkpoints stop after 64 tokens, which would cut answers that tasks ask for."""
    wrapped = harness_model(trained_model, tokenizer, 8)
    expected = responses(suite.run("halves", wrapped), "halves_writing")
    assert {len(text.encode()) for text in expected} == {24}
    trained_model.generation_config.update(max_new_tokens=4, do_sample=True, temperature=5.0)
    own = trained_model.generation_config
    assert responses(suite.run("halves", wrapped), "halves_writing") == expected
    assert trained_model.generation_config is own


def test_prompts_that_are_cut_are_told(make_model, tokenizer, suite):
    for positions, cut in ((512, False), (80, True)):
        model = make_model(vocab_size=258, max_position_embeddings=positions)
        entries = task_entries(suite.run("halves", harness_model(model, tokenizer, 8), num_fewshot=1))
        assert {entry["truncated"] for entry in entries.values()} == {cut}


def test_a_context_that_is_too_short(make_model, tokenizer, harness_tasks):
    model = harness_model(make_model(vocab_size=258, max_position_embeddings=16), tokenizer, 8)
    with pytest.raises(TaskError, match="halves_choice cannot be run on this model: .* the model's 16 positions"):
        TaskSuite(["halves_choice"], [harness_tasks]).run("halves_choice", model)
    with pytest.raises(TaskError, match=r"halves_writing cannot be run .* max tokens to generate \(24\)"):
        TaskSuite(["halves_writing"], [harness_tasks]).run("halves_writing", model)


def test_files_and_patterns(harness_tasks):
    path = str(harness_tasks / "halves_text.yaml")
    assert TaskSuite([path]).members(path) == {"halves_text"}
    assert TaskSuite(["halves_*"], [harness_tasks]).names == ["halves_choice", "halves_text", "halves_writing"]


def test_names_that_are_wrong(harness_tasks):
    with pytest.raises(TaskError, match="no task 'gsm8' in lm-evaluation-harness; near it are gsm8k"):
        TaskSuite(["gsm8"])
    with pytest.raises(
        TaskError, match=f"no task 'halfs_text' in lm-evaluation-harness, {harness_tasks}; .*halves_text"
    ):
        TaskSuite(["halfs_text"], [harness_tasks])
    with pytest.raises(TaskError, match=r"no task 'zzzz\*' in lm-evaluation-harness$"):
        TaskSuite(["zzzz*"])
    with pytest.raises(TaskError, match="halves_text is named twice"):
        TaskSuite(["halves_text", "halves_text"], [harness_tasks])
    with pytest.raises(TaskError, match="Duplicate task 'halves_choice': found in both"):
        TaskSuite(["halves_choice", "halves"], [harness_tasks])


@pytest.mark.parametrize(("task", "repository"), [("gsm8k", "openai/gsm8k"), ("mmlu", "cais/mmlu")])
def test_data_that_cannot_be_reached(offline, task, repository):
    fetch = f"`hf download --repo-type dataset {repository} --local-dir {repository}`"
    with pytest.raises(TaskError, match=f"{task}: its data cannot be loaded: Couldn't reach '{repository}'") as caught:
        TaskSuite([task])
    assert fetch in str(caught.value) and "HF_HUB_OFFLINE=1" in str(caught.value)


def test_gsm8k_runs_on_what_the_advice_fetches(offline, trained_model, tokenizer):
    """The layout of the repository on the Hub, with questions of our own."""
    folder = offline / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    splits = {"train": 8, "test": 3}
    for split, count in splits.items():
        rows = [{"question": f"What is {n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(count)]
        (folder / "main" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    suite = TaskSuite(["gsm8k"])
    entry = task_entries(suite.run("gsm8k", harness_model(trained_model, tokenizer, 3), num_fewshot=1))["gsm8k"]
    assert set(entry["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert (entry["n"], entry["num_fewshot"], entry["dataset"]) == (3, 1, "openai/gsm8k")


@pytest.mark.slow
def test_mmlu_runs_on_what_the_advice_fetches(offline, trained_model, tokenizer):
    """57 subjects, each with a configuration of its own, in groups of groups."""
    index = lm_eval.tasks.TaskManager(include_path=[]).task_index
    subjects = sorted({index[name].cfg["dataset_name"] for name in index if is_mmlu_subject(index[name])})
    assert len(subjects) == 57
    configs = ""
    for subject in subjects:
        folder = offline / "cais" / "mmlu" / subject
        folder.mkdir(parents=True)
        configs += f"- config_name: {subject}\n  data_files:\n"
        for split, count in (("test", 2), ("dev", 5)):
            rows = [{"question": f"{n}?", "choices": list("abcd"), "answer": n % 4} for n in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            configs += f"  - split: {split}\n    path: {subject}/{split}.jsonl\n"
    (offline / "cais" / "mmlu" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    suite = TaskSuite(["mmlu"])
    entries = task_entries(suite.run("mmlu", harness_model(trained_model, tokenizer, 8), num_fewshot=1))
    whole = entries["mmlu"]
    assert set(entries) == suite.members("mmlu") and len(entries) == 57 + 4 + 1
    assert (whole["n"], whole["n_total"], whole["num_fewshot"], whole["dataset"]) == (114, 114, 1, "cais/mmlu")
    accuracy = [entry["metrics"]["acc,none"]["value"] for entry in entries.values() if not entry["subtasks"]]
    assert whole["metrics"]["acc,none"]["value"] == pytest.approx(sum(accuracy) / 57)
    assert whole["metrics"]["acc,none"]["higher_is_better"] is True


def is_mmlu_subject(entry):
    return str(entry.yaml_path).replace("\\", "/").find("/mmlu/default/mmlu_") > 0 and entry.kind.name == "TASK"


def test_tasks_that_run_code_of_the_model(offline):
    with pytest.raises(
        TaskError, match="humaneval runs Python that the model writes, without a sandbox; --human-eval"
    ):
        TaskSuite(["humaneval"])


def test_tasks_that_are_broken(offline):
    """In a folder of its own: without data_files, datasets looks for data in all folders under the current one."""
    (offline / "bad.yaml").write_text(json.dumps({"task": "bad", "dataset_path": "json", "test_split": "test"}))
    with pytest.raises(TaskError, match="^bad"):
        TaskSuite(["bad"], [offline])


def test_without_the_package(monkeypatch):
    assert harness_refusal() is None
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "transformers-dsv3[evaluate]"' in harness_refusal()
