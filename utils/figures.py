"""Figures on disk, and what they share."""

import os
from pathlib import Path
from typing import Any

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in FORMATS:
        aside = path.with_name(f".{path.name}.part.{ending}")
        # Without a date equal figures are equal files.
        figure.savefig(aside, dpi=DPI, metadata={"CreationDate": None} if ending == "pdf" else None)
        os.replace(aside, path.with_name(f"{path.name}.{ending}"))
    plotting().close(figure)
