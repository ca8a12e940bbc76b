"""Reading of records: their fields are those of strict dataclasses, and what does not fit is refused by its name."""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from huggingface_hub.errors import StrictDataclassFieldValidationError


Schema = TypeVar("Schema")


class RecordError(ValueError):
    """A file is no record of its kind; the message names it, the field, and what is wrong."""


def read_values(path: str | Path) -> Any:
    """What a JSON file holds. Raises `RecordError` where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error})") from error


def check_kind(source: str, values: Any, record: str, version: int, of: str) -> None:
    """Refuse what is no record of this kind and version. `of` says in words what it should be of."""
    if not isinstance(values, dict) or values.get("record") != record:
        raise RecordError(f"{source} is no record of {of}: it has no 'record': {record!r}")
    if values.get("version") != version:
        raise RecordError(
            f"{source}: version {values.get('version')!r} of the record; this package reads version {version}"
        )


def read_fields(schema: type[Schema], values: Any, source: str, within: str = "") -> Schema:
    """The strict dataclass that a JSON object holds, with what is nested in it. Fields of other names are left out.

    A field may have in its metadata, beside what `huggingface_hub.dataclasses.validated_field` puts there:
        name: what it is called in JSON.
        schema: what its values are checked by while they stay as they are.

    Args:
        source: names the file.
        within: the path to this object in the file, with a point at its end.

    Raises:
        RecordError: `source` and the first field that is missing or wrong.
    """
    if not isinstance(values, Mapping):
        raise RecordError(f"{source}: field '{within[:-1]}' is {values!r:.40}, not dict")
    result = schema.__new__(schema)
    hints = get_type_hints(schema)
    for field in fields(schema):  # type: ignore[arg-type]
        name = field.metadata.get("name", field.name)
        path = f"{within}{name}"
        if name not in values:
            raise RecordError(f"{source}: field '{path}' is missing")
        value = values[name]
        read = _read(field.metadata.get("schema", hints[field.name]), value, source, path)
        # One by one, since the error of a strict dataclass does not tell the field but in its text
        try:
            setattr(result, field.name, value if "schema" in field.metadata else read)
        except StrictDataclassFieldValidationError as error:
            wrong_type = isinstance(error.__cause__, TypeError)
            rule = f"not {_words(hints[field.name])}" if wrong_type else str(error.__cause__)
            raise RecordError(f"{source}: field '{path}' is {value!r:.40}, {rule}") from error
    return result


def _read(kind: Any, value: Any, source: str, path: str) -> Any:
    """Objects within a value as the dataclasses that they are to be; the rest as it is."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return read_fields(kind, value, source, f"{path}.")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not types.NoneType]
        return value if value is None or len(kinds) != 1 else _read(kinds[0], value, source, path)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], entry, source, f"{path}.{place}") for place, entry in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], entry, source, f"{path}.{key}") for key, entry in value.items()}
    return value


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin in (list, dict) and arguments[-1] is not Any:
        return f"{origin.__name__} of {_words(arguments[-1])}"
    if is_dataclass(kind):
        return "dict"
    return "null" if kind is types.NoneType else getattr(origin or kind, "__name__", str(kind))


def plain(value: Any) -> Any:
    """A value for JSON: names are text, tuples lists, and what is not finite None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
