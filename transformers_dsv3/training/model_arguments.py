"""Command line arguments that say which model to train, for `HfArgumentParser`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig
from transformers.hf_argparser import HfArg

from ..data.local_paths import local_or_hub
from ..models.dsv3 import Dsv3Config
from .quickstart_run import QuickstartSettings


@dataclass
class NewModelArguments:
    """A model that is trained from scratch, and its tokenizer."""

    config: str | None = HfArg(
        default=None,
        help="A config.json of model type deepseek_v3, or a folder with one. Default: 10 M parameters.",
    )
    config_overrides: str | None = HfArg(
        default=None,
        help="Fields to change in it, as in hidden_size=512,n_routed_experts=32,num_hidden_layers=8.",
    )
    tokenizer: str | None = HfArg(
        default=None,
        help="A tokenizer's folder or name. Default: a byte-level BPE trained on the first of the text.",
    )

    def make_config(self) -> Dsv3Config:
        """The config that is asked for, its fields checked.

        Raises:
            ValueError: there is none, it is of another model type, or `config_overrides` does not fit it.
            StrictDataclassError: its fields do not fit each other.
        """
        if self.config is None:
            settings = QuickstartSettings()
            config = Dsv3Config(vocab_size=settings.vocab_size, **settings.model)
        else:
            config = read_config(self.config, "--config")
        if self.config_overrides:
            override_config(config, self.config_overrides)
        config.check_fields()
        return config


def read_config(checkpoint: str, option: str = "--model") -> Dsv3Config:
    """The config of a checkpoint, a folder or a name on the Hub.

    Args:
        option: that names the checkpoint on the command line.

    Raises:
        ValueError: nothing is there, or it is of another model type.
        OSError: it cannot be read.
    """
    config = AutoConfig.from_pretrained(local_or_hub(checkpoint, one_of=["config.json"]))
    if not isinstance(config, Dsv3Config):
        raise ValueError(f"{option} {checkpoint} is of model type {config.model_type!r}, not deepseek_v3")
    return config


def override_config(config: PretrainedConfig, overrides: str) -> None:
    """Change fields of a config by `NAME=VALUE,NAME=VALUE`, each read as the type that the field has.

    Raises:
        ValueError: naming the field.
    """
    for override in overrides.split(","):
        name, equals, value = override.strip().partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form NAME=VALUE")
        if not hasattr(config, name) or callable(getattr(config, name)):
            raise ValueError(f"a {config.model_type} config has no field {name!r}")
        try:
            config.update_from_string(f"{name}={value}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
