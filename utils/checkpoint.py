"""Checkpoints that are whole or not there: written aside, flushed, renamed, verified, pruned."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from utils.errors import UserError, remedy
from utils.files import flush, sha256_of
from utils.processes import Processes

METADATA_FILE = "metadata.json"
WEIGHTS_FILE = "model.safetensors"  # in a run's output folder from its end on
CONFIG_FILE = "config.json"  # of the model, beside its weights
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], processes: Processes) -> None:
    """Write `folder/checkpoint-STEP` from all ranks so that a kill at any moment leaves the earlier ones usable.

    Args:
        write: Called on every rank with the temporary folder; writes that rank's files.

    Raises:
        UserError: A rank could not write its files. The earlier checkpoints are still there, and nothing else.
    """
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.part"
    with processes.careful(), writing(folder):
        if processes.is_main:
            remove_unfinished(folder)
            aside.mkdir(parents=True)
    processes.meet()
    try:
        with processes.careful(), writing(folder):
            write(aside)
        processes.meet()
        with processes.careful(), writing(folder):
            if processes.is_main:
                _seal(aside, step)
                shutil.rmtree(final, ignore_errors=True)
                os.rename(aside, final)
                flush(folder)
        processes.meet()
    except UserError:  # raised on the main rank
        remove_unfinished(folder)
        raise


def _seal(folder: Path, step: int) -> None:
    """List the files with sizes and SHA-256, and flush everything to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    metadata = {
        "global_step": step,
        "files": {str(path.relative_to(folder)): [path.stat().st_size, sha256_of(path)] for path in files},
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=1))
    for path in [*files, folder / METADATA_FILE, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make an error of the disk one sentence, whichever library raises it, that says where the run can continue."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason, action = str(error), "free space there"
        if isinstance(error, OSError):
            action = remedy(error)
        if isinstance(error, RuntimeError):
            if "iostream error" not in f"{error} {error.__context__}":
                raise
            reason = "PyTorch's file stream ended early, as it does on a full disk"
        last = latest_checkpoint(folder)
        raise UserError(
            f"cannot write to {folder} ({reason}): {action}; "
            + (f"the same command then continues from {last[1].name}" if last else "it holds no checkpoint yet")
        ) from error


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint, oldest first; unfinished ones have other names."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(folder: Path, say: Callable[[str], None] = lambda text: None) -> tuple[int, Path] | None:
    """The newest whole checkpoint, or None; `say` is told of each broken one that was skipped."""
    for step, path in reversed(checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return step, path
        say(f"skipped {path}: {problem}")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its own list of files; None where nothing is."""
    try:
        files = json.loads((checkpoint / METADATA_FILE).read_text())["files"]
        listed = [(name, size, digest) for name, (size, digest) in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{METADATA_FILE} is missing or damaged"
    for name, size, digest in listed:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_of(path) != digest:
            return f"{name} is damaged"
    return None


def prune(folder: Path, last_step: int, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every` (0: none of these).

    Args:
        last_step: Of the newest one. Any after it are broken, were skipped and will be written again.
    """
    ours = [(step, path) for step, path in checkpoints(folder) if step <= last_step]
    for step, path in ours[: -max(1, keep_last)]:
        if not keep_every or step % keep_every:
            # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under its name.
            doomed = path.with_name(f".{path.name}.part")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Delete what a kill in the middle of saving or pruning has left."""
    for aside in folder.glob(".checkpoint-*.part"):
        shutil.rmtree(aside)
