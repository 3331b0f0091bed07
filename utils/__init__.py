"""What models, data, codec and scripts share; imports none of them."""

from importlib.util import find_spec
from pathlib import Path

from utils.paths import ROOT

if not (ROOT / "configs/base.yaml").is_file():  # as in a wheel, which has the code alone
    raise ImportError(
        f"One-D-Piece runs from a clone, whose configs/ and assets/ it reads, and {ROOT} has none: clone the "
        "repository and install it from there with `pip install -c constraints.txt -r requirements.txt`"
    )
for _name in ("modeling", "data", "codec"):
    _spec = find_spec(_name)  # does not run the package
    _place = _spec and (_spec.origin or next(iter(_spec.submodule_search_locations or []), None))
    if _place and ROOT not in Path(_place).resolve().parents:
        raise ImportError(
            f"Python finds {_place} instead of One-D-Piece's package {_name}: take that project off PYTHONPATH, or "
            "use a virtual environment of its own for each"
        )
