"""What every command shares: its arguments checked, one line for an error of the user, the choice of the device."""

import itertools
import sys
from collections.abc import Callable, Sequence

import torch

from utils.errors import UserError, disk_error
from utils.paths import expanded
from utils.speed import keep_freed_memory


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; a `UserError`, or an error of a disk, becomes one line on stderr and exit status 1.

    Errors of any other class are bugs of ours and keep their traceback. What a terminal cannot print is escaped. In the
    command line `~` is expanded wherever a path may begin, and an empty argument is an error.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.argv[1:] = checked(sys.argv[1:])
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if (sentence := disk_error(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def checked(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, with home folders in place of `~`, which shells leave behind an equals sign.

    Raises:
        UserError: One is empty: an unset shell variable would make `--output_dir` the working directory.
    """
    for before, word in itertools.pairwise(["", *arguments]):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            what = name or (before if before.startswith("--") else "an argument")
            raise UserError(f"{what} is empty (an unset shell variable?): give it a value, or leave it out")
    return [expanded(word) for word in arguments]


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU, whichever is there first."""
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
