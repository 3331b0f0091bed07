"""Networks and pure functions. Importing the package registers every model with modeling.checkpoints.registry."""

import utils

if not hasattr(utils, "ROOT"):
    raise ImportError(
        f"Python finds {utils.__file__ or list(utils.__path__)} instead of One-D-Piece's package utils: take that "
        "project off PYTHONPATH, or use a virtual environment of its own for each"
    )

import modeling.maskgit  # noqa: E402
import modeling.one_d_piece  # noqa: E402
import modeling.pixel_vqgan  # noqa: E402
import modeling.titok  # noqa: E402, F401
