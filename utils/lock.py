"""One process at a time in an output folder."""

import atexit
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from utils.errors import UserError, remedy

if TYPE_CHECKING:
    from utils.processes import Processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class FolderLock:
    """The right to write into a folder, held until `release` or until this process ends in whatever way.

    The kernel keeps it, on the file `.lock`, which says who holds it: a dead process's lock is free, on this machine
    and on others that share the disk. Where there are no such locks (Windows, some network disks) nothing is refused.
    All processes of a command make this object together; the main one holds the lock.

    Raises:
        UserError: Another process works in the folder, or the folder cannot be written.
    """

    def __init__(self, folder: Path, processes: "Processes | None" = None):
        self.path = folder / LOCK
        self._file: TextIO | None = None
        if processes is None:
            self._acquire()
            return
        with processes.careful():
            if processes.is_main:
                self._acquire()
        processes.meet()

    def _acquire(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except OSError as error:
            raise UserError(f"cannot write to {self.path.parent} ({error.strerror}): {remedy(error)}") from error

    def _try(self) -> bool:
        """Lock the file that stands at the path; False where its holder has just deleted it."""
        file = open(self.path, "a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise UserError(self._refusal(file)) from error
            except OSError:  # a disk without locks
                pass
            if not self.path.exists() or os.fstat(file.fileno()).st_ino != self.path.stat().st_ino:
                file.close()
                return False
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": platform.node()}))
        file.flush()
        self._file = file
        atexit.register(self.release)
        return True

    def _refusal(self, file: TextIO) -> str:
        file.seek(0)
        try:
            holder = json.loads(file.read())
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # it is just writing its name
            who = "another process"
        return f"{self.path.parent} is in use by {who}: wait for it, stop it, or give another folder"

    def release(self) -> None:
        """Let others in. Deletes the file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()
