"""What `serve` does with its options: checks them all, loads the model, and serves it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import transformers_dsv3
from transformers_dsv3.data.local_paths import load_refusal
from transformers_dsv3.evaluation.loading import check_device, check_dtype
from transformers_dsv3.generation.engine import Engine
from transformers_dsv3.generation.settings import EngineSettings
from transformers_dsv3.option_error import OptionError
from transformers_dsv3.serving.app import Service
from transformers_dsv3.serving.chat import chat_template
from transformers_dsv3.serving.pictures import Pictures
from transformers_dsv3.serving.server import bound_socket, serve
from transformers_dsv3.serving.settings import MediaLimits, ServerSettings, checkpoint_sampling


@dataclass(frozen=True)
class ServerOptions:
    """Options of `serve` that are not the engine's, by their names there."""

    host: str
    port: int
    model_name: str | None
    chat_template: Path | None
    api_keys: tuple[str, ...]
    allow_origins: tuple[str, ...]
    max_body_mib: float
    body_seconds: float
    request_seconds: float
    drain_seconds: float
    max_pictures: int
    max_picture_mib: float
    max_megapixels: float
    max_frames: int
    media_hosts: tuple[str, ...]


@dataclass(frozen=True)
class EngineOptions:
    """Options of `serve` that are the model's and the engine's, by their names there."""

    bits: int | None
    adapters: tuple[str, ...]
    cache_gib: float | None
    max_sequence: int | None
    max_running: int
    max_waiting: int
    max_batch_tokens: int
    tpot_ms: float | None
    device: str | None
    dtype: str


def run_server(checkpoint: str, options: ServerOptions, engine: EngineOptions, say: Callable[[str], None]) -> None:
    """Serves until a signal ends it.

    Raises:
        OptionError: for what cannot be, before anything is loaded.
    """
    name = options.model_name or checkpoint
    adapters = _adapters(engine.adapters, name)
    settings = _server_settings(name, tuple(adapters), options)
    limits = _media_limits(options)
    engine_settings = _engine_settings(engine)
    if engine.bits not in (None, 4, 8):
        raise OptionError("--bits", f"is 4 or 8, not {engine.bits}")
    check_dtype(engine.dtype)
    check_device(engine.device)
    with bound_socket(options.host, options.port) as place:
        config, tokenizer, where = _tokenizer(checkpoint, engine)
        processor, blind = _processor(config, where, limits)
        if processor is not None and tokenizer.chat_template is None:
            tokenizer.chat_template = processor.chat_template
        template = chat_template(tokenizer, options.chat_template)
        model = _model(checkpoint, where, engine, with_tower=processor is not None)
        pictures = None if processor is None else Pictures(model, processor, limits)
        settings = replace(settings, sampling=checkpoint_sampling(getattr(model, "generation_config", None)))
        try:
            running = Engine(model, tokenizer, engine_settings, adapters)
        except ValueError as error:
            raise OptionError(*_of_engine(error)) from None
        running.start()
        try:
            service = Service(running, settings, template, pictures)
            address = _address(place.getsockname())
            pages = running.statistics().pages_total * engine_settings.page_size
            said = template.said + _said_of_pictures(pictures, blind)
            for line in (
                f"{name}: {type(model).__module__}.{type(model).__name__}, "
                f"{running.max_sequence:,} tokens a text, {pages:,} at a time; {said}",
                f"The page is at {address}/ and the API at {address}/v1. Ctrl+C ends it.",
            ):
                say(line)
            serve(service, place, drain_seconds=options.drain_seconds, say=say)
        finally:
            running.stop()


def _adapters(given: tuple[str, ...], model_name: str) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not name or not equals or not folder:
            raise OptionError("--adapter", f"{one!r} is not NAME=FOLDER")
        if name in adapters or name == model_name:
            raise OptionError("--adapter", f"{name!r} names two models")
        path = Path(folder).expanduser()
        if not (path / "adapter_config.json").is_file():
            raise OptionError("--adapter", f"{folder} holds no adapter_config.json")
        adapters[name] = path
    return adapters


def _server_settings(name: str, adapters: tuple[str, ...], options: ServerOptions) -> ServerSettings:
    for option, value in (
        ("--max-body-mib", options.max_body_mib),
        ("--body-seconds", options.body_seconds),
        ("--request-seconds", options.request_seconds),
        ("--drain-seconds", options.drain_seconds),
    ):
        if not math.isfinite(value) or value < 0 or (value == 0 and option != "--drain-seconds"):
            raise OptionError(option, f"has to be above 0, not {value:g}")
    if not all(key.strip() and key.isascii() and key.isprintable() for key in options.api_keys):
        raise OptionError("--api-key", "has to be of printable ASCII, and not empty")
    for origin in options.allow_origins:
        if origin != "*" and not (origin.startswith(("http://", "https://")) and origin.count("/") == 2):
            raise OptionError("--allow-origin", f"{origin!r} is no origin, such as https://chat.example")
    max_body = int(options.max_body_mib * 2**20)
    return ServerSettings(
        model_name=name,
        adapters=adapters,
        api_keys=options.api_keys,
        allow_origins=options.allow_origins,
        max_body=max_body,
        max_reading=max(ServerSettings.max_reading, 2 * max_body),
        body_seconds=options.body_seconds,
        request_seconds=options.request_seconds,
    )


