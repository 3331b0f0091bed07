"""What every command shares: its flags, one line for an error of the user, a quiet Ctrl-C, the choice of the device.

A command imports this before anything else: from here on Ctrl-C ends it quietly, also while torch is imported.
"""

import argparse
import difflib
import io
import itertools
import os
import select
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from utils.errors import UserError, disk_error
from utils.paths import expanded, unexpanded

if TYPE_CHECKING:
    import torch


def _unhandled(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif missing := _missing_library(error):
        print(
            f"error: {missing} is not installed for {sys.executable}: activate the environment (source "
            ".venv/bin/activate), or install what the README says",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


def _missing_library(error: BaseException) -> str | None:
    """The library whose absence ended a command; None where a library lacks a part of itself, or for other errors."""
    library = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return library if library and library not in sys.modules else None


sys.excepthook = _unhandled


class Parser(argparse.ArgumentParser):
    """The flags of a command. A mistake in them is one line, with the flag that was probably meant, and exit status 2.

    Args:
        description: The documentation of the command, as it stands.
    """

    def __init__(self, description: str | None, **options: Any):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]  # argparse has overloads by the class of `namespace`
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        """Name first the flag that there is not: what argparse misses is then only what it stands for."""
        unknown = next((word for word in map(_name_of, self._words) if word and not self._knows(word)), None)
        if unknown:
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
            message = f"there is no {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

    def _knows(self, name: str) -> bool:
        return any(option.startswith(name) for option in self._option_string_actions)  # flags may be shortened


def _name_of(word: str) -> str | None:
    """The flag that a word of a command line names; None for a value, such as -1."""
    name = word.partition("=")[0]
    return name if name.startswith("-") and name.strip("-")[:1].isalpha() else None


def run(main: Callable[[], None], keeps_memory: bool = True) -> None:
    """Call a command's `main`; what a user can mend becomes one line on stderr and exit status 1.

    That is a `UserError`, an error of a disk, or a key that the command reads of a configuration that lacks it.

    Errors of any other class are bugs of ours and keep their traceback. What a terminal cannot print is escaped. In the
    command line `~` is expanded wherever a path may begin, and an empty argument is an error. Where a reader such as
    `head` has seen enough the end is quiet, with the status that a shell gives a program that SIGPIPE ends.

    Args:
        keeps_memory: See `utils.speed.keep_freed_memory`, which imports torch.
    """
    if keeps_memory:
        from utils.speed import keep_freed_memory  # torch is slow to import

        keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()  # here, where an error is still seen
    except BrokenPipeError:
        if not _drop_unread():
            raise
        sys.exit(128 + 13)


def _run(main: Callable[[], None]) -> None:
    try:
        sys.argv[1:] = checked(sys.argv[1:])
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (AttributeError, KeyError) as error:
        if not (key := getattr(error, "full_key", None)):  # OmegaConf's has one
            raise
        from utils.config import without

        print(f"error: {without(key)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if (sentence := disk_error(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _drop_unread() -> bool:
    """Whether nobody reads the standard output or error any more; what is left for it goes nowhere."""
    unread = [number for number in (1, 2) if _is_unread(number)]
    for number in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    return bool(unread)


def _is_unread(number: int) -> bool:
    """Whether the file of this number is a pipe whose other end is closed."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def checked(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, with home folders in place of `~`, which shells leave behind an equals sign.

    Raises:
        UserError: One is empty: an unset shell variable would make `--output_dir` the working directory. Or it holds a
            shell variable, and is no file. What a configuration's key is set to may refer to others as `${key}`.
    """
    for before, word in itertools.pairwise(["", *arguments]):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            what = name or (before if before.startswith("--") else "an argument")
            raise UserError(f"{what} is empty (an unset shell variable?): give it a value, or leave it out")
        may_refer = equals and not name.startswith("-")
        variable = unexpanded(word.replace("${", "") if may_refer else word)
        if variable and not os.path.isfile(word):
            raise UserError(f"{word} holds {variable}, which the shell has left as it is: write the path in full")
    return [expanded(word) for word in arguments]


def counted(number: int, noun: str) -> str:
    """How many, in words: "1 token", "1,024 tokens"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def pick_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU, whichever is there first."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({reason}); use auto, cpu, cuda, cuda:N or mps"
        ) from error
    return device
