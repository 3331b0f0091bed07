"""Results for people and programs: a table, metrics.json, quality against bytes."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from utils.errors import UserError
from utils.evaluation.statistics import INFINITE, LEAST_DISTANCE, LEAST_PRECISION, LEAST_SCORE
from utils.figures import plotting, save_figure
from utils.files import write_text

Row = dict[str, Any]  # "name", "system" (a line of the curves), "bytes_per_image", ... and a number per measure

# Title, and +1 where more is better, -1 where less is.
MEASURES = {
    "psnr": ("PSNR, dB", +1),
    "psnr_of_mse": ("PSNR of the mean error, dB", +1),
    "ssim": ("SSIM", +1),
    "ms_ssim": ("MS-SSIM", +1),
    "perceptual_efficientnet_lite0": ("EfficientNet-Lite0 distance", -1),
    "perceptual_convnext_s": ("ConvNeXt-S distance", -1),
    "lpips_alex": ("LPIPS (AlexNet)", -1),
    "lpips_vgg": ("LPIPS (VGG)", -1),
    "fid": ("FID", -1),
    "fd_efficientnet_lite0": ("FD-EfficientNet-Lite0", -1),
    "fd_dinov2": ("FD-DINOv2", -1),
    "inception_score": ("Inception Score", +1),
    "precision": ("Precision", +1),
    "recall": ("Recall", +1),
    "accuracy": ("Top-1 accuracy", +1),
    "agreement": ("Agreement with the original", +1),
    "clip_similarity": ("CLIP similarity", +1),
    "depth_l1": ("Depth, L1", -1),
    "depth_rmse": ("Depth, RMSE", -1),
    "depth_mse": ("Depth, MSE", -1),
    "miou": ("mIoU", +1),
    "miou_to_original": ("mIoU to the original's", +1),
    "map": ("mAP", +1),
    "map_50": ("mAP at IoU 0.5", +1),
    "map_to_original": ("mAP to the original's", +1),
    "map_50_to_original": ("mAP to the original's at IoU 0.5", +1),
}
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (6, 2)), "v"), ((0, (1, 3)), "x"))  # and markers
NOT_DRAWN = ("psnr_of_mse",)  # whose curve is nearly that of `psnr`
COLUMNS = {"bytes_per_image": "bytes", "bits_per_pixel": "bits/pixel"}


def tokens_text(length: int) -> str:
    """How many tokens, in words."""
    return f"{length} token{'s' if length > 1 else ''}"


def is_measure(name: str) -> bool:
    return name in MEASURES or name.startswith("fd_")


def title_of(name: str) -> str:
    """A measure's title with an arrow to its better side."""
    title, direction = MEASURES.get(name, (f"FD-{name.removeprefix('fd_')}", -1))
    return f"{title} {'↑' if direction > 0 else '↓'}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; what a row does not have is left blank."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [name for name in names if name in COLUMNS] + [name for name in names if is_measure(name)]
    header = ["", *(COLUMNS.get(name) or title_of(name) for name in shown)]
    body = [[row["name"], *(_number(row.get(name)) for name in shown)] for row in rows]
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1) if widths[0] > 1 else "-", *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, body)])


def _number(value: Any) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What has to be said beside the numbers: images that came back perfect, measures of few images or too few."""
    rows, record = results["rows"], results["protocol"]
    found = []
    perfect = max((row.get(f"psnr{INFINITE}", 0) for row in rows), default=0)
    if perfect:
        found.append(
            f"note: up to {perfect:,} images came back without an error, whose PSNR is infinite: the mean PSNR is of "
            "the others"
        )
    found += [
        f"note: no {title}: at least {least} images are needed, got {count}"
        for title, least, count in needed_images(record)
        if count < least
    ]
    if (too_few := too_few_images(record)) and too_few >= LEAST_DISTANCE:
        network = record["feature_network"]
        found.append(
            f"note: {network['distance']} of {too_few:,} images: fewer than its {network['dimension']:,} features, "
            "so the covariance is rank deficient and the distance depends on the number of images; compare it only "
            "with distances of as many"
        )
    return found


def too_few_images(record: Mapping[str, Any]) -> int | None:
    """How many images a protocol has, where they are fewer than a Frechet distance needs; else None."""
    network, counts = record.get("feature_network"), seen_images(record).values()
    return min(counts) if network and counts and min(counts) < network["dimension"] else None


def needed_images(record: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The measures of sets that a protocol is about: title, images that it needs, images that there are."""
    network, seen = record.get("feature_network"), seen_images(record)
    if not network or not seen:
        return []
    scored = seen["originals" if "originals" in seen else "samples"]
    needed = [(network["distance"], LEAST_DISTANCE, scored)]
    if network["distance"] == MEASURES["fid"][0]:
        needed.append((MEASURES["inception_score"][0], LEAST_SCORE, scored))
    if "reference" in seen:
        needed.append(("precision and recall", LEAST_PRECISION, min(seen.values())))
    return needed


