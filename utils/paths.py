"""Where the repository is, and what a path that somebody typed means."""

import os
import re
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")


def unexpanded(text: str) -> str | None:
    """The first shell variable, `$NAME` or `${NAME}`, that no shell has replaced; it would name a folder."""
    found = VARIABLE.search(text)
    return found[0] if found else None


def expanded(text: str) -> str:
    """`text` with a home folder in place of `~` or `~user` at its start, or behind its first equals sign.

    Raises:
        UserError: There is no such user; a folder called `~user` would be made.
    """
    name, equals, value = text.partition("=") if not text.startswith("~") else ("", "", text)
    if not value.startswith("~"):
        return text
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"{text} names the home folder of a user who is not known here: write the path in full")
    return f"{name}{equals}{path}"
