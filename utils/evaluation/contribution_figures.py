"""Token contributions for people: the file that holds them, figures, and how far each token spreads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.arrays import ARRAY_ERRORS, why_unread
from utils.errors import UserError
from utils.figures import plotting

DATA = "diffs.npz"
NORMS = {"l1": "Absolute change (L1)", "l2": "Squared change (L2)"}
ARRAYS = [f"{array}_{norm}" for norm in NORMS for array in ("length_to_diff", "mean", "standard_error")]
COLOURS = "magma"
DECADES = 4  # of the colour scale, at most
FEW_MAPS = 64  # so many are drawn large
MOST_TICKS = 32


def read_contributions(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a diffs.npz, and its protocol."""
    file = path / DATA if path.is_dir() else path
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in (*ARRAYS, "count")}, json.loads(str(stored["protocol"]))
    except ARRAY_ERRORS as error:
        raise UserError(
            f"{file} must be the data of scripts/generate_token_contribution_data.py, and cannot be read as such "
            f"({why_unread(error)}): make it first, or name its folder as --input"
        ) from error


def summary(data: Mapping[str, np.ndarray]) -> str:
    """How many images there were, and how much of the change the first tokens carry."""
    num_tokens = len(data["mean_l1"])
    first = max(1, num_tokens // 8)
    shares = [data[f"mean_{norm}"][:first].sum() / data[f"mean_{norm}"].sum() for norm in NORMS]
    return (
        f"{int(data['count']):,} images: the first {first} of {num_tokens} tokens carry {shares[0]:.1%} of the "
        f"absolute and {shares[1]:.1%} of the squared change"
    )


def area_of_half(maps: np.ndarray) -> np.ndarray:
    """The share of the pixels that is enough for half of what a token changes, for each of maps (N, P, P): (N,)."""
    sums = np.sort(maps.reshape(len(maps), -1), axis=1)[:, ::-1].cumsum(axis=1)  # the most changed pixels first
    return ((sums < sums[:, -1:] / 2).sum(axis=1) + 1) / sums.shape[1]


def logarithmic(values: np.ndarray) -> Any:
    """A colour scale over the positive values, not wider than `DECADES`; what is smaller has the lowest colour."""
    from matplotlib.colors import LogNorm

    positive = values[values > 0]
    if not len(positive):
        return None  # nothing changes anywhere: one colour
    highest = float(positive.max())
    lowest = max(float(positive.min()), highest / 10**DECADES)
    return LogNorm(lowest if lowest < highest else highest / 10, highest, clip=True)


def draw_maps(maps: np.ndarray, tokens: np.ndarray, title: str) -> Any:
    """A heat map for each of `tokens`, of maps (N, P, P), under one colour scale."""
    pyplot = plotting()
    few = len(tokens) <= FEW_MAPS
    side = 1.15 if few else 0.8  # inches a map
    num_columns = min(len(tokens), 2 ** math.ceil(math.log2(math.sqrt(len(tokens)))))
    num_rows = math.ceil(len(tokens) / num_columns)
    width = max(num_columns * side + 1.0, 7.2)
    height = max(num_rows * (side + (0.1 if few else 0.05)) + 0.5, 2.8)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(width, height), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05, wspace=0.02, hspace=0.0)
    scale = logarithmic(maps[tokens - 1])
    for axis in axes.flat:
        axis.axis("off")
    for axis, token in zip(axes.flat, tokens, strict=False):
        image = axis.imshow(maps[token - 1], norm=scale, cmap=COLOURS, interpolation="nearest")
        axis.set_title(str(token), fontsize=9 if few else 7, pad=2)
    add_bar(figure, image, ax=axes, fraction=0.03, pad=0.02, aspect=30, label="mean change of a pixel")
    figure.suptitle(title, fontsize=10 if few else 12)
    return figure


def add_bar(figure: Any, image: Any, **options: Any) -> None:
    """A colour bar; over more than a decade only the powers of ten are written out, for the others would overlap."""
    from matplotlib.ticker import NullFormatter

    bar = figure.colorbar(image, **options)
    if image.norm.vmax > 10 * image.norm.vmin:
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def draw_curves(data: Mapping[str, np.ndarray], tokens: np.ndarray, title: str) -> Any:
    """Mean contribution by token, one panel for each norm, with the band of two standard errors."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(1, len(NORMS), figsize=(10, 4), layout="constrained")
    for axis, (norm, name) in zip(axes, NORMS.items(), strict=True):
        mean, error = data[f"mean_{norm}"][tokens - 1], data[f"standard_error_{norm}"][tokens - 1]
        marks = {"marker": "o", "markersize": 3} if len(tokens) <= FEW_MAPS else {}
        axis.plot(tokens, mean, linewidth=1.3, **marks)
        lower = np.maximum(mean - 2 * error, mean.clip(min=1e-12) / 10)
        axis.fill_between(tokens, lower, mean + 2 * error, alpha=0.3, linewidth=0, label="± 2 standard errors")
        if (mean > 0).any():
            axis.set_yscale("log")
        axis.set(xlabel="token", ylabel="mean over pixels, summed over colours", title=name)
        axis.grid(alpha=0.3, which="both")
        axis.set_xlim(tokens[0] - 0.5, tokens[-1] + 0.5)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_rows(data: Mapping[str, np.ndarray], tokens: np.ndarray, title: str) -> Any:
    """Mean contribution by token as one row of colours for each norm."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(len(NORMS), 1, figsize=(10, 3.2), layout="constrained")
    for axis, (norm, name) in zip(axes, NORMS.items(), strict=True):
        values = data[f"mean_{norm}"][tokens - 1][None]
        image = axis.imshow(values, norm=logarithmic(values), cmap=COLOURS, aspect="auto", interpolation="nearest")
        step = math.ceil(len(tokens) / MOST_TICKS)
        places = sorted({0, *range(step - 1, len(tokens), step)})
        axis.set_xticks(places, [str(tokens[place]) for place in places], fontsize=8)
        axis.set_yticks([])
        axis.set_title(name, fontsize=10, loc="left")
        add_bar(figure, image, ax=axis, fraction=0.03, pad=0.015, label="mean change")
    axes[-1].set_xlabel("token")
    figure.suptitle(title, fontsize=11)
    return figure
