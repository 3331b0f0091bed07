"""The files of a set of reconstructions, sorted by key: images.npy, raw.npy, tokens.npz, labels.npy, png/000000.png."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from utils.evaluation.sorted_rows import Place, SortedRows, sorted_places
from utils.files import write_array
from utils.images import write_image
from utils.processes import Processes
from utils.result_folder import ResultFolder, ResultPaths
from utils.tokens import TOKENS_FILE, write_tokens

RECORD = "reconstruction.json"
Length = int | None  # None: all tokens, or no tokens at all


class Made(NamedTuple):
    """What was made of a batch of images.

    Attributes:
        images: By the length that they were decoded from, (B, P, P, 3) uint8.
        raws: The same before rounding, float32, unclamped; where they are wanted.
        tokens: (B, N) int32; None where they are not wanted.
    """

    images: Mapping[Length, np.ndarray]
    raws: Mapping[Length, np.ndarray]
    tokens: np.ndarray | None


class Wanted(NamedTuple):
    """What is to be written.

    Attributes:
        lengths: Of the images; empty for no images.
        apart: Each length has a folder of its own.
        raw, tokens, labels, png: Write these too.
    """

    lengths: Sequence[Length]
    apart: bool = False
    raw: bool = False
    tokens: bool = False
    labels: bool = False
    png: bool = False

    def folders(self, output_dir: Path) -> dict[Length, Path]:
        """Where the images of each length go."""
        return {length: output_dir / f"length_{length}" if self.apart else output_dir for length in self.lengths}

    def names(self, output_dir: Path) -> list[str]:
        """The files, by their paths in `output_dir`; of PNG files those that are there now."""
        folders = list(self.folders(output_dir).values())
        paths = [folder / name for folder in folders for name in ["images.npy"] + ["raw.npy"] * self.raw]
        paths += [path for folder in folders if self.png for path in (folder / "png").glob("[0-9]*.png")]
        once = [RECORD] + [TOKENS_FILE] * self.tokens + ["labels.npy"] * self.labels
        return once + [path.relative_to(output_dir).as_posix() for path in paths]

    def others(self, output_dir: Path) -> list[str]:
        """The files that are there and that another run of this kind may have written, by their paths likewise."""
        folders = "", "length_*/"
        patterns = [TOKENS_FILE, "labels.npy"]
        patterns += [f"{folder}{name}" for folder in folders for name in ("images.npy", "raw.npy", "png/[0-9]*.png")]
        there = {path.relative_to(output_dir).as_posix() for pattern in patterns for path in output_dir.glob(pattern)}
        return sorted(there - set(self.names(output_dir)))


class ReconstructionFiles:
    """Reconstructions on their way to their files, each process its share; a context, which removes what is unfinished.

    All processes make it and call its methods together, `add` apart.

    Args:
        output_dir: The folder of what there is once, labels and tokens.
        size: Pixels a side.
        results: Lists what is written.
    """

    def __init__(self, output_dir: Path, wanted: Wanted, size: int, processes: Processes, results: ResultPaths):
        self.output_dir, self.wanted, self.processes, self.results = output_dir, wanted, processes, results
        self.folders, shape = wanted.folders(output_dir), (size, size, 3)
        self.images = {
            length: SortedRows(folder, "images.npy", shape, np.uint8, processes)
            for length, folder in self.folders.items()
        }
        self.raws = {
            length: SortedRows(folder, "raw.npy", shape, np.float32, processes)
            for length, folder in (self.folders.items() if wanted.raw else ())
        }
        self.keys: list[str] = []
        self.labels: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []
        self.names: list[str] = []  # of all processes, sorted
        self.places: list[Place] = []  # of their rows

    def __enter__(self) -> "ReconstructionFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for rows in (*self.images.values(), *self.raws.values()):
            rows.remove()

    def add(self, keys: Sequence[str], labels: np.ndarray, made: Made) -> None:
        """Add one batch: names, class ids (B,) and what was made of it."""
        self.keys += keys
        self.labels.append(labels)
        if made.tokens is not None:
            self.tokens.append(made.tokens)
        for store, found in ((self.images, made.images), (self.raws, made.raws)):
            for length, rows in found.items():
                store[length].append(rows)

    def sort(self, what: str) -> list[str]:
        """The keys of all processes, sorted. Nothing is added after this.

        Raises:
            UserError: A key comes twice in the set, which is called `what`.
        """
        for rows in (*self.images.values(), *self.raws.values()):
            rows.close()
        self.names, self.places = sorted_places(self.keys, self.processes, what)
        return self.names

    def write(self, about: Mapping[str, Any]) -> list[Path | str]:
        """Write everything, sorted: the files, for people, on the first process.

        Args:
            about: What made the tokens, for `utils.tokens.write_tokens`.
        """
        written: list[Path | str] = []
        shares = self.processes.gather((self.labels, self.tokens))
        if self.processes.is_main:
            self.results.remove(self.output_dir / RECORD)  # the names of images that are replaced from here on
            for length, folder in self.folders.items():
                written += self._write_arrays(length, folder)
            if self.wanted.labels:
                written.append(self.output_dir / "labels.npy")
                write_array(self.results.place(written[-1]), self._sorted([share[0] for share in shares]))
            if self.wanted.tokens:
                written.append(self.output_dir / TOKENS_FILE)
                all_labels, all_tokens = (self._sorted([share[kind] for share in shares]) for kind in (0, 1))
                write_tokens(self.results.place(written[-1]), all_tokens, self.names, labels=all_labels, **about)
        if self.wanted.png:
            for length, folder in self.folders.items():
                self._write_pngs(self.images[length], folder / "png")
                written.append(folder / "png" / f"000000.png ... {len(self.places) - 1:06d}.png")
        self.processes.wait()
        return written

    def _write_arrays(self, length: Length, folder: Path) -> list[Path]:
        stores = {folder / "images.npy": self.images, folder / "raw.npy": self.raws}
        written = {path: store[length] for path, store in stores.items() if length in store}
        for path, rows in written.items():
            rows.write(self.results.place(path), self.places)
        return list(written)

    def _sorted(self, shares: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Rows of all processes' batches in the order of the keys."""
        first = np.cumsum([0, *(sum(map(len, share)) for share in shares)])
        rows = np.concatenate([batch for share in shares for batch in share])
        return rows[[first[place.rank] + place.index for place in self.places]]

    def _write_pngs(self, images: SortedRows, folder: Path) -> None:
        """Numbered files; the processes share the work."""
        with contextlib.ExitStack() as stack:
            if self.processes.is_main:
                results = stack.enter_context(ResultFolder(folder))
                results.enter([f"{index:06d}.png" for index in range(len(self.places))])
            self.processes.wait()
            self._write_share(images, folder)
            self.processes.wait()

    def _write_share(self, images: SortedRows, folder: Path) -> None:
        from PIL import Image

        mine = range(self.processes.rank, len(self.places), self.processes.world_size)
        rows = tqdm(
            images.rows([self.places[index] for index in mine]),
            desc="png", unit="image", total=len(mine), disable=not self.processes.is_main, dynamic_ncols=True,
        )  # fmt: skip
        for index, row in zip(mine, rows, strict=True):
            write_image(Image.fromarray(row), folder / f"{index:06d}.png")


def keys_text(keys: Sequence[str]) -> str:
    """The keys as the record holds them: on one line, whatever characters are in them."""
    return json.dumps(list(keys))


def read_keys(record: Path) -> list[str] | None:
    """The keys in a record; None where it is missing or older than they are."""
    try:
        return json.loads(json.loads(record.read_text(encoding="utf-8"))["keys"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recorded_keys(path: Path, count: int) -> list[str] | None:
    """What scripts/reconstruct_tokenizer.py has noted of the images in a file or folder of its own, in their order.

    None where it has written neither, or not `count` images.
    """
    if path.name not in ("images.npy", "labels.npy", "png"):
        return None
    folder = path.parent
    if folder.name.startswith("length_") and not (folder / RECORD).exists():  # one of several lengths
        folder = folder.parent
    keys = read_keys(folder / RECORD)
    return keys if keys is not None and len(keys) == count else None
