"""`transformers-dsv3 serve` as people start it: a process, with a small checkpoint."""

import contextlib
import importlib.util
import json
import re
import signal
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.internvl import configuration_internvl, modeling_internvl
from typer.testing import CliRunner

import transformers_dsv3
from tests import programs
from tests.serving.client import Client
from tests.serving.pictures import about
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3_cli.main import app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    tokenizer = train_byte_bpe(["def main():\n    return 1\n" * 20], vocab_size=280, model_max_length=128)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        num_nextn_predict_layers=0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def start():
    """Function from arguments to a client of a server in a process, `program`."""
    started = []

    def run(*arguments, port=0, **environment):
        command = ["-m", "transformers_dsv3.cli", "serve", *arguments, "--port", port, "--cache-gib", 0.01]
        program = programs.Program(command, **environment)
        started.append(program)
        said, until = "", time.monotonic() + 300
        while not (address := re.search(r"The page is at http://127\.0\.0\.1:(\d+)/", said)):
            assert program.poll() is None and time.monotonic() < until, "".join(program.read())
            time.sleep(0.02)
            said = "".join(program.read())
        client = Client("127.0.0.1", int(address[1]))
        client.wait_until_it_answers()
        client.program, client.said = program, said
        return client

    yield run
    for program in started:
        if program.poll() is None:
            program.send_signal(signal.SIGKILL)
        program.wait()


def test_a_checkpoint_is_served_as_generate_continues_it(start, checkpoint):
    client = start(checkpoint)
    assert "transformers_dsv3.models.dsv3.modeling_dsv3.DeepseekV3ForCausalLM" in client.said
    assert "the checkpoint has no chat template" in client.said
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = [5, 6, 7, 8, 9]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    told = client.complete(prompt, max_tokens=12, temperature=0, logprobs=0, model=str(checkpoint)).json
    tokens = client.post("/tokenize", {"prompt": told["choices"][0]["text"], "add_special_tokens": False}).json
    text = client.post("/detokenize", {"tokens": expected}).json["prompt"]
    if 1 not in expected:
        assert told["choices"][0]["text"] == text and tokens["count"] > 0
    assert client.get("/").body.startswith(b"<!doctype html>")
    assert client.chat("Hello", max_tokens=3).json["usage"]["completion_tokens"] <= 3
    routed = client.post("/v1/routing", {"tokens": prompt}).json
    assert [layer["layer"] for layer in routed["layers"]] == [1]
    assert sum(routed["layers"][0]["tokens_per_expert"]) == 2 * len(prompt)
    client.program.send_signal(signal.SIGTERM)
    assert client.program.wait() == 0
    assert "Traceback" not in "".join(client.program.read())


