"""One run of a command that evaluates: its processes, its progress, what it has seen, its record and its results."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.evaluation.comparison import Originals
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, remarks, table, write_results
from utils.lock import FolderLock
from utils.processes import Processes
from utils.result_folder import FIGURES, ResultPaths, will_be_removed

FIRST_SECONDS = 5.0  # of work, after which it is said how long all of it will take
LONG = 120.0  # seconds that are worth saying so
RESULTS = ("metrics.json", *sorted(FIGURES))  # of most commands


class Session:
    """The place of a run: all of its processes make one together, and leave it together as a context ends.

    Inside, everything is computed in full float32 unless a command asks for less.

    Args:
        device: Name for `pick_device`.
        output_dir: Where the results go; made now, since the work may take hours.
        results: What will be written there. Somebody else's file of such a name is an error before the work. Without
            any the folder is not locked: the work's parts lock it.
        earlier: What may be there of an earlier run and will not be written: removed by `remove_earlier`, said now.
        writes: Nothing is written without.

    Raises:
        UserError: The folder cannot be created, another process works in it, or it holds somebody else's file of such
            a name.
    """

    def __init__(
        self,
        device: str,
        output_dir: str | os.PathLike,
        results: Sequence[str] = RESULTS,
        writes: bool = True,
        earlier: Sequence[str] = (),
    ):
        exact_arithmetic()
        self.processes = Processes(device)
        self.output_dir = Path(output_dir)
        self.results = ResultPaths()
        self.names, self.earlier = results, earlier
        self.lock = FolderLock(self.output_dir, self.processes) if writes and results else None
        with self.processes.careful():
            if writes and self.processes.is_main:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                self.results.claim(*self._paths(results))
                self._say_removed(earlier)
        self.processes.meet()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: Any) -> None:
        self.results.__exit__(*error)
        if self.lock is not None:
            self.lock.release()
        self.processes.close()

    def remove_earlier(self) -> None:
        """On the first process, before the record is written: remove an earlier run's files beside it."""
        self.results.remove(*self._paths(self.earlier))

    def _paths(self, names: Sequence[str]) -> list[Path]:
        return [self.output_dir / name for name in names]

    def _say_removed(self, names: Sequence[str]) -> None:
        if left := self.results.left(*self._paths(names)):
            text = will_be_removed(self.output_dir, [str(path.relative_to(self.output_dir)) for path in left])
            self.say(f"results        {text}")

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def share(self, batch_size: int | None) -> dict[str, Any]:
        """Keyword arguments of what reads images: which of them this process takes, and how many at once."""
        return {"rank": self.processes.rank, "world_size": self.processes.world_size, "batch_size": batch_size}

    @contextmanager
    def progress(self, total: int | None, what: str | None = None) -> Iterator[Callable[[int], None]]:
        """A bar over `total` images of all processes; gives the function that is told of every few this one has done.

        How far the others are is guessed: as far as this one. After the first seconds it says once how long all of
        them will take, where that is long.
        """
        started, num_done, told = time.monotonic(), 0, False
        options = {"desc": what, "unit": "image", "dynamic_ncols": True}
        with tqdm(total=total, disable=not self.processes.is_main, **options) as bar:

            def done(num_images: int) -> None:
                nonlocal num_done, told
                num_done += num_images * self.processes.world_size
                bar.update(num_images * self.processes.world_size)
                seconds = time.monotonic() - started
                if total is not None and not told and seconds >= FIRST_SECONDS:
                    told = True
                    if (whole := seconds * total / num_done) >= LONG:
                        self.say(f"{total:,} images will take about {whole / 60:,.0f} min; --num_images N takes fewer")

            yield done

    def each(self, loader: Any, what: str | None = None) -> Iterator[dict[str, Any]]:
        """The batches of a loader, with a bar over its `expected` images."""
        with self.progress(loader.expected, what) as done:
            for batch in loader:
                yield batch
                done(len(batch["__key__"]))

    def counted(
        self,
        originals: Originals,
        check_count: Callable[[int, int | None, int], None],
        expected: int | None,
        num_skipped: int = 0,
    ) -> dict[str, Any]:
        """The record of the images that all processes have seen; every process calls this together.

        Args:
            check_count: Called with the images seen, expected and skipped; raises where some are missing.
            num_skipped: Broken ones that this process has left out.

        Raises:
            UserError: There was no image.
        """
        num_skipped = self.sum(num_skipped)
        record = originals.record(expected, num_skipped)
        check_count(record["seen"], expected, num_skipped)
        if not record["seen"]:
            raise UserError(f"there was no image to score ({num_skipped} were skipped): check where the images are")
        return record

    def sum(self, number: int) -> int:
        """The sum over all processes, which call this together."""
        return int(self.processes.add_up(torch.tensor(number)))

    def record(self, **facts: Any) -> dict[str, Any]:
        """The protocol of this run, with `facts`."""
        return protocol(self.processes, **facts)

    def say(self, text: str) -> None:
        """Print on the first process."""
        if self.processes.is_main:
            print(text, flush=True)

    def report(
        self,
        summary: str,
        results: Mapping[str, Any],
        shown: Sequence[Row],
        *,
        notes: Sequence[str] = (),
        name: str = "metrics.json",
        figures: Mapping[str, Callable[[Path], None]] | None = None,
        earlier: Sequence[str] = (),
    ) -> None:
        """Print a table and notes, write the results and draw the figures, and say where they are.

        Args:
            summary: What was done, such as "500 images scored".
            results: What the file `name` in the output folder gets.
            shown: Rows of the table.
            figures: {file name: what draws it to a path}.
            earlier: Further names that a run before may have written.
        """
        if not self.processes.is_main:
            return
        warnings = remarks(results)
        for text in (table(shown), *notes, *warnings):
            print(text)
        noted = {"notes": warnings} if warnings else {}
        self.earlier = [other for other in (*self.names, *earlier) if other not in {name, *(figures or {})}]
        self._say_removed(self.earlier)
        self.remove_earlier()
        write_results(self.results.place(self.output_dir / name), {**results, **noted})
        for figure, draw in (figures or {}).items():
            draw(self.results.place(self.output_dir / figure))
        self.results.finish()
        written = [str(self.output_dir / file) for file in (name, *(figures or {}))]
        print(f"{summary}; wrote {' and '.join(written)}")
