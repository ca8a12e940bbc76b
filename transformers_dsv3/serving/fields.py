"""JSON of requests, read field by field: each has a name and a kind, and what is wrong is said of that name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ApiError, refused


# Of objects and lists within each other. Python's own reader gives up at some hundreds, and says RecursionError
DEPTH_LIMIT = 64


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: 400, for what is no JSON object in UTF-8, NaN and Infinity, objects nested too deeply, and strings
            with half of a surrogate pair, which are no text.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # JSON's errors, and whole numbers of thousands of digits
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body has to be a JSON object, not {kind_of(value)}")
    _check_depth(value)
    if b"\\ud" in body or b"\\uD" in body:
        for path, text in _strings(value):
            if not is_text(text):
                raise refused(path, "has half of a surrogate pair, which is no character")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _too_deep() -> ApiError:
    return ApiError(400, f"the body has objects or lists more than {DEPTH_LIMIT} deep")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, int):
                below = f"{path}[{name}]"
            else:
                below = f"{path}.{name}" if path else name
                yield below, name
            yield from _strings(inner, below)


def is_text(text: str) -> bool:
    """Whether a string has no surrogate, which UTF-8 does not have."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """What JSON calls a value, and the value where that is short."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return f"the string {value[:40]!r}{'…' if len(value) > 40 else ''}"
    text = str(value)
    return f"the number {text[:40]}{'…' if len(text) > 40 else ''}"


class Fields:
    """The fields of one JSON object. Each is taken once; null stands for a field that is not there.

    Args:
        values: the object. path: of the object itself in the request, for errors.
    """

    def __init__(self, values: Any, path: str = ""):
        if not isinstance(values, dict):
            raise refused(path, f"has to be an object, not {kind_of(values)}")
        self.values: Mapping[str, Any] = values
        self.path = path
        self.taken: set[str] = set()

    def name(self, name: str) -> str:
        """As it is called in the request: `tools[0].function.name`."""
        return f"{self.path}.{name}" if self.path else name

    def any(self, name: str) -> Any:
        self.taken.add(name)
        return self.values.get(name)

    def _take(self, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise refused(self.name(name), f"has to be {what}, not {kind_of(value)}")
        return value

    def text(self, name: str) -> str | None:
        return self._take(name, str, "a string")

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._take(name, bool, "true or false")
        return default if value is None else value

    def number(self, name: str) -> float | None:
        return self._take(name, (int, float), "a number")

    def whole(self, name: str, least: int | None = None, most: int | None = None) -> int | None:
        """A whole number; 16.0 is one."""
        value = self._take(name, (int, float), "a whole number")
        if isinstance(value, float):
            if not value.is_integer():
                raise refused(self.name(name), f"has to be a whole number, not {kind_of(value)}")
            value = int(value)
        if value is not None and ((least is not None and value < least) or (most is not None and value > most)):
            limits = f"{least} or more" if most is None else f"in [{least}, {most}]"
            raise refused(self.name(name), f"has to be {limits}, not {kind_of(value)[11:]}")
        return value

    def array(self, name: str) -> list[Any] | None:
        return self._take(name, list, "a list")

    def object(self, name: str) -> Fields | None:
        value = self.any(name)
        return None if value is None else Fields(value, self.name(name))

    def choice(self, name: str, *choices: str) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            raise refused(self.name(name), f"has to be one of {', '.join(choices)}, not {kind_of(value)}")
        return value

    def need(self, name: str, value: Any) -> Any:
        """The value of a field that has to be there."""
        if value is None:
            raise refused(self.name(name), "is missing")
        return value

    def unknown(self) -> list[str]:
        """Names of fields that nothing has asked for and that say something."""
        return [name for name, value in self.values.items() if name not in self.taken and value is not None]
