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
        save_figure(figure, f"{path}.{ending}")


def save_figure(figure: Any, path: str | os.PathLike, dpi: int = DPI) -> None:
    """Write a figure as one file, of the kind that its name ends in, and close it."""
    with replacing(path) as aside:
        # Without a date equal figures are equal files.
        figure.savefig(aside, dpi=dpi, metadata={"CreationDate": None} if aside.suffix == ".pdf" else None)
    plotting().close(figure)
