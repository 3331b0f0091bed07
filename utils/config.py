"""Configurations: YAML files that build on one another, checked against typing errors.

A file may open with `defaults:`, a list of files relative to itself, merged left to right and each with its own
defaults first. Then comes its body, then `a.b=c` from the command line. Files reached through `defaults` may add keys;
the file that the user names and the command line may only change values, so a misspelt key is an error.
"""

import argparse
import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import UserError
from utils.files import write_text
from utils.limits import FINITE, complaint
from utils.paths import expanded, unexpanded

USAGE = """\
arguments:
  config=PATH   the configuration file
  a.b=c         a value of it to change; any number of them, each key as nested in the file

examples:
  config={example}
  config={example} training.max_train_steps=2000 experiment.output_dir=checkpoints/short
  config={example} dry_run=true      prints the resolved configuration and trains nothing
"""


RUN_CONFIG = "config.yaml"  # in a run's output folder
OUTPUT_DIR = "experiment.output_dir"
SECTIONS = ("experiment", "model", "dataset", "training")
# `${section.key}` refers to another value. What has more to it calls a function of OmegaConf.
CALL = re.compile(r"\$\{(?![\w.\[\]-]+\})")


class ConfigError(UserError):
    """A configuration that cannot be used; the text names the file or override, and the key."""


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a configuration file with its defaults, then apply `a.b=c` overrides.

    The result is in struct mode: reading or setting a key that is not there is an error. A value that begins with `~`
    is a path in a home folder; other paths stay as written, relative to the working directory. A file without
    `defaults` (one that `save_config` wrote) is taken as it is.

    Raises:
        ConfigError: A file is missing or not YAML, a key is unknown, a value has the wrong type, or a value
            is still undecided (`???`) or refers to anything but a key that exists, or a number is outside the range
            that `utils.limits` gives it, or `experiment.output_dir` is empty.
    """
    path = Path(expanded(os.fspath(path)))
    body, defaults = _read(path)
    config = _merge_defaults(path, defaults, chain=[path])
    if defaults:
        config = _change(config, _plain(body), source=str(path))
    else:
        config = body
    for override in overrides:
        config = _override(config, override)
    _expand_home(config)
    _check_decided(config, source=str(path))
    OmegaConf.set_struct(config, True)
    return config


def lenient_config(config: Mapping[str, Any]) -> DictConfig:
    """Wrap the configuration that a checkpoint carries: unknown keys are kept, readers default the missing ones.

    A DictConfig is returned as it is, so that models take either.
    """
    if isinstance(config, DictConfig):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(f"a configuration is a mapping of sections (model, ...), got {type(config).__name__}")
    _refuse_calls(config, source="the configuration of a checkpoint")
    return OmegaConf.create(dict(config))


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as dicts, lists and scalars, every `${...}` resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def save_config(config: DictConfig, path: str | os.PathLike) -> None:
    """Write the configuration as one YAML file; `config=` that file repeats the run, and `a.b=c` behind it changes it.

    A `${...}` stays one, so that a value follows the one that it refers to.
    """
    header = "# The whole configuration of this run. Given as config=THIS_FILE it repeats the run.\n"
    write_text(Path(path), header + OmegaConf.to_yaml(config, resolve=False))


def check_kind(config: DictConfig, source: str | os.PathLike, *kinds: str) -> str:
    """Which of `kinds` a configuration describes: teacher, tokenizer, generator, or evaluation.

    Args:
        source: Its file, for the error.

    Raises:
        ConfigError: It describes something else, or no model at all.
    """
    if "model" not in config:
        raise ConfigError(f"{source} has no section model: give a file that describes a model, as in configs/training")
    kind = "tokenizer"
    if config.model.get("generator") is not None:
        kind = "generator"
    elif config.model.get("type") == "pixel_vqgan":
        kind = "teacher"
    elif "optimizer" not in config:
        kind = "evaluation"
    wanted = " or ".join(f"a {name}" for name in kinds)
    if kind == "evaluation" and kind not in kinds:
        raise ConfigError(f"{source} is for evaluation, and this command needs the training of {wanted}")
    if kind not in kinds:
        raise ConfigError(
            f"{source} describes a {kind}, and this command needs {wanted}: a {kind} is trained by "
            f"scripts/train_{kind}.py"
        )
    return kind


def without(key: str) -> str:
    """What is said of a configuration that lacks a key: it is one of another kind."""
    return (
        f"the configuration has no {key}, which is read here: give one of a whole model or run, as in configs/fashion, "
        "configs/emoji and configs/eval, or a file that has such a list under defaults:"
    )


def value_of(config: DictConfig, key: str) -> Any:
    """The value under a dotted key.

    Raises:
        ConfigError: There is none.
    """
    value = OmegaConf.select(config, key)
    if value is None:
        raise ConfigError(without(key))
    return value


def keep_changed(config: DictConfig, path: Path, kept_as: str) -> tuple[list[str], Path]:
    """Keep a run's configuration file beside itself where `config`, which is to take its place, differs from it.

    Args:
        kept_as: Name of the copy, without its ending; numbered where that name is taken.

    Returns:
        What differs, each as "key: old -> new", and the copy; where the folder has been moved to is no difference.
    """
    if not path.exists():
        return [], path
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        old = _flatten(to_plain(_read(path)[0]))
    except (ConfigError, OmegaConfBaseException):  # it is broken, or refers to a key that there is not
        old = {}
    new = _flatten(to_plain(config))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name, "") != new.get(name, "")]
    changes = [f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}" for name in changed if name != OUTPUT_DIR]
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    copies = (path.with_name(f"{kept_as}{number}.yaml") for number in numbers)
    copy = next(copy for copy in copies if not copy.exists())
    if changes:
        write_text(copy, text)
    return changes, copy


def training_arguments(argv: Sequence[str] | None = None, *, description: str, example: str, kind: str) -> DictConfig:
    """Parse `config=PATH a.b=c ...` (and `--help`) from `argv`, the command line when not given.

    Args:
        description: What the command does, for `--help`.
        example: A configuration to show in `--help` and in errors.
        kind: What the command trains: teacher, tokenizer or generator.

    Raises:
        ConfigError: As `load_config`, or there is no `config=PATH`, or the file lacks a section that training reads or
            describes another kind of model.
    """
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s config=PATH [a.b=c ...]",
        epilog=USAGE.format(example=example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    known, flags = parser.parse_known_args(argv)
    path, overrides = None, []
    for argument in known.arguments + flags:
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            hint = f"config={argument}" if argument.endswith((".yaml", ".yml")) else "config=PATH or a.b=c"
            raise ConfigError(f"cannot read the argument {argument!r}: write {hint} (--help shows examples)")
        if key != "config":
            overrides.append(argument)
        elif path is not None:
            raise ConfigError(f"one config=PATH is expected, got {path} and {value}")
        else:
            path = value
    if not path:
        raise ConfigError(f"no configuration given: write config=PATH, for example config={example}")
    config = load_config(path, overrides)
    missing = [section for section in SECTIONS if section not in config]
    if missing:
        raise ConfigError(
            f"{path} has no section {' nor '.join(missing)}: open it with a list under defaults: that brings them, "
            f"as the files in configs/training do"
        )
    check_kind(config, path, kind)
    return config


def _read(path: Path) -> tuple[DictConfig, list[str]]:
    """One file's body, and the list under its `defaults` key."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f" (working directory {Path.cwd()})"
        raise ConfigError(f"configuration file {path} does not exist{hint}")
    try:
        body = OmegaConf.create(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}, line {mark.line + 1}: not valid YAML: {error.problem or error.context}") from error
    except AssertionError as error:  # OmegaConf's, of a file that holds one number or truth
        raise ConfigError(f"{path}: a configuration is a mapping of sections, got one value") from error
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {_one_line(error)}") from error
    # OmegaConf reads a file that holds one bare word as {word: null}.
    if not isinstance(body, DictConfig):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, got a list")
    values = _plain(body)
    defaults = values.pop("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise ConfigError(f"{path}: defaults must be a list of file names, got {defaults}")
    return OmegaConf.create(values), defaults


def _merge_defaults(path: Path, defaults: list[str], chain: list[Path]) -> DictConfig:
    config = OmegaConf.create()
    for name in defaults:
        file = path.parent / name
        if file.resolve() in [link.resolve() for link in chain]:
            raise ConfigError(f"defaults form a cycle: {' -> '.join(map(str, [*chain, file]))}")
        if not file.is_file():
            raise ConfigError(f"{path}: defaults name {name}, but there is no {file} (names are relative to the file)")
        body, deeper = _read(file)
        try:
            merged = OmegaConf.merge(config, _merge_defaults(file, deeper, [*chain, file]), body)
            config = cast(DictConfig, merged)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}: cannot merge {name}: {_one_line(error)}") from error
    return config


