"""Errors that a user can cause and fix."""

import errno
from pathlib import Path

# What a disk, or the rights on it, refuse, and what to do about it.
ADVICE = {
    errno.ENOSPC: "free space there, or name another folder",
    errno.EDQUOT: "your share of the disk is used up: free space there, or name another folder",
    errno.EFBIG: "the file would be too large for that disk: name another folder",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "name one that you may read and write",
    errno.EPERM: "name one that you may read and write",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ENOTDIR: "a file stands where a folder is needed: name another path",
    errno.EEXIST: "a file stands where a folder is needed: name another path",
    errno.EISDIR: "a folder stands where a file is needed: name another path",
    errno.EIO: "the disk does not work as it should: name another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class UserError(ValueError):
    """A mistake that the user can fix; its text says what was expected, what came and what to do."""


def disk_error(error: OSError) -> str | None:
    """One sentence for an error of a disk, or of the rights on it; None for any other, which may be a fault of ours."""
    if type(error) is OSError and error.errno is None:  # NumPy's and Pillow's, which say no more
        return f"a file could not be written ({error}): is the disk full?"
    if error.errno not in ADVICE:
        return None
    where = "a file of the results"
    if error.filename is not None:
        path = Path(error.filename)
        where = path.parent if path.name.startswith(".") and ".part" in path.name else path  # a file written aside
    return f"{where} cannot be written or read ({error.strerror}): {ADVICE[error.errno]}"
