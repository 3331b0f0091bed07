"""Errors that a user can cause and fix."""

import errno
from collections.abc import Sequence

# What a disk, or the rights on it, refuse, and what to do about it. Not every system has every number.
NO_SPACE, NO_FOLDER = "free space there", "a file is where a folder is needed: name another path"
REMEDIES: dict[str, str | None] = {
    "ENOSPC": NO_SPACE,
    "EDQUOT": NO_SPACE,
    "EFBIG": NO_SPACE,
    "ENAMETOOLONG": "give a shorter name",
    "ENOTDIR": NO_FOLDER,
    "EEXIST": NO_FOLDER,
    "EISDIR": "a folder is where a file is needed: name another path",
    "EMFILE": "raise the limit of open files (ulimit -n)",
    "ENOENT": "no file can be made there: name another path",
    "EROFS": None,
    "EACCES": None,
    "EPERM": None,
    "EIO": None,
}
KNOWN = {getattr(errno, name): text for name, text in REMEDIES.items() if hasattr(errno, name)}


class UserError(ValueError):
    """A mistake that the user can fix; its text says what was expected, what came and what to do."""


def with_reasons(failures: Sequence[tuple[str, str]]) -> str:
    """The first three of some (name, reason), those of one reason together: "a.png, b.png (cut off); c.png (empty)"."""
    names: dict[str, list[str]] = {}
    for name, reason in failures[:3]:
        names.setdefault(reason, []).append(name)
    more = "; ..." if len(failures) > 3 else ""
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items()) + more


def remedy(error: OSError) -> str:
    """What to do where something could not be written."""
    return KNOWN.get(error.errno) or "make it writable, or name another folder"


def reason(error: OSError | UserError) -> str:
    """What a list of failures says of one."""
    return (disk_error(error) if isinstance(error, OSError) else None) or str(error)


def disk_error(error: OSError) -> str | None:
    """One sentence for an error of a disk, or of the rights on it; None for any other, which may be a fault of ours."""
    if type(error) is OSError and error.errno is None:  # NumPy's and Pillow's, which say no more
        return f"a file could not be written ({error}): is the disk full?"
    if error.errno not in KNOWN or error.errno == errno.ENOENT:  # what is missing may be a fault of ours
        return None
    where = error.filename or "a file of the results"
    return f"{where} could not be written or read ({error.strerror}): {remedy(error)}"
