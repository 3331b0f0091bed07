"""Checkpoints that are whole or not there: written aside, flushed, renamed, verified, pruned."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

METADATA_FILE = "metadata.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], barrier: Callable[[], None], is_main: bool
):
    """Write `folder/checkpoint-STEP` from all ranks so that a kill at any moment leaves the earlier ones usable.

    Args:
        write: Called on every rank with the temporary folder; writes that rank's files.
        barrier: Waits for all ranks.
        is_main: Whether this rank seals the checkpoint: list of files with sizes and SHA-256, flush, rename.
    """
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.part"
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    write(aside)
    barrier()
    if is_main:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        metadata = {
            "global_step": step,
            "files": {str(path.relative_to(aside)): [path.stat().st_size, _sha256(path)] for path in files},
        }
        (aside / METADATA_FILE).write_text(json.dumps(metadata, indent=1))
        for path in [*files, aside / METADATA_FILE, *(path for path in aside.rglob("*") if path.is_dir()), aside]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        _flush(folder)
    barrier()


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint, oldest first; unfinished ones have other names."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(folder: Path, say: Callable[[str], None] = lambda text: None) -> tuple[int, Path] | None:
    """The newest whole checkpoint, or None; `say` hears of each broken one that was passed over."""
    for step, path in reversed(checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return step, path
        say(f"passed over {path}: {problem}")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its own list of files; None where nothing is."""
    try:
        files = json.loads((checkpoint / METADATA_FILE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{METADATA_FILE} is missing or damaged"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _sha256(path) != digest:
            return f"{name} is damaged"
    return None


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every` (0: none of these)."""
    for step, path in checkpoints(folder)[: -max(1, keep_last)]:
        if not keep_every or step % keep_every:
            # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under its name.
            doomed = path.with_name(f".{path.name}.part")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