def _override(config: DictConfig, override: str) -> DictConfig:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"an override is written a.b=c, got {override!r}")
    source = f"override {override if override.isprintable() else repr(override)}"
    # A string is taken to the letter: shard names such as {000..320}.tar are no YAML.
    if isinstance(_resolved(config, name), str) and text != "null":
        value = text
    else:
        try:
            value = _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeError) as error:
            raise ConfigError(f"{source}: cannot read the value {text!r}: {_one_line(error)}") from error
    return _change(config, {name: value}, source=source)


def _change(config: DictConfig, changes: Mapping[str, Any], source: str) -> DictConfig:
    """Change values of keys that exist; anything else is an error that names `source`."""
    leaves = _flatten(_plain(config))
    sections = {name[:dot] for name in leaves for dot in range(len(name)) if name[dot] == "."}
    for name, value in _flatten(changes).items():
        if name in sections:
            raise ConfigError(f"{source}: {name} is a section with keys of its own, it cannot be set to {value!r}")
        if name not in leaves:
            raise ConfigError(f"{source}: unknown key {name}; {_suggestion(name, list(leaves), sections)}")
        fitted = _fit(value, _resolved(config, name), f"{source}: {name}")
        OmegaConf.update(config, name, fitted, merge=False)
    return config


def _fit(value: Any, current: Any, what: str) -> Any:
    """`value` in the type of the value that it replaces; null, and a `${...}` still to be resolved, fit anywhere."""
    if value is None or current is None or (isinstance(value, str) and "${" in value):
        return value
    is_number = isinstance(value, float) or (
        isinstance(value, int) and abs(value) <= FINITE and not isinstance(value, bool)
    )
    if isinstance(current, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(current, int):
        fits, wanted = is_number and float(value).is_integer(), "a whole number"
    elif isinstance(current, float):
        fits, wanted = is_number, "a number"
    elif isinstance(current, str):
        # YAML reads True as a truth, the command line as text.
        is_choice = isinstance(value, bool) and current.lower() in ("auto", "true", "false")
        fits, wanted = is_number or isinstance(value, str) or is_choice, "a string"
    else:
        return _fit_list(value, current, what)
    if not fits:
        raise ConfigError(f"{what} must be {wanted} (as {current!r}), got {value!r}")
    return type(current)(value)


def _fit_list(value: Any, current: Sequence[Any], what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{what} must be a list such as [1,2,4], got {value!r}")
    return [_fit(element, current[0] if len(current) else None, f"an element of {what}") for element in value]


def _suggestion(name: str, leaves: list[str], sections: set[str]) -> str:
    """What the author of an unknown key probably meant."""
    last = name.rpartition(".")[2]
    same_name = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    near = same_name or difflib.get_close_matches(name, leaves, n=2, cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    section = name.rpartition(".")[0]
    while section not in sections and section:
        section = section.rpartition(".")[0]
    prefix = f"{section}." if section else ""
    keys = sorted({leaf[len(prefix) :].partition(".")[0] for leaf in leaves if leaf.startswith(prefix)})
    return f"the keys of {section or 'a configuration'} are {', '.join(keys)}"


def _refuse_calls(values: Mapping[str, Any], source: str) -> None:
    """By `${oc.env:NAME}` a file from elsewhere could put the user's environment into what is saved and published."""
    for name, value in _flatten(values).items():
        if CALL.search(str(value)):
            raise ConfigError(f"{source}: {name} may refer to other keys as ${{section.key}} only, got {value!r}")


def _expand_home(config: DictConfig) -> None:
    for name, value in _flatten(_plain(config)).items():
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(config, name, expanded(value), merge=False)


def _check_decided(config: DictConfig, source: str) -> None:
    _refuse_calls(_plain(config), source)
    undecided = [name for name, value in _flatten(_plain(config)).items() if value == "???"]
    if undecided:
        example = " ".join(f"{name}=VALUE" for name in undecided)
        raise ConfigError(f"{source} leaves a value undecided (???): set it in the file or add {example}")
    try:
        values = to_plain(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key or 'a value'} cannot be resolved: {_one_line(error)}") from error
    if wrong := complaint(_flatten(values)):
        raise ConfigError(f"{source}: {wrong}")
    try:
        output_dir = OmegaConf.select(config, OUTPUT_DIR, default="not read by this command")
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {OUTPUT_DIR} cannot be read: {_one_line(error)}") from error
    if not str(output_dir or "").strip():  # would be the working directory
        raise ConfigError(f"{source}: {OUTPUT_DIR} is empty (an unset shell variable?): add {OUTPUT_DIR}=FOLDER")
    for name, value in _flatten(values).items():
        if isinstance(value, str) and not value.startswith("pipe:") and (variable := unexpanded(value)):
            raise ConfigError(f"{source}: {name} holds {variable}, and no shell reads it here: write the path in full")


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _resolved(config: DictConfig, name: str) -> Any:
    """The value under a dotted name; None where there is none, or where it does not resolve yet."""
    try:
        return OmegaConf.select(config, name)
    except OmegaConfBaseException:
        return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    leaves = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves.update(_flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
