"""Images on their way to the models: loaders, transforms and the scripts that make shards."""

import utils

if not hasattr(utils, "ROOT"):
    raise ImportError(
        f"Python finds {utils.__file__ or list(utils.__path__)} instead of One-D-Piece's package utils: take that "
        "project off PYTHONPATH, or use a virtual environment of its own for each"
    )

from utils.errors import UserError  # noqa: E402


class DataError(UserError):
    """Images, labels or shards that are not what was expected; the text says which and what to do."""
