"""Flags of the commands that are the fields of a dataclass of settings."""

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any


def add_fields(parser: argparse.ArgumentParser, settings: type, title: str) -> None:
    """A flag for every field of a dataclass, in a group of its own; `given_fields` reads them.

    A field's metadata may hold its `help` and `choices`. A flag of a bool may stand alone or take true or false.
    """
    group = parser.add_argument_group(title)
    for setting in fields(settings):
        group.add_argument(f"--{setting.name}", help=setting.metadata.get("help"), **_kind(setting))


def given_fields(arguments: argparse.Namespace, settings: type) -> Mapping[str, Any]:
    """The fields whose flags were given, with their values."""
    values = {setting.name: getattr(arguments, setting.name) for setting in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def _kind(setting: Field) -> dict[str, Any]:
    if setting.type is bool:
        return {"nargs": "?", "const": True, "type": true_or_false, "metavar": "true|false"}
    return {"type": setting.type, "choices": setting.metadata.get("choices")}


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return text.lower() == "true"
