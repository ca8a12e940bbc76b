"""Programs that no one here wrote, as clients of the server: lm-evaluation-harness and guidellm."""

import json
import re
import signal
import time

import pytest

from tests import programs
from tests.serving.client import Client


pytestmark = pytest.mark.interop


@pytest.fixture
def checkpoint(trained_model, byte_tokenizer, tmp_path):
    folder = tmp_path / "checkpoint"
    trained_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(checkpoint):
    """A client of `transformers-dsv3 serve`."""
    program = programs.Program(
        [
            "-m",
            "transformers_dsv3.cli",
            "serve",
            checkpoint,
            "--port",
            0,
            "--model-name",
            "trained",
            "--cache-gib",
            0.1,
        ]
    )
    said, until = "", time.monotonic() + 300
    while not (address := re.search(r"The page is at http://127\.0\.0\.1:(\d+)/", said)):
        assert program.poll() is None and time.monotonic() < until, "".join(program.read())
        time.sleep(0.05)
        said = "".join(program.read())
    yield Client("127.0.0.1", int(address[1]))
    program.send_signal(signal.SIGTERM)
    program.wait()


def test_lm_eval_scores_as_its_own_model_does(peer, server, checkpoint, text, tmp_path):
    """`local-completions` asks for log-probabilities of prompts, given as lists of token ids."""
    harness = peer("DSV3_LM_EVAL_PYTHON", "lm_eval", "lm-eval[api]")
    peer("DSV3_LM_EVAL_PYTHON", "tenacity", "lm-eval[api]")
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 30][:8]
    data = tmp_path / "data.jsonl"
    endings = [line[len(line) // 2 :] for line in lines]
    documents = [
        {"context": line[: len(line) // 2], "choices": [ending, endings[place - 1]]}
        for place, (line, ending) in enumerate(zip(lines, endings))
    ]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "choices.yaml").write_text(json.dumps(task))
    found = []
    for name, arguments in (
        (
            "local-completions",
            f"model=trained,base_url={server.address}/v1/completions,tokenizer={checkpoint},num_concurrent=4",
        ),
        ("hf", f"pretrained={checkpoint},dtype=float32"),
    ):
        folder = tmp_path / name
        harness.run(
            *("-m", "transformers_dsv3.cli", "run", "lm_eval", "--model", name, "--model_args", arguments),
            *("--tasks", "choices", "--include_path", tmp_path, "--device", "cpu", "--log_samples"),
            *("--output_path", folder),
            HF_DATASETS_OFFLINE="1",
            PYTHONPATH=str(programs.ROOT),
        )
        (file,) = folder.rglob("samples_choices_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found.append([pair for sample in samples for pair in sample["filtered_resps"]])
    over_http, itself = found
    assert len(itself) == 16
    for ours, theirs in zip(over_http, itself):
        assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=1e-3)
        assert ours[1] == theirs[1]


@pytest.mark.parametrize(
    ("profile", "requests"), [("kind=concurrent,streams=8", 40), ("kind=poisson,rate=20", 40), ("kind=sweep", 8)]
)
def test_guidellm_loads_it(peer, server, checkpoint, tmp_path, profile, requests):
    guidellm = peer("DSV3_GUIDELLM_PYTHON", "guidellm", "guidellm")
    report = tmp_path / "report.json"
    guidellm.run(
        *("-m", "guidellm", "run", "--backend", f"kind=openai_http,target={server.address},model=trained"),
        *("--profile", profile, "--constraint", f"kind=max_requests,count={requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={checkpoint}"),
        *("--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=12", "--output", f"kind=json,path={report}"),
        HF_DATASETS_OFFLINE="1",
    )
    runs = json.loads(report.read_text())["benchmarks"]
    for run in runs:
        totals = run["metrics"]["request_totals"]
        assert totals["successful"] > 0 and totals["errored"] == 0, totals
    print(profile, [run["metrics"]["request_totals"] for run in runs])
