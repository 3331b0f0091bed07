"""A folder of results that never mixes those of two runs."""

import json
from pathlib import Path

from utils.errors import UserError

LIST = ".results"  # names of the files of the last run, each as JSON on a line of its own


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
            for line in (self.path / LIST).read_text(encoding="utf-8").splitlines():
                (self.path / Path(json.loads(line)).name).unlink(missing_ok=True)
            (self.path / LIST).unlink()
