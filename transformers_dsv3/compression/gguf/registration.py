"""Puts the GGUF reader where `from_pretrained`, `AutoConfig` and `AutoTokenizer` look for it.

Imported with the package, so what reads is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

from ...models.dsv3.checkpoint_dsv3 import READERS


_ARCHITECTURE = "deepseek2"


def _open(path: str, sibling: Callable[[str], str] | None, config: Any) -> Any:
    from .reading import open_gguf

    return open_gguf(path, sibling, config)


def _config(metadata: dict[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a file's config. `AutoTokenizer` asks for them before it builds a tokenizer."""
    from .config import config_of
    from .tokenizer import register_tokenizers

    register_tokenizers()
    return config_of(metadata, tensor_names)


def register_gguf() -> None:
    """Puts the reader into Transformers' table of GGUF architectures and the plugin's. Repeating does nothing."""
    GGUF_CONFIG_ARCHS[_ARCHITECTURE] = _config
    READERS["gguf"] = _open
