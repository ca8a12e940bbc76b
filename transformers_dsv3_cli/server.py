"""Transformers' server, serving `deepseek_v3` checkpoints with the plugin's classes.

The server finds a model's class by the name in `config.architectures` among Transformers' own classes, and so never
asks the Auto classes where the plugin is registered. Its `Serve` command makes its model manager inside the
constructor and offers no way to pass one in. The subclass here lets that constructor wire everything up without a
model, gives the finished manager the loading rules below, and then loads the model and starts.
"""

from __future__ import annotations

import inspect
from typing import Any

import typer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality, split_model_id
from transformers.utils import logging

import transformers_dsv3
from transformers_dsv3.data.local_paths import load_refusal
from transformers_dsv3.evaluation.loading import check_device
from transformers_dsv3.option_error import OptionError


logger = logging.get_logger(__name__)


class Dsv3ModelManager(ModelManager):
    """Loads `deepseek_v3` checkpoints through `AutoModelForCausalLM`; everything else as Transformers does."""

    def _load_model(
        self,
        model_id_and_revision: str,
        tqdm_class: type | None = None,
        progress_callback: Any = None,
        gguf_file: str | None = None,
    ) -> Any:
        model_id, revision = model_id_and_revision.split("@", 1)
        common = {"revision": revision, "trust_remote_code": self.trust_remote_code}
        if gguf_file is None:
            config = AutoConfig.from_pretrained(model_id, **common)
            if isinstance(config, transformers_dsv3.DeepseekV3Config):
                if progress_callback is not None:
                    progress_callback({"status": "loading", "model": model_id_and_revision, "stage": "weights"})
                model = AutoModelForCausalLM.from_pretrained(
                    model_id,
                    attn_implementation=self.attn_implementation,
                    dtype=self.dtype,
                    device_map=self.device,
                    quantization_config=self.get_quantization_config(),
                    tqdm_class=tqdm_class,
                    **common,
                )
                logger.warning(f"Serving {model_id} with {type(model).__module__}.{type(model).__name__}")
                return model
        return super()._load_model(
            model_id_and_revision,
            tqdm_class=tqdm_class,
            progress_callback=progress_callback,
            gguf_file=gguf_file,
        )

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        if isinstance(model, transformers_dsv3.DeepseekV3ForCausalLM):
            return Modality.LLM
        return ModelManager.get_model_modality(model, processor=processor)


def _refused(message: str) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(1)


class Dsv3Serve(Serve):
    """`transformers serve` with a `Dsv3ModelManager`; same arguments."""

    def __init__(self, force_model: str | None = None, non_blocking: bool = False, **options: Any):
        try:
            check_device(options.get("device", "auto"))
        except OptionError as error:
            raise _refused(f"{error.option}: {error}") from None
        self._wired = False
        # Without a model to preload, the constructor loads nothing; non-blocking, it calls `start_server` below.
        super().__init__(force_model=None, non_blocking=True, **options)
        # Handlers and routes already hold this manager, so it takes on the class instead of being replaced.
        self._model_manager.__class__ = Dsv3ModelManager
        if force_model is not None:
            self._model_manager.force_model = force_model
            self._model_manager.model_timeout = -1  # a preloaded model stays loaded
            repository, gguf_file = split_model_id(force_model)
            try:
                self._model_manager.load_model_and_processor(
                    self._model_manager.process_model_name(repository), gguf_file=gguf_file
                )
            except (OSError, ValueError) as error:
                logger.debug("loading the model failed", exc_info=True)
                refusal = load_refusal(repository.partition("@")[0], error)
                raise _refused(f"cannot serve {refusal}") from None
        self._wired = True
        if non_blocking:
            self.start_server()
        else:
            self.server.run()

    def start_server(self) -> None:
        if self._wired:
            super().start_server()


# typer reads the options from the signature: the ones of the installed version of `transformers serve`.
Dsv3Serve.__signature__ = inspect.signature(Serve)  # type: ignore[attr-defined]


def server_command(arguments: list[str], help_text: str) -> None:
    """Parse `arguments` as `transformers serve` does and run the server until it is stopped."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command.command(help=help_text)(Dsv3Serve)
    command(args=arguments, prog_name="transformers-dsv3 serve")
