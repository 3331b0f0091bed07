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