OPTIONS = {"cache_bytes": "--cache-gib", "target_tpot": "--tpot-ms"}


def _of_engine(error: ValueError) -> tuple[str, str]:
    """The option that a setting of the engine is, and what is wrong with it."""
    told = str(error)
    field = told.split("`")[1] if told.startswith("`") else ""
    option = OPTIONS.get(field, f"--{field.replace('_', '-')}" if field else "CHECKPOINT")
    return option, told


def _engine_settings(options: EngineOptions) -> EngineSettings:
    if options.cache_gib is not None and not 0 < options.cache_gib < 2**20:
        raise OptionError("--cache-gib", f"has to be above 0, not {options.cache_gib:g}")
    try:
        return EngineSettings(
            cache_bytes=None if options.cache_gib is None else int(options.cache_gib * 2**30),
            max_batch_tokens=options.max_batch_tokens,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            max_sequence=options.max_sequence,
            target_tpot=None if options.tpot_ms is None else options.tpot_ms / 1000,
        )
    except ValueError as error:
        raise OptionError(*_of_engine(error)) from None


def _media_limits(options: ServerOptions) -> MediaLimits:
    if options.max_pictures < 0:
        raise OptionError("--max-pictures", f"has to be 0 or more, not {options.max_pictures}")
    for option, value in (
        ("--max-frames", options.max_frames),
        ("--max-picture-mib", options.max_picture_mib),
        ("--max-megapixels", options.max_megapixels),
    ):
        if not math.isfinite(value) or value <= 0:
            raise OptionError(option, f"has to be above 0, not {value:g}")
    for host in options.media_hosts:
        if not re.fullmatch(r"\*|[\w.-]+", host):
            raise OptionError("--allow-media-from", f"{host!r} is no name of a host, such as images.example")
    return MediaLimits(
        number=options.max_pictures,
        file_bytes=int(options.max_picture_mib * 2**20),
        pixels=int(options.max_megapixels * 1e6),
        frames=options.max_frames,
        hosts=tuple(host.lower() for host in options.media_hosts),
    )


def _processor(config: Any, where: dict[str, Any], limits: MediaLimits) -> tuple[Any, str]:
    """The processor of a checkpoint with a vision tower whose pictures are to be read, or None and why not."""
    if getattr(config, "vision_config", None) is None or "gguf_file" in where or not limits.number:
        return None, ""
    folder = where["pretrained_model_name_or_path"]
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        return None, str(error).strip().partition("\n")[0]
    if not hasattr(processor, "image_token"):
        return None, "the checkpoint has no processor of pictures"
    return processor, ""


def _said_of_pictures(pictures: Pictures | None, blind: str) -> str:
    if pictures is not None:
        return f"; {' and '.join(f'{kind}s' for kind in pictures.reads.kinds)} are read"
    return f"; pictures are not read: {blind}" if blind else ""


def _tokenizer(checkpoint: str, options: EngineOptions) -> tuple[Any, Any, dict[str, Any]]:
    """The config, which is looked at first, the tokenizer, and where `from_pretrained` finds the rest."""
    path = Path(checkpoint).expanduser()
    where: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise OptionError("CHECKPOINT", f"{checkpoint}: no such file")
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif path.exists():
        where = {"pretrained_model_name_or_path": str(path)}
    try:
        config = AutoConfig.from_pretrained(**where)
        if not isinstance(config.get_text_config(), transformers_dsv3.DeepseekV3Config):
            raise OptionError("CHECKPOINT", f"{checkpoint} is a {config.model_type!r} model, not 'deepseek_v3'")
        if options.bits is not None and getattr(config, "quantization_config", None) is not None:
            raise OptionError("--bits", f"{checkpoint} is quantised already; leave the option out")
        return config, AutoTokenizer.from_pretrained(**where), where
    except OptionError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise OptionError("CHECKPOINT", f"cannot serve {load_refusal(checkpoint, error)}") from None


def _model(checkpoint: str, where: dict[str, Any], options: EngineOptions, with_tower: bool = False) -> Any:
    opened_by = AutoModelForImageTextToText if with_tower else AutoModelForCausalLM
    try:
        model = opened_by.from_pretrained(**where, dtype=options.dtype, device_map=options.device)
    except (OSError, ValueError, ImportError) as error:
        raise OptionError("CHECKPOINT", f"cannot serve {load_refusal(checkpoint, error)}") from None
    if options.bits is None:
        return model
    try:
        return transformers_dsv3.quantize(model, bits=options.bits, progress=True)
    except ValueError as error:
        raise OptionError("--bits", str(error)) from None


def _address(place: Any) -> str:
    host, port = place[0], place[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"
