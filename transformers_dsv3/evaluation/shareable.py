"""Records are published with models: nothing in them may tell a user's folders or secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# How the Hub's access tokens begin: those of users, of organisations, of applications that act for a user, and the
# signed ones of its jobs. The last two have dots and dashes in them, which shorter names have too.
TOKEN_PREFIXES = ("hf_", "api_org_", "hf_oauth_", "hf_jwt_")
_TOKEN = re.compile(rf"(?:{'|'.join(TOKEN_PREFIXES)})(?:[A-Za-z0-9._-]{{29,}}[A-Za-z0-9_-]|[A-Za-z0-9]{{20,}})")
SECRET_OPTION = re.compile(r"^--?[\w-]*(?:token|secret|password|api[-_]?key)$", re.IGNORECASE)
# An absolute path, or one below a home folder, up to its last part. A slash in a word or a web address begins none.
ABSOLUTE_PATH = re.compile(
    r"(?:file://|(?<![\w:/.~)-]))(?:~[\w.-]*/|/(?=[^\s/])|[A-Za-z]:[\\/])(?:[^\s/\\'\",;:()<>|`]+[\\/]+)*"
)


def holds_token(content: bytes) -> bool:
    """Whether a file's content has an access token of the Hub in it."""
    return _TOKEN.search(content.decode("latin-1")) is not None


def shareable_text(text: str) -> str:
    """The text with access tokens blotted out and of each absolute path the last part only."""
    return ABSOLUTE_PATH.sub("", _TOKEN.sub("hf_***", text))


def shareable(value: Any) -> Any:
    """A JSON value with [`shareable_text`] in place of every string in it, names of fields excepted."""
    if isinstance(value, dict):
        return {name: shareable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(entry) for entry in value]
    return shareable_text(value) if isinstance(value, str) else value


def shareable_command(arguments: Sequence[str]) -> str:
    """A program's `sys.argv` as the shell line that others type to repeat it.

    The program itself is named as the documentation does: `transformers-dsv3 VERB …`, `python examples/SCRIPT.py …`.
    Paths keep their last part; what follows an option for a secret, and everything that looks like the Hub's tokens,
    is blotted out.
    """
    program, *rest = arguments
    path = Path(program)
    if path.suffix == ".py":
        is_own = path.parts[-2:] == ("transformers_dsv3", "cli.py")
        script = f"{path.absolute().parent.name}/{path.name}"
        words = ["transformers-dsv3"] if is_own else ["python", script]
    else:
        words = [path.name]
    secret = False
    for argument in rest:
        option, equals, value = argument.partition("=")
        if secret:
            words.append("***")
        elif equals and SECRET_OPTION.match(option):
            words.append(f"{option}=***")
        elif equals and option.startswith("-"):
            words.append(f"{option}={_shareable_argument(value)}")
        else:
            words.append(_shareable_argument(argument))
        secret = bool(SECRET_OPTION.match(argument))
    return shlex.join(words)


def _shareable_argument(argument: str) -> str:
    # An argument is one path as a whole, blanks in it included
    if Path(argument).is_absolute() or argument.startswith("~"):
        argument = Path(argument).name
    return shareable_text(argument)