def test_a_server_that_is_killed_is_started_again_where_it_was(start, checkpoint):
    """What a supervisor does. Its client's connection ends without an answer, and nothing that it wrote is left."""

    def files():
        return {path: path.stat().st_mtime_ns for path in checkpoint.parent.rglob("*")}

    before = files()
    client = start(checkpoint)
    asked = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    told = client.complete(**asked).json["choices"]
    client.program.send_signal(signal.SIGSTOP)
    body = json.dumps({**asked, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with client.raw() as connection:
        connection.sendall(head.encode() + body)
        client.program.send_signal(signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""
    assert client.program.wait() == -signal.SIGKILL
    with pytest.raises(OSError):
        client.get("/health")
    again = start(checkpoint, port=client.port)
    assert again.complete(**asked).json["choices"] == told
    assert files() == before


def test_an_adapter_a_template_a_key_and_a_name(start, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj", "kv_a_proj_with_mqa"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "poet")
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}>")
    options = ["--adapter", f"poet={tmp_path / 'poet'}", "--chat-template", template, "--model-name", "tiny"]
    client = start(checkpoint, *options, TRANSFORMERS_DSV3_API_KEY="secret")
    assert f"the chat template is {template}" in client.said
    assert client.complete().status == 401
    client.headers = {"Authorization": "Bearer secret"}
    assert [one["id"] for one in client.get("/v1/models").json["data"]] == ["tiny", "poet"]
    asked = {"prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    plain, poet = (client.complete(**asked, model=name).json["choices"][0]["text"] for name in ("tiny", "poet"))
    assert plain != poet
    assert client.complete(**asked).json["choices"][0]["text"] == plain
    tokens = client.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json["tokens"]
    assert client.post("/detokenize", {"tokens": tokens}).json["prompt"] == "[user] Hi >"


@pytest.mark.parametrize("kind", ["bits", "gguf", "packed"])
def test_quantised_weights_are_served(start, checkpoint, tmp_path, kind):
    if kind == "bits":
        client = start(checkpoint, "--bits", 8)
    elif kind == "gguf":
        pytest.importorskip("gguf")
        transformers_dsv3.export_gguf(str(checkpoint), tmp_path / "model.gguf", type="q8_0")
        client = start(tmp_path / "model.gguf")
    else:
        pytest.importorskip("compressed_tensors")
        model = transformers_dsv3.quantize(AutoModelForCausalLM.from_pretrained(checkpoint), bits=4)
        model.save_pretrained(tmp_path / "packed")
        for file in checkpoint.glob("tokenizer*"):
            (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
        client = start(tmp_path / "packed")
    told = client.complete("def main(", max_tokens=5, ignore_eos=True)
    assert told.status == 200 and told.json["usage"]["completion_tokens"] == 5


def test_pictures_are_read_where_there_is_a_tower(start, checkpoint, tmp_path):
    """And adapters of the whole model are its text's."""
    torch.manual_seed(0)
    tower = configuration_internvl.InternVLVisionConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 16],
        patch_size=[4, 4],
    )
    model, processor = transformers_dsv3.join(modeling_internvl.InternVLVisionModel(tower), str(checkpoint))
    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj", "kv_a_proj_with_mqa"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "poet")
    client = start(tmp_path / "joined", "--adapter", f"poet={tmp_path / 'poet'}", "--max-pictures", 1)
    assert "InternVLForConditionalGeneration" in client.said and "images and videos are read" in client.said
    asked = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answers = [client.chat(about(90), model=name, **asked) for name in (str(tmp_path / "joined"), "poet")]
    assert [answer.status for answer in answers] == [200, 200], answers[0].body
    plain, poet = (answer.json["choices"][0]["message"]["content"] for answer in answers)
    assert plain != poet
    assert client.chat(about(90, 91), **asked).error["param"] == "messages[0].content[1].image_url"


def test_sigterm_under_load_loses_no_answer(start, checkpoint):
    client = start(checkpoint)
    answers = []

    def ask(number):
        answers.append(client.complete([5, 6, 7 + number], max_tokens=100, ignore_eos=True, stream=number % 2 == 0))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    while client.sample("vllm:num_requests_running") < 12 and len(answers) < 12:
        time.sleep(0.01)
    client.program.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert client.program.wait() == 0
    assert len(answers) == 12
    for answer in answers:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.events[-1] == "[DONE]" and answer.events[-2]["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.json["usage"]["completion_tokens"] == 100


def test_help_says_what_people_need():
    result = programs.run(["-m", "transformers_dsv3.cli", "serve", "--help"])
    assert result.returncode == 0
    for told in ("--port", "--adapter", "--api-key", "TRANSFORMERS_DSV3_API_KEY", "/v1/chat/completions", "Examples:"):
        assert told in result.stdout


def test_missing_server_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    result = CliRunner().invoke(app, ["serve", "model"])
    assert result.exit_code == 1
    assert "uvicorn is not installed" in result.output and "pip install 'transformers-dsv3[serve]'" in result.output


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        (["/no/such/folder"], "CHECKPOINT", "cannot serve /no/such/folder: no such folder"),
        (["EMPTY"], "CHECKPOINT", "cannot serve EMPTY: "),
        (["llama"], "CHECKPOINT", "is a 'llama' model, not 'deepseek_v3'"),
        (["no.gguf"], "CHECKPOINT", "no.gguf: no such file"),
        (["EMPTY", "--device", "bogus"], "--device", "'bogus' is no device of this machine"),
        (["EMPTY", "--dtype", "int3"], "--dtype", "'int3' is none of"),
        (["EMPTY", "--bits", "3"], "--bits", "is 4 or 8, not 3"),
        (["quantised", "--bits", "8"], "--bits", "is quantised already"),
        (["EMPTY", "--port", "70000"], "--port", "70000 is not in [0, 65535]"),
        (["EMPTY", "--host", "192.0.2.1"], "--host", "192.0.2.1:0: "),
        (["EMPTY", "--adapter", "poet"], "--adapter", "'poet' is not NAME=FOLDER"),
        (["EMPTY", "--adapter", "poet=EMPTY"], "--adapter", "EMPTY holds no adapter_config.json"),
        (["EMPTY", "--api-key", " "], "--api-key", "printable ASCII"),
        (["EMPTY", "--allow-origin", "chat.example/"], "--allow-origin", "is no origin"),
        (["EMPTY", "--cache-gib", "0"], "--cache-gib", "has to be above 0"),
        (["EMPTY", "--max-running", "0"], "--max-running", "has to be a whole number"),
        (["EMPTY", "--tpot-ms", "-5"], "--tpot-ms", "above 0"),
        (["EMPTY", "--max-sequence", "1"], "--max-sequence", "has to be a whole number"),
        (["EMPTY", "--body-seconds", "0"], "--body-seconds", "has to be above 0"),
        (["EMPTY", "--max-pictures", "-1"], "--max-pictures", "has to be 0 or more"),
        (["EMPTY", "--max-megapixels", "nan"], "--max-megapixels", "has to be above 0"),
        (["EMPTY", "--allow-media-from", "http://a.example"], "--allow-media-from", "is no name of a host"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_of_its_option(arguments, option, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    for name, fields in (
        ("llama", {"model_type": "llama"}),
        ("quantised", {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    port = [] if "--port" in arguments else ["--port", "0"]
    result = CliRunner().invoke(app, ["serve", *arguments, *port], env={"COLUMNS": "500", "TERMINAL_WIDTH": "500"})
    told = " ".join(result.output.split())
    assert result.exit_code == 2, result.output
    assert f"Invalid value for {option}: " in told and message in told


def test_a_template_that_is_none_is_refused(checkpoint, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for %}")
    arguments = ["serve", str(checkpoint), "--port", "0", "--chat-template"]
    for file in (template, tmp_path / "none.jinja"):
        result = CliRunner().invoke(app, [*arguments, str(file)])
        assert result.exit_code == 2 and "--chat-template" in result.output
