"""Where the repository is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "configs/base.yaml").is_file():  # as in a wheel, which has the code alone
    raise ImportError(
        f"One-D-Piece runs from a clone, whose configs/ and assets/ it reads, and {ROOT} has none: clone the repository "
        "and install it from there with `pip install -c constraints.txt -r requirements.txt`"
    )
