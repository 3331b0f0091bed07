"""Figures on disk, and what they share."""

import os
from typing import Any

from utils.files import replacing

FORMATS = ("png", "pdf")
DPI = 150


def plotting() -> Any:
    """matplotlib's pyplot, drawing to files alone; it is slow to import, so only for who draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as PATH.png and PATH.pdf, each whole or not at all, and close it; makes the folder."""
    for ending in FORMATS:
        with replacing(f"{path}.{ending}") as aside:
            # Without a date equal figures are equal files.
            figure.savefig(aside, dpi=DPI, metadata={"CreationDate": None} if ending == "pdf" else None)
    plotting().close(figure)
