import inspect
import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

import transformers_dsv3  # noqa: F401
from tests import programs
from transformers_dsv3.data.byte_bpe import train_byte_bpe


needs_server = pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers-dsv3[serve]'")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    tokenizer = train_byte_bpe(["def main():\n    return 1\n" * 20], vocab_size=280, model_max_length=128)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_nextn_predict_layers=0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    process = programs.Program(["-m", "transformers_dsv3.cli", "serve", checkpoint, *address])
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None and time.monotonic() < deadline, process.read()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@needs_server
def test_a_completion_comes_from_the_plugins_class(server, checkpoint):
    address, process = server
    body = {"model": str(checkpoint), "prompt": "def main(", "max_tokens": 5, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    assert answer["object"] == "text_completion"
    assert isinstance(answer["choices"][0]["text"], str)
    assert re.search(r"Serving .* with transformers_dsv3\.\S+\.DeepseekV3ForCausalLM", "".join(process.read()))


@needs_server
def test_serve_help_lists_the_servers_own_options():
    result = programs.run(["-m", "transformers_dsv3.cli", "serve", "--help"])
    assert result.returncode == 0
    assert "--port" in result.stdout and "Examples:" in result.stdout


@needs_server
def test_help_behind_a_checkpoint_is_the_servers():
    """Of the installed Transformers, which a light --help cannot ask; what that one names has to be there."""
    from transformers.cli.serve import Serve

    command = ["-m", "transformers_dsv3.cli", "serve"]
    done = [programs.run([*command, *arguments, "--help"]) for arguments in ([], ["./model"])]
    assert [each.returncode for each in done] == [0, 0]
    light, full = (each.stdout for each in done)
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(Serve).parameters}
    named = set(re.findall(r"--[a-z-]+", light)) - {"--help"}
    assert len(named) >= 6 and named <= options
    assert {"--model-timeout", "--default-seed", *named} <= set(re.findall(r"--[a-z-]+", full))
    assert "Examples:" in full


def test_missing_server_packages_are_named(monkeypatch):
    from transformers.utils import import_utils
    from typer.testing import CliRunner

    from transformers_dsv3_cli.main import app

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", "model"])
    assert result.exit_code == 1
    assert "pip install 'transformers-dsv3[serve]'" in result.output


@needs_server
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "Error: cannot serve /no/such/folder: no such folder"),
        (["EMPTY"], "Error: cannot serve EMPTY: "),
        (["EMPTY", "--device", "bogus"], "Error: --device: 'bogus' is no device of this machine"),
    ],
)
def test_what_cannot_be_served_is_named_in_one_line(arguments, message, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    result = programs.run(["-m", "transformers_dsv3.cli", "serve", *arguments], cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(message)
