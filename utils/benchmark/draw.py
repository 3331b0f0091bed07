"""What was measured, as lines of a table and as a figure."""

from collections.abc import Sequence
from typing import Any

from utils.benchmark.measure import Measurement
from utils.benchmark.peers import Comparison
from utils.figures import plotting

COLUMNS = ("model", "item", "batch", "processes", "ms", "images/s", "GFLOP", "GFLOP/s", "of ceiling", "peak MiB")
COMPARED = ("model", "item", "batch", "ms", "there", "ratio", "GFLOP", "there", "peak MiB", "there")
AXES = {"length": "tokens", "batch_size": "images in a batch", "processes": "processes"}


# ------------------------------------------------------------------------------------------- table


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:14}{cells[1]:21}" + "".join(f"{cell:>11}" for cell in cells[2:])


def row(found: Measurement) -> tuple[str, ...]:
    return (
        found.model,
        found.item,
        str(found.batch_size),
        str(found.processes),
        f"{found.seconds * 1000:.2f}",
        three_digits(found.images_per_second) if found.images_per_second else "-",
        f"{found.flops / 1e9:.2f}",
        f"{found.flops_per_second / 1e9:.1f}",
        f"{found.share_of_ceiling:.0%}" if found.share_of_ceiling is not None else "-",
        f"{found.peak_memory / 2**20:,.0f}",
    )


def compared_row(one: Comparison) -> tuple[str, ...]:
    times = [f"{seconds * 1000:.2f}" for seconds in (one.seconds, one.seconds_there)]
    work = [f"{flops / 1e9:.2f}" for flops in (one.flops, one.flops_there)]
    memory = [f"{memory / 2**20:,.0f}" for memory in (one.peak_memory, one.peak_memory_there)]
    return (one.model, one.item, str(one.batch_size), *times, f"{one.ratio:.2f}", *work, *memory)


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------- figure


def draw(found: Sequence[Measurement], along: str, title: str) -> Any:
    """Speed and memory of what handles images; dashed, how they would grow from the first point on by the work alone.

    That is: every process at the first point's speed of arithmetic (of images, where there is none), and memory in
    proportion to the images.

    Args:
        along: The field of `Measurement` that varies, one of `AXES`.
    """
    figure, axes = plotting().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for label, ones in _curves(found, along).items():
        places = [getattr(one, along) for one in ones]
        _plot(axes[0], label, places, [one.images_per_second for one in ones], [_rate(one) for one in ones])
        _plot(axes[1], label, places, [one.peak_memory / 2**20 for one in ones], [_images(one) for one in ones])
    axes[0].set(ylabel="images/s", title="Speed (dashed: by the arithmetic alone)")
    axes[1].set(ylabel="MiB of tensors", title="Peak memory (dashed: in proportion to the images)")
    for axis in axes:
        axis.set(xlabel=AXES[along])
        axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
        axis.grid(alpha=0.3)
        if along == "length":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize="small")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _curves(found: Sequence[Measurement], along: str) -> dict[str, list[Measurement]]:
    """What handles images, in order of `along`, by a label of the item and what else differs."""
    texts = {"model": "{}", "batch_size": "batch of {}", "processes": "{} processes"}
    differing = [name for name in texts if name != along and len({getattr(one, name) for one in found}) > 1]
    curves: dict[str, list[Measurement]] = {}
    for one in sorted(found, key=lambda one: getattr(one, along) or 0):
        if one.images_per_second and getattr(one, along) is not None:
            item = one.item.removesuffix(f" {one.length}") if along == "length" else one.item
            label = ", ".join([item, *(texts[name].format(getattr(one, name)) for name in differing)])
            curves.setdefault(label, []).append(one)
    return curves


def _plot(axis: Any, label: str, places: list[int], values: list[float], growth: list[float]) -> None:
    """One curve, and dashed its first value grown as `growth` does."""
    (solid,) = axis.plot(places, values, label=label, marker="o", markersize=4)
    ideal = [values[0] * now / growth[0] for now in growth]
    axis.plot(places, ideal, color=solid.get_color(), linestyle="--", linewidth=1)


def _images(one: Measurement) -> int:
    return one.processes * one.batch_size


def _rate(one: Measurement) -> float:
    """Images for each operation of one process, or for each image where there is no arithmetic."""
    return one.processes * _images(one) / (one.flops or _images(one))
