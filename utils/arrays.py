"""Reading .npy and .npz files that may be damaged, or made to do harm."""

import tokenize
import zipfile
import zlib

# What NumPy raises for bytes of unknown origin, which are never unpickled; RuntimeError: a locked or unknown archive.
ARRAY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def why_unread(error: Exception) -> str:
    """What such an error says of a file that the sentence around it names; NumPy's advises to unpickle it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no file of arrays" if "contains pickled (object) data" in str(error) else str(error)
