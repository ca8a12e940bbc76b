"""examples/serve.md: what it tells people to send is sent, and nginx's configuration is run where nginx is."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_curl(model_server):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("curl ")]
    assert len(commands) == 3
    for command in commands:
        _, address, *given = shlex.split(command)
        assert given[:3] == ["-H", "Content-Type: application/json", "-d"]
        if shutil.which("curl"):
            words = ["curl", "-sS", "--fail-with-body", address.replace(ADDRESS, model_server.address), *given]
            done = subprocess.run(words, capture_output=True, timeout=120)
            assert done.returncode == 0, done.stdout
        else:
            assert model_server.post(address.removeprefix(ADDRESS), given[3]).status == 200


def test_python(model_server, capsys):
    pytest.importorskip("openai")
    names = {}
    for block in blocks("python"):
        exec(compile(block.replace(ADDRESS, model_server.address), "<page>", "exec"), names)
    said = capsys.readouterr().out
    assert '"language"' in said and re.search(r"weather (Paris|Kyiv)", said)


def test_the_options_are_those_of_the_command():
    from typer.main import get_command

    from transformers_dsv3_cli.main import app

    options = {name for option in get_command(app).commands["serve"].params for name in option.opts}
    assert set(re.findall(r"`(--[a-z-]+)[ `]", PAGE)) <= options


def test_the_metrics_are_those_of_the_server(model_server):
    told = model_server.get("/metrics").body.decode()
    names = re.findall(r"`(vllm:\w+)`", PAGE)
    assert len(names) == 5
    assert all(name in told for name in names)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_several_servers_behind_nginx(serve, make_engine, tmp_path):
    from transformers_dsv3.serving.server import bound_socket

    clients = [serve(make_engine(max_sequence=4096)) for _ in range(2)]
    with bound_socket("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
    text = (EXAMPLES / "serve_many.conf").read_text()
    ports = {"8000": port, "8001": clients[0].port, "8002": clients[1].port}
    for old, new in ports.items():
        assert f"127.0.0.1:{old}" in text
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    (tmp_path / "nginx.conf").write_text(text)
    command = ["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", "daemon off; user root;"]
    proxy = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        through = type(clients[0])("127.0.0.1", port)
        through.wait_until_it_answers()
        seen = [set(), set()]

        def chat(first, second, **fields):
            messages = [{"role": "user", "content": text} for text in (first, second)]
            return through.post("/v1/chat/completions", {"messages": messages, "max_tokens": 20, **fields})

        for conversation in range(12):
            before = [len(client.engine.seen) for client in clients]
            for turn in range(3):
                assert chat(f"{conversation}: " + "a" * 512, f"turn {turn}").status == 200
            gained = [len(client.engine.seen) - count for client, count in zip(clients, before)]
            assert sorted(gained) == [0, 3]
            seen[gained.index(max(gained))].add(conversation)
        assert seen[0] and seen[1]
        assert through.get("/metrics").status == 404 and through.get("/").status == 200
        *_, done = chat("Hello", "there", stream=True).events
        assert done == "[DONE]"
        clients[0].service.draining = True  # as SIGTERM begins
        statuses = [chat(f"{number}", "Hello").status for number in range(10)]
        assert statuses == [200] * 10
        clients[0].service.draining = False
    finally:
        proxy.terminate()
        proxy.wait()
