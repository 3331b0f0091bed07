"""Where the repository is, and what a path that somebody typed means."""

import os
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


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