def seen_images(record: Mapping[str, Any]) -> dict[str, int]:
    """How many images a protocol has of each kind."""
    return {
        part: record[part]["seen"] for part in ("originals", "samples", "reference") if "seen" in record.get(part, {})
    }


def write_results(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write JSON, so that the file appears whole or not at all; infinite numbers become the text "inf"."""
    write_text(Path(path), json.dumps(_strict(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: str | os.PathLike, fingerprint: str) -> list[Row]:
    """The rows of another run's results on the same images, without those that have no scores.

    Raises:
        UserError: The file is missing, is no results file, or was made with other images.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        rows, record = results["rows"], results["protocol"]
        theirs = record.get("originals", record.get("reference"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected results of an evaluation in {path}, which cannot be read so ({error!r})") from error
    if theirs != fingerprint:
        raise UserError(
            f"{path} was made with other images (sha256 {theirs[:12]}, here {fingerprint[:12]}): run it again"
        )
    scored = [row for row in rows if any(map(is_measure, row))]
    return [{name: float(value) if is_measure(name) else value for name, value in row.items()} for row in scored]


def read_beside(paths: Sequence[str | os.PathLike], fingerprint: str) -> list[Row]:
    """The rows of all the results that are to be shown beside those on the images of that `fingerprint`."""
    return [row for path in paths for row in read_results(path, fingerprint)]


def plot_curves(path: str | os.PathLike, rows: Sequence[Row], title: str, over: str = "bytes_per_image") -> None:
    """Draw each measure: a line for each `system` among the rows, a dot where it has one.

    The colour is that of a system's name up to the comma ("JPEG, scaled down"), the line that of the rest. Where a
    system has several rows at a place, such as seeds, the line is their mean, in a band from the least to the most.

    Args:
        over: What the rows have of the horizontal axis; those without are left out.
    """
    pyplot = plotting()
    rows = [row for row in rows if over in row]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    families, variants = (list(dict.fromkeys(parts)) for parts in zip(*map(_parts, systems), strict=True))
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if is_measure(name)]
    names = [name for name in names if name not in NOT_DRAWN]
    names = [name for name in names if all(math.isfinite(float(row.get(name, 0))) for row in rows)]
    if not names:
        return
    num_columns = 2 if len(names) == 4 else min(len(names), 3)
    num_rows = math.ceil(len(names) / num_columns)
    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=(4.6 * num_columns, 3.6 * num_rows), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for system in systems:
            family, variant = _parts(system)
            line, marker = LINES[variants.index(variant) % len(LINES)]
            points = [(row[over], row[name]) for row in rows if row["system"] == system and name in row]
            _draw_line(axis, points, system, f"C{families.index(family)}", linestyle=line, marker=marker, markersize=4)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(over.replace("_", " "))
        axis.set_ylabel(title_of(name))
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    if len(systems) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path, dpi=130)


def _draw_line(axis: Any, points: Sequence[tuple[float, float]], label: str, color: str, **style: Any) -> None:
    """The mean of the points at each place, and a band from the least to the most."""
    places: dict[float, list[float]] = {}
    for place, value in sorted(points):
        places.setdefault(place, []).append(value)
    if places:
        at, values = list(places), list(places.values())
        axis.plot(at, [fmean(some) for some in values], label=label, color=color, **style)
        lowest, highest = [min(some) for some in values], [max(some) for some in values]
        axis.fill_between(at, lowest, highest, color=color, alpha=0.2, linewidth=0)


def _parts(system: str) -> tuple[str, str]:
    family, _, variant = system.partition(", ")
    return family, variant


def plot_grid(path: str | os.PathLike, rows: Sequence[Row], names: Sequence[str], measure: str) -> None:
    """Draw a measure over one setting (a line) or two (a map with the numbers written in).

    Args:
        rows: Each has the settings `names` and `measure`.
    """
    figure, axis = plotting().subplots(figsize=(6, 4.5), layout="constrained")
    axis.set_title(title_of(measure))
    axis.set_xlabel(names[-1])
    if len(names) == 1:
        axis.plot([row[names[0]] for row in rows], [row[measure] for row in rows], marker="o")
        axis.grid(alpha=0.3)
    else:
        ys, xs = (list(dict.fromkeys(row[name] for row in rows)) for name in names)
        values = {(row[names[0]], row[names[1]]): row[measure] for row in rows}
        image = axis.imshow([[values[y, x] for x in xs] for y in ys], cmap="viridis_r", aspect="auto")
        figure.colorbar(image)
        axis.set_xticks(range(len(xs)), list(map(str, xs)))
        axis.set_yticks(range(len(ys)), list(map(str, ys)))
        axis.set_ylabel(names[0])
        for column, x in enumerate(xs):
            for line, y in enumerate(ys):
                box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0}
                axis.text(column, line, f"{values[y, x]:.4g}", ha="center", va="center", bbox=box)
    save_figure(figure, path, dpi=130)
