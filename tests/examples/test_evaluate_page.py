"""Every command of examples/evaluate.md runs, on small stand-ins for the checkpoint and the data that it speaks of."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from transformers_dsv3.evaluation.evaluation_record import read_record
from transformers_dsv3.evaluation.sandbox import sandbox_refusal
from transformers_dsv3_cli.main import app


pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_task_index")
PAGE = (Path(__file__).parents[2] / "examples" / "evaluate.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


COMMANDS = [
    shlex.split(line.partition("#")[0])
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("transformers-dsv3 evaluate")
]


@pytest.fixture(scope="module")
def folder(make_model, byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    model = make_model(vocab_size=258, max_position_embeddings=1024)
    model.save_pretrained(folder / "dsv3-quickstart")
    byte_tokenizer.save_pretrained(folder / "dsv3-quickstart")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "my-adapter")
    (folder / "held-out").mkdir()
    (folder / "held-out" / "notes.txt").write_text("".join(f"line {n}: {n * n}\n" for n in range(60)))
    (folder / "my_tasks").mkdir()
    ((yaml,), (rows,)) = blocks("yaml"), blocks("json")
    (folder / "my_tasks" / "capitals.yaml").write_text(yaml)
    (folder / "my_tasks" / "capitals.jsonl").write_text(rows)
    gsm8k = folder / "openai" / "gsm8k"
    gsm8k.mkdir(parents=True)
    row = json.dumps({"question": "What is 1 and 1?", "answer": "Two.\n#### 2"}) + "\n"
    for split in ("train", "test"):
        (gsm8k / f"{split}.jsonl").write_text(row * 6)
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    (gsm8k / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    return folder


def test_the_page_has_commands():
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_commands(command, folder, tmp_path, monkeypatch):
    if "--execute-generated-code" in command and (refusal := sandbox_refusal()):
        pytest.skip(refusal)
    for path in folder.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    arguments = command[1:]
    # What takes minutes on the real ones: fewer documents, less text, and of MMLU's 57 tasks none
    arguments = [argument.replace("gsm8k,mmlu", "gsm8k") for argument in arguments]
    if "--what" not in arguments:
        arguments += ["--text", "held-out"]
    elif "none" in arguments:
        arguments += ["--limit", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = read_record(command[command.index("--json") + 1] if "--json" in command else "evaluation.json")
    assert record.complete
    if "capitals" in command:
        assert record.tasks["capitals"]["n"] == 2


def test_figures_of_the_sandbox():
    from transformers_dsv3.evaluation.sandbox import Limits

    limits = Limits()
    assert f"{limits.cpu_seconds} s of processor time, {limits.wall_seconds:.0f} s on the clock" in PAGE
    assert limits.memory_bytes == 1 << 30 and "1 GiB" in PAGE
    assert f"/tmp of {limits.disk_bytes >> 20} MiB" in PAGE
