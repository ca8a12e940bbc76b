"""What is done when another library is imported, by Python's own protocol of finders and loaders."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder):
    """Calls `action` when the module `name` has been imported, by whomever, once.

    `start` puts it into `sys.meta_path`, or acts at once where the module is there, and `stop` takes it out. Who only
    looks whether there is such a module, as `importlib.util.find_spec` does, imports and calls nothing.
    """

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action
        self._looking = False

    def start(self) -> None:
        if self.name in sys.modules:
            self.action()
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self._looking:
            return None
        self._looking = True  # the finders behind this one are asked by the same function
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self)
        return spec


class _ThenAct(Loader):
    """A module's own loader, and what is to follow it."""

    def __init__(self, loader: Any, finder: AfterImport):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # what else is asked of loaders: sources, resources

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.stop()
        self._finder.action()
