"""A folder of results, in which a command replaces its own files and no others."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import replacing, sha256_of

# Each file that was written here, a JSON object a line: its name and, once it is whole, its checksum, by which it
# is known again. Of lines of the same name the last counts. Older lists have bare names. A file without a checksum is
# nobody's for certain: a run was killed that may have written it, or not yet, and it is never removed or replaced.
LIST = ".results"
SHEETS = {"contact_sheet.png", "grid.png", "lengths.png"}  # images of images
FIGURES = {"curves.png", "sweep.png"}  # beside the metrics.json of an evaluation
MOST_NAMED = 3  # files in an error
LARGE = 1 << 26  # bytes, above which a file is known by its size and time in place of its checksum


class ResultFolder:
    """Where a command writes its files: `folder / name` is the path to write one to.

    What is there and in no list, or was changed since, is somebody else's and stays as it is. A context, at whose end,
    also by an error or Ctrl-C, it is noted what was written; of a run that is killed the last file alone is not.

    Args:
        path: Created where it is missing.
        clears: The first file that is written removes all that the list of the run before has, so that results of two
            runs never mix. Otherwise they stay until they are replaced.
        flag: That names the folder, or a file in it, for errors.

    Raises:
        UserError: The folder cannot be created, or its list cannot be read.
    """

    def __init__(self, path: str | os.PathLike, clears: bool = True, flag: str = "--output_dir"):
        self.path, self.clears, self.flag = Path(path), clears, flag
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {path} cannot be created ({error.strerror}): name another folder") from error
        self._listed = _read_list(self.path, flag)
        self._written: set[str] = set()
        self._unmarked: dict[str, None] = {}  # of what is written, in this order
        self._is_begun = False

    def __enter__(self) -> "ResultFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # the first error counts
            self.finish()

    def claim(self, names: Iterable[str]) -> str:
        """Refuse, before the work, to write over what is not ours.

        Returns:
            What to say of earlier results that will be removed, and not only replaced; empty where there are none.

        Raises:
            UserError: A file or folder of such a name is there, and no run of ours has left it so.
        """
        names = set(names)
        foreign = sorted(name for name in names if self._is_foreign(name))
        if foreign:
            named = ", ".join(foreign[:MOST_NAMED]) + (", ..." if len(foreign) > MOST_NAMED else "")
            it = "it" if len(foreign) == 1 else "them"
            cut = ", or one that was cut short" if any(name in self._listed for name in foreign) else ""
            raise UserError(
                f"{self.path} holds {named}, and no command of ours has left {it} there{cut}: name another "
                f"{self.flag}, or move {it} away"
            )
        removed = self.left(self._listed.keys() - names)
        if not removed or not self.clears or self._is_begun:
            return ""
        return will_be_removed(self.path, removed)

    def left(self, names: Iterable[str]) -> list[str]:
        """Of these names, sorted, those of files that a run before has left and this one has not written."""
        return sorted(name for name in names if name not in self._written and self._is_ours(name))

    def remove(self, names: Iterable[str]) -> None:
        """Remove what a run before has left of these names, and the folder where that leaves it empty."""
        for name in self.left(names):
            (self.path / name).unlink()
            del self._listed[name]
            self._append({name: None})
        if not self._written and {path.name for path in self.path.iterdir()} <= {LIST}:
            (self.path / LIST).unlink(missing_ok=True)
            self.path.rmdir()

    def __truediv__(self, name: str) -> Path:
        self.claim([name])
        self._begin()
        if self._unmarked:
            self._mark_last()
        self._list([name])
        return self.path / name

    def enter(self, names: Iterable[str]) -> None:
        """List many files at once, which others will write, as other processes do."""
        names = list(names)
        self.claim(names)
        self._begin()
        self._list(names)

    def finish(self) -> None:
        """All that was written is whole: note by which mark each file is known again."""
        there = [name for name in self._unmarked if (self.path / name).is_file()]
        self._unmarked.clear()
        if there:
            self._append({name: _mark(self.path / name) for name in there})

    def _list(self, names: Sequence[str]) -> None:
        """Names of what will be written; what is there until then keeps its mark."""
        self._written.update(names)
        self._unmarked.update(dict.fromkeys(names))
        self._append({name: self._listed.get(name) for name in names})

    def _mark_last(self) -> None:
        """The file before this one is whole, unless it is still the one of the run before."""
        name = next(reversed(self._unmarked))
        mark = _mark(self.path / name) if (self.path / name).is_file() else None
        if mark is not None and mark != self._listed.get(name):
            del self._unmarked[name]
            self._append({name: mark})

    def _begin(self) -> None:
        """Before the first file: remove or keep what the list has, and write it again without its doubles."""
        if self._is_begun:
            return
        self._is_begun = True
        kept = {} if self.clears else self._listed
        for name in self._listed.keys() - kept.keys():
            if self._is_ours(name):
                (self.path / name).unlink()
        self._listed = kept
        with replacing(self.path / LIST) as aside:
            aside.touch()
        self._append(kept)

    def _append(self, marks: Mapping[str, str | None]) -> None:
        with (self.path / LIST).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"name": name, "mark": mark}) + "\n" for name, mark in marks.items())

    def _is_foreign(self, name: str) -> bool:
        return os.path.lexists(self.path / name) and name not in self._written and not self._is_ours(name)

    def _is_ours(self, name: str) -> bool:
        """Whether a file is there as a run of ours has left it."""
        path = self.path / name
        if name not in self._listed or path.is_symlink() or not path.is_file():
            return False
        return _mark(path) == self._listed[name]


class ResultPaths:
    """Results at any paths, in folders that several commands share: each replaces its own, and nobody else's.

    A context, as `ResultFolder`.

    Args:
        flag: As of `ResultFolder`.
    """

    def __init__(self, flag: str = "--output_dir") -> None:
        self.flag = flag
        self._folders: dict[Path, ResultFolder] = {}

    def __enter__(self) -> "ResultPaths":
        return self

    def __exit__(self, *error: Any) -> None:
        for folder in self._folders.values():
            folder.__exit__(*error)

    def claim(self, *paths: Path) -> None:
        """Refuse, before the work, to write over what is not ours; the folders are created."""
        for path in paths:
            self.folder(path).claim([path.name])

    def place(self, path: Path) -> Path:
        """The path itself, listed as ours from now on."""
        return self.folder(path) / path.name

    def left(self, *paths: Path) -> list[Path]:
        """Of these paths, those of files that a run before has left and this one has not written, the deepest first."""
        found = [path for path in paths if path.is_file() and self.folder(path).left([path.name])]
        return sorted(found, key=lambda path: (-len(path.parts), path))

    def remove(self, *paths: Path) -> None:
        """Remove what a run before has left at these paths, and the folders that this leaves empty."""
        for folder, group in groupby(self.left(*paths), key=lambda path: path.parent):
            self._folders[folder].remove([path.name for path in group])

    def folder(self, path: Path) -> ResultFolder:
        if path.parent not in self._folders:
            self._folders[path.parent] = ResultFolder(path.parent, clears=False, flag=self.flag)
        return self._folders[path.parent]

    def finish(self) -> None:
        """What was written is whole."""
        for folder in self._folders.values():
            folder.finish()


def will_be_removed(folder: Path, names: Sequence[str]) -> str:
    """What is said of results of the run before that this one does not replace."""
    return f"{len(names)} of the run before will be removed from {folder}, such as {names[0]}"


def results_in(folder: Path) -> set[str]:
    """Names of the files in a folder that a command has listed as its results; none where the list is unreadable."""
    try:
        return set(_read_list(folder))
    except UserError:  # another program's file of that name must not keep images from being read
        return set()


def sheets_in(folder: Path) -> set[str]:
    """Names of the sheets and figures that our commands have put beside the images of a folder."""
    return (results_in(folder) & SHEETS) | (FIGURES if (folder / "metrics.json").is_file() else set())


def _mark(path: Path) -> str:
    """What a file is known by again."""
    facts = path.stat()
    return sha256_of(path) if facts.st_size <= LARGE else f"{facts.st_size} bytes of {facts.st_mtime_ns}"


def _read_list(folder: Path, flag: str = "--output_dir") -> dict[str, str | None]:
    """The listed files of a folder by name, with their marks where they are known."""
    path = folder / LIST
    found: dict[str, str | None] = {}
    if not path.is_file():
        return found
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            name = Path(entry if isinstance(entry, str) else entry["name"]).name
            found[name] = None if isinstance(entry, str) else entry["mark"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} must list the results that are in its folder, and cannot be read ({error!r}): name another "
            f"{flag}, or move this one's files away"
        ) from error
    return found
