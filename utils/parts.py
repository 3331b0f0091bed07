"""Long work in numbered parts, shared by several processes; one that was killed goes on where it was."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.arrays import ARRAY_ERRORS
from utils.errors import UserError
from utils.files import read_json, write_arrays, write_json
from utils.lock import FolderLock
from utils.processes import Processes

PARTS, PLAN = "parts", "plan.json"
SOURCE = "source"  # in a plan: what tells the images from others; older plans do not say


class Parts:
    """The finished parts of a job, one file of arrays each, in the folder `parts` of `folder`.

    Every part depends on the plan and its own number alone, so neither the number of processes nor a restart changes
    what comes out. All processes make this object and call its methods together.

    Args:
        plan: Everything that the result depends on, as JSON. It is kept beside the parts, and the work of another plan
            is not continued.
        results: What will be made of the parts in `folder`: nothing of such a name may be there before the first part.

    Raises:
        UserError: The folder holds work of another plan, or what is no work of ours, or another process works in it.
    """

    def __init__(
        self, folder: Path, plan: dict[str, Any], num_parts: int, processes: Processes, results: Sequence[str] = ()
    ):
        self.folder, self.num_parts, self.processes = folder / PARTS, num_parts, processes
        self.lock = FolderLock(folder, processes)
        plan = json.loads(json.dumps(plan))
        with processes.careful():
            if processes.is_main and not (self.folder / PLAN).exists():
                check_free(folder, results)
                self.folder.mkdir(exist_ok=True)
                write_json(self.folder / PLAN, plan)
        processes.meet()
        check_plan(read_state(self.folder / PLAN, read_json), plan, folder)

    def mine(self) -> Iterator[int]:
        """This process's share of what is still to be done."""
        todo = [part for part in range(self.num_parts) if not self._path(part).exists()]
        # The list must be the same everywhere before anybody starts to shorten it.
        self.processes.wait()
        yield from todo[self.processes.rank :: self.processes.world_size]

    def write(self, part: int, **arrays: np.ndarray) -> None:
        """Keep a part's arrays; the file appears whole or not at all."""
        write_arrays(self._path(part), **arrays)

    def read(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The arrays of all parts, in order; an array is read when it is asked for, before the next part is."""
        for part in range(self.num_parts):
            with np.load(self._path(part), allow_pickle=False) as file:
                yield file

    def total(self) -> dict[str, np.ndarray]:
        """The sums of the arrays of all parts, always added in the same order."""
        total: dict[str, np.ndarray] = {}
        for part in self.read():
            for name in part:
                total[name] = total.get(name, 0) + part[name]
        return total

    def remove(self) -> None:
        """Delete the parts, once what is made of them is on disk; others may work in the folder again."""
        for path in (*map(self._path, range(self.num_parts)), self.folder / PLAN):
            path.unlink()
        with contextlib.suppress(OSError):  # somebody has put something there
            self.folder.rmdir()
        self.lock.release()

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.npz"


def check_free(folder: Path, results: Sequence[str]) -> None:
    """Refuse to begin where somebody has files of the names that will be written."""
    names = [name for name in results if os.path.lexists(folder / name)]
    if (folder / PARTS).exists() and any((folder / PARTS).iterdir()):
        names.append(PARTS)
    if names:
        raise foreign(folder, names)


def read_state(path: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What a command of ours has noted of its work, such as the plan: a mapping, as `read` takes it from the file.

    Raises:
        UserError: It is another program's file, or a damaged one.
    """
    try:
        return {**read(path)}
    except OSError:
        raise
    except (*ARRAY_ERRORS, TypeError, AttributeError) as error:
        raise foreign(path.parent, [path.name]) from error


def foreign(folder: Path, names: Sequence[str]) -> UserError:
    return UserError(
        f"{folder} holds {', '.join(names)}, and no command of ours has left that there: name another "
        "--output_dir, or move it away"
    )


def check_plan(there: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with work of another plan, naming what differs."""
    known = wanted if SOURCE in there else {name: value for name, value in wanted.items() if name != SOURCE}
    for name in sorted(there.keys() | known.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{folder} holds results of other settings: {name} was {_short(there.get(name))} and is now "
                f"{_short(wanted.get(name))}; give another --output_dir, or delete that folder"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
