"""What every command shares: one line for an error of the user, and the choice of the device."""

import sys
from collections.abc import Callable

import torch

from utils.errors import UserError
from utils.speed import keep_freed_memory


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; a `UserError` becomes one line on stderr and exit status 1.

    Errors of any other class are bugs of ours and keep their traceback.
    """
    keep_freed_memory()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
