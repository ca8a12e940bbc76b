"""PEFT adapters of one model, one of which is active at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class AdapterError(RuntimeError):
    """An adapter that cannot be activated: its requests fail, and nothing else does."""


class Adapters:
    """Loads adapters beside a model's weights.

    Args:
        model: a `PreTrainedModel`.
        folders: of `save_pretrained`, by the names that requests have for them.
    """

    def __init__(self, model: Any, folders: Mapping[str, str | Path]):
        self._model, self.names = model, tuple(folders)
        for name, folder in folders.items():
            model.load_adapter(str(folder), adapter_name=name)
        self._active: object = None
        if folders:
            model.disable_adapters()

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Computes with an adapter, or with none; the choice stays until another is made.

        Raises:
            AdapterError: for one that cannot be activated.
        """
        if self.names and name != self._active:
            self._active = ...  # what a choice leaves that fails half-way is nobody's
            if name is None:
                self._model.disable_adapters()
            else:
                try:
                    self._model.enable_adapters()
                    self._model.set_adapter(name)
                except Exception as error:
                    raise AdapterError(f"The adapter {name!r} cannot be activated: {error}") from error
            self._active = name
        yield
