"""A server in a thread, over the engine that repeats prompts."""

import asyncio
import contextlib
import copy
import threading

import pytest
import torch
import uvicorn

import transformers_dsv3
from tests.serving.client import Client
from tests.serving.engines import EchoEngine
from transformers_dsv3.serving.app import Service
from transformers_dsv3.serving.chat import chat_template
from transformers_dsv3.serving.server import DrainingServer, HttpProtocol, bound_socket
from transformers_dsv3.serving.settings import ServerSettings


@contextlib.contextmanager
def serving(engine, drain_seconds=5, template_file=None, pictures=None, **settings):
    """A client of a server that runs in a thread. Its `server` and `service` are those."""
    settings = ServerSettings(**{"model_name": "echo", **settings})
    service = Service(engine, settings, chat_template(engine.tokenizer, template_file), pictures)
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


@pytest.fixture(scope="module")
def joined(make_model, byte_tokenizer):
    """A small model of pictures and text, and its processor."""
    from transformers.models.internvl import configuration_internvl, modeling_internvl

    torch.manual_seed(0)
    tower = modeling_internvl.InternVLVisionModel(
        configuration_internvl.InternVLVisionConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=[16, 16],
            patch_size=[4, 4],
        )
    )
    text = make_model(vocab_size=258, eos_token_id=257, pad_token_id=256, max_position_embeddings=512)
    model, processor = transformers_dsv3.join(tower, text, copy.deepcopy(byte_tokenizer))
    processor.tokenizer.chat_template = processor.chat_template  # as a folder's
    for name, tensor in model.model.named_parameters():
        if name.startswith(("vision_tower", "multi_modal_projector")) and tensor.dim() > 1:
            torch.nn.init.normal_(tensor, std=0.3)  # so that pictures make a difference
    return model, processor


@pytest.fixture(scope="module")
def picture_server(joined):
    """A server of that model, whose requests may have four pictures of 10,000 pixels together."""
    from transformers_dsv3.generation.engine import Engine
    from transformers_dsv3.generation.settings import EngineSettings
    from transformers_dsv3.serving.pictures import Pictures
    from transformers_dsv3.serving.settings import MediaLimits

    model, processor = joined
    engine = Engine(model, processor.tokenizer, EngineSettings(cache_bytes=2**22, page_size=16))
    engine.start()
    limits = MediaLimits(number=4, file_bytes=20_000, pixels=10_000, frames=3)
    with serving(engine, model_name="tiny", pictures=Pictures(model, processor, limits)) as client:
        yield client
    engine.stop()


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
