"""Which files a command reads and which it writes of them: files, folders with their tree, the standard streams."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.image_sources import walk
from utils.errors import UserError, with_reasons
from utils.files import check_writable, replacing

EXTENSION = ".1dp"
STREAM = "-"


@dataclass(frozen=True)
class Conversion:
    """A file to read and the one to write of it; None means the standard stream."""

    source: Path | None
    target: Path | None

    @property
    def name(self) -> str:
        return "standard input" if self.source is None else str(self.source)

    def read(self) -> bytes:
        """
        Raises:
            OSError: The file cannot be read.
        """
        return sys.stdin.buffer.read() if self.source is None else self.source.read_bytes()

    def write(self, data: bytes) -> None:
        """Write the whole target or nothing of it."""
        if self.target is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        with replacing(self.target) as aside:
            aside.write_bytes(data)


def place_of(written: Sequence[Conversion]) -> str:
    """Where to look for what was written: the file, or the folder that all of it is in."""
    if any(one.target is None for one in written):
        return "the standard output"
    if len(written) == 1:
        return str(written[0].target)
    return os.path.commonpath([one.target.parent for one in written]) or "."


def conversions(
    given: str, output: str | None, ending: str, list_files: Callable[[Path], list[str]], *, force: bool
) -> list[Conversion]:
    """What a command line IN [-o OUT] means.

    A file becomes one beside it, `output`, or one in the folder `output`; the files of a folder one each of the same
    name, in the folder itself or in the tree of `output`; the standard input becomes the standard output or `output`.

    Args:
        ending: Of what is written, with the dot.
        list_files: The files of a folder that are meant, relative to it.
        force: Replace files that are there.

    Raises:
        UserError: There is nothing to read, files are in the way, two would become one, or nothing can be written
            there.
    """
    source, target = Path(given), Path(output or "")
    if given == STREAM:
        found = [Conversion(None, None if output in (None, STREAM) else target)]
    elif source.is_dir():
        if output == STREAM or target.is_file():
            raise UserError(f"{given} is a folder, and so must be what is written: give a folder as --output")
        names = list_files(source)
        if not names:
            raise UserError(f"{given} is a folder without files to read: name another, or a file")
        folder = source if output is None else target
        found = [Conversion(source / name, (folder / name).with_suffix(ending)) for name in names]
    elif source.is_file():
        beside = source.with_suffix(ending)
        found = [Conversion(source, _single_target(output, beside))]
    else:
        raise UserError(f"{given} is neither a file nor a folder (from {Path.cwd()}), nor - for the standard input")
    if any(one.target is None for one in found) and sys.stdout.isatty():
        raise UserError("the standard output is a terminal: send it into a file (> FILE), or give --output")
    _check_targets(found, force)
    for folder in {one.target.parent for one in found if one.target is not None}:
        check_writable(folder)
    return found


def _single_target(output: str | None, beside: Path) -> Path | None:
    if output == STREAM:
        return None
    if output is None:
        return beside
    is_folder = Path(output).is_dir() or output.endswith(os.sep)
    return Path(output) / beside.name if is_folder else Path(output)


def _check_targets(found: list[Conversion], force: bool) -> None:
    sources: dict[Path, Conversion] = {}
    for one in found:
        if one.target is None:
            continue
        if (other := sources.setdefault(one.target, one)) is not one:
            raise UserError(f"{other.source} and {one.source} would both become {one.target}: rename one of them")
        if one.source is not None and one.target.exists() and one.target.samefile(one.source):
            raise UserError(f"{one.source} would be replaced by what is made of it: give another --output")
    there = [path for path in sources if path.exists()]
    if there and not force:
        more = f" and {len(there) - 1} more are" if len(there) > 1 else " is"
        raise UserError(f"{there[0]}{more} there already: give --force to replace, or another --output")


def list_compressed(folder: Path) -> list[str]:
    """Paths of compressed files below a folder, relative to it, sorted; found as `walk` finds images."""
    found = (parent.relative_to(folder) / name for parent, names in walk(folder) for name in names)
    return sorted(path.as_posix() for path in found if path.suffix.lower() == EXTENSION)


def report_failures(failures: list[tuple[Conversion, str]], total: int) -> None:
    """End a command some of whose files failed.

    Raises:
        UserError: Some did; it names up to three of them, with the reasons.
    """
    if not failures:
        return
    if total == 1:
        raise UserError(f"{failures[0][0].name}: {failures[0][1]}")
    named = with_reasons([(one.name, reason) for one, reason in failures])
    others = "; the others are done" if len(failures) < total else ""
    raise UserError(f"{len(failures)} of {total} files failed: {named}{others}")
