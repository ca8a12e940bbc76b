"""Hands the engine to models, which do not import this part of the package: they find it in a table.

Imported with the package, so what serves is imported when it is asked for.
"""

from __future__ import annotations

from typing import Any

from ..models.dsv3.generation_dsv3 import MANAGERS


def _manager(*arguments: Any) -> Any:
    from .manager import ContinuousBatching

    return ContinuousBatching(*arguments)


def register_manager() -> None:
    """Puts the manager of continuous batching into the models' table. Repeating does nothing."""
    MANAGERS["continuous_batching"] = _manager
