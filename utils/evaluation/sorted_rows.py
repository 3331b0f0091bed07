"""Arrays written row by row from several processes, and sorted by key at the end, in constant memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from utils.errors import UserError
from utils.evaluation.comparison import require_unique
from utils.files import replacing
from utils.processes import Processes


class Place(NamedTuple):
    """Where a row waits: the process that wrote it, and its number there."""

    rank: int
    index: int


def sorted_places(keys: Sequence[str], processes: Processes, what: str) -> tuple[list[str], list[Place]]:
    """All processes' keys, sorted, and where each one's row is; every process calls this together.

    Raises:
        UserError: A key comes twice: no order would be the right one.
    """
    shares = processes.gather(list(keys))
    rows = sorted((key, Place(rank, index)) for rank, share in enumerate(shares) for index, key in enumerate(share))
    names = [key for key, _ in rows]
    require_unique(names, what)
    return names, [place for _, place in rows]


class SortedRows:
    """Rows of one shape on their way to one .npy file. Each process appends to a file of its own in `folder`.

    Several machines need a folder that all of them see.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: type, processes: Processes):
        self.folder, self.name, self.processes = folder, name, processes
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path(processes.rank), "wb")

    def _path(self, rank: int) -> Path:
        return self.folder / f".{self.name}.rank{rank}"

    def append(self, rows: np.ndarray) -> None:
        """Add rows, (B, *shape)."""
        if rows.shape[1:] != self.shape or rows.dtype != self.dtype:
            raise ValueError(f"rows of {self.name} are {self.shape} {self.dtype}, got {rows.shape[1:]} {rows.dtype}")
        self._file.write(np.ascontiguousarray(rows).tobytes())

    def rows(self, places: Sequence[Place]) -> Iterator[np.ndarray]:
        """The rows at the given places, in that order. Every process has closed its file before."""
        files = {}
        try:
            for place in places:
                if place.rank not in files:
                    files[place.rank] = open(self._path(place.rank), "rb")
                file = files[place.rank]
                file.seek(place.index * self.row_bytes)
                data = file.read(self.row_bytes)
                if len(data) != self.row_bytes:
                    raise UserError(f"{self._path(place.rank)} ends early: is the disk full?")
                yield np.frombuffer(data, self.dtype).reshape(self.shape)
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: processes on several machines need an --output_dir that all of them see"
            ) from error
        finally:
            for file in files.values():
                file.close()

    def close(self) -> None:
        """Finish appending, on every process together."""
        self._file.close()
        self.processes.wait()

    def write(self, path: Path, places: Sequence[Place]) -> None:
        """Write all rows, in the order of `places`, as one array (n, *shape); the file appears whole or not at all."""
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (len(places), *self.shape)}
        with replacing(path) as aside, open(aside, "wb") as file:
            npy.write_array_header_1_0(file, header)
            for row in self.rows(places):
                file.write(row.tobytes())

    def remove(self) -> None:
        """Delete this process's file."""
        self._file.close()
        self._path(self.processes.rank).unlink(missing_ok=True)
