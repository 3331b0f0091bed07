"""What the tokens of a set of images tell, for people: the tables and the figure of scripts/analyze_tokens.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.figures import plotting
from utils.token_statistics import CLASS_MEASURES

Row = Mapping[str, Any]


def position_table(rows: Sequence[Row]) -> str:
    """The rows of `position_rows`."""
    lines = [" token   entropy   codes used   entropy given the token before   (shuffled)"]
    for row in rows:
        line = f"{row['token']:6} {row['entropy']:9.2f} {row['codes_used']:12,}"
        if "entropy_given_before" in row:
            line += f" {row['entropy_given_before']:32.2f} {row['entropy_given_shuffled']:12.2f}"
        lines.append(line)
    return "\n".join(lines)


def class_table(rows: Sequence[Row]) -> str:
    """The rows of `class_rows`."""
    lines = [" first tokens   clusters   NMI (shuffled)   purity (shuffled)   same class (shuffled)   linear probe"]
    for row in rows:
        nmi, pure, same = (f"{_text(row[name])} ({_text(row[f'{name}_shuffled'])})" for name in CLASS_MEASURES)
        accuracy = _text(row.get("probe_accuracy"))
        lines.append(f"{row['tokens']:13} {row['clusters']:10,} {nmi:>16} {pure:>19} {same:>23} {accuracy:>14}")
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(positions: Sequence[Row], classes: Sequence[Row], num_images: int) -> Any:
    """Entropies and codes used by position and, where there are labels, what the first tokens tell about the class."""
    num_panels = 3 if classes else 2
    figure, axes = plotting().subplots(1, num_panels, figsize=(4.6 * num_panels, 4.4), layout="constrained")
    _draw_positions(axes[0], axes[1], positions)
    if classes:
        _draw_classes(axes[2], classes)
    for axis in (axes[0], *axes[2:]):
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # within, it would hide a curve
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{num_images:,} images", fontsize=11)
    return figure


MARKS = {"marker": "o", "markersize": 3, "linewidth": 1.3}


def _draw_positions(entropies: Any, codes: Any, rows: Sequence[Row]) -> None:
    numbers = [row["token"] for row in rows]
    entropies.plot(numbers, [row["entropy"] for row in rows], label="of the token", **MARKS)
    for name, label, style in (
        ("entropy_given_before", "given the one before", "-"),
        ("entropy_given_shuffled", "given one of another image", ":"),
    ):
        entropies.plot(numbers[1:], [row[name] for row in rows[1:]], label=label, linestyle=style, **MARKS)
    entropies.set(xlabel="token", ylabel="bits", title="Entropy")
    codes.plot(numbers, [row["codes_used"] for row in rows], **MARKS)
    codes.set(xlabel="token", ylabel="different codes", title="Codes used")
    for axis in (entropies, codes):
        axis.set_ylim(bottom=0)


def _draw_classes(axis: Any, rows: Sequence[Row]) -> None:
    lengths = [row["tokens"] for row in rows]
    curves = {"nmi": "NMI", "same_class": "two of a cluster are of one class", "probe_accuracy": "linear probe"}
    for name, label in curves.items():
        if name not in rows[0]:
            continue
        colour = axis.plot(lengths, _values(rows, name), label=label, **MARKS)[0].get_color()
        chance = "probe_chance" if name == "probe_accuracy" else f"{name}_shuffled"
        axis.plot(lengths, _values(rows, chance), color=colour, linestyle=":", **MARKS)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set(xlabel="first tokens", ylim=(0, 1), title="The class (dotted: by chance)")


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [np.nan if row[name] is None else row[name] for row in rows]
