"""What models, data, codec and scripts share; imports none of them."""

from utils.paths import ROOT

if not (ROOT / "configs/base.yaml").is_file():  # as in a wheel, which has the code alone
    raise ImportError(
        f"One-D-Piece runs from a clone, whose configs/ and assets/ it reads, and {ROOT} has none: clone the "
        "repository and install it from there with `pip install -c constraints.txt -r requirements.txt`"
    )
