"""A folder of results that never mixes those of two runs."""

import json
from pathlib import Path

from utils.errors import UserError

LIST = ".results"  # names of the files of the last run, each as JSON on a line of its own
SHEETS = {"contact_sheet.png", "grid.png", "lengths.png"}  # images of images
FIGURES = {"curves.png", "sweep.png"}  # beside the metrics.json of an evaluation


class ResultFolder:
    """Where a command writes its files: `folder / name` is the path to write one to.

    The first of them removes the files that the run before this one made here; what others put into the folder stays.

    Raises:
        UserError: The folder cannot be created.
    """

    def __init__(self, path: Path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {path} cannot be created ({error.strerror}): name another folder") from error
        self.path = path
        self._is_cleared = False

    def __truediv__(self, name: str) -> Path:
        if not self._is_cleared:
            self._clear()
        with (self.path / LIST).open("a", encoding="utf-8") as file:
            file.write(json.dumps(name) + "\n")
        return self.path / name

    def _clear(self) -> None:
        self._is_cleared = True
        if (self.path / LIST).exists():
            for name in results_in(self.path):
                (self.path / name).unlink(missing_ok=True)
            (self.path / LIST).unlink()


def results_in(folder: Path) -> set[str]:
    """Names of the files in a folder that a command has listed as its results."""
    if not (folder / LIST).is_file():
        return set()
    lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
    return {Path(json.loads(line)).name for line in lines}


def sheets_in(folder: Path) -> set[str]:
    """Names of the sheets and figures that our commands have put beside the images of a folder."""
    return (results_in(folder) & SHEETS) | (FIGURES if (folder / "metrics.json").is_file() else set())
