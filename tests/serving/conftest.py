"""A server in a thread, over the engine that repeats prompts."""

import asyncio
import contextlib
import threading

import pytest
import uvicorn

from tests.serving.client import Client
from tests.serving.engines import EchoEngine
from transformers_dsv3.serving.app import Service
from transformers_dsv3.serving.chat import chat_template
from transformers_dsv3.serving.server import DrainingServer, HttpProtocol, bound_socket
from transformers_dsv3.serving.settings import ServerSettings


@contextlib.contextmanager
def serving(engine, drain_seconds=5, template_file=None, **settings):
    """A client of a server that runs in a thread. Its `server` and `service` are those."""
    settings = ServerSettings(**{"model_name": "echo", **settings})
    service = Service(engine, settings, chat_template(engine.tokenizer, template_file))
    place = bound_socket("127.0.0.1", 0)
    config = uvicorn.Config(
        service.app(), http=HttpProtocol, ws="none", log_level="warning", timeout_graceful_shutdown=5
    )
    server = DrainingServer(config, service, drain_seconds, lambda line: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])), daemon=True)
    port = place.getsockname()[1]
    thread.start()
    client = Client("127.0.0.1", port)
    client.server, client.service, client.thread, client.engine = server, service, thread, engine
    try:
        client.wait_until_it_answers()
        yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def serve():
    """`serving`, ended with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **settings: stack.enter_context(serving(*arguments, **settings))


@pytest.fixture(scope="module")
def echo(byte_tokenizer):
    """A server over an engine that repeats prompts, for tests that leave it as it is."""
    engine = EchoEngine(byte_tokenizer, max_sequence=512).start()
    with serving(engine, adapters=("poet",)) as client:
        yield client
    engine.stop()


@pytest.fixture(scope="module")
def model_engine(make_model, byte_tokenizer):
    """A running engine over a small model of experts, of one token a byte."""
    from transformers_dsv3.generation.engine import Engine
    from transformers_dsv3.generation.settings import EngineSettings

    model = make_model(vocab_size=258, eos_token_id=257, pad_token_id=256, max_position_embeddings=512)
    model.generation_config.eos_token_id = 257
    engine = Engine(model, byte_tokenizer, EngineSettings(cache_bytes=2**22, max_running=16, page_size=16))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def model_server(model_engine):
    """A server over `model_engine`."""
    with serving(model_engine, model_name="tiny") as client:
        yield client


@pytest.fixture
def make_engine(byte_tokenizer):
    """Function from arguments to a running engine that repeats prompts."""
    engines = []

    def make(**arguments):
        engines.append(EchoEngine(byte_tokenizer, **arguments).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
