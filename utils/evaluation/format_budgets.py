"""Image formats at given bytes per image: the best file of each image that fits, and the scores of its pixels."""

import csv
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.comparison import Comparison
from utils.evaluation.image_formats import Candidate, Format, best_within, candidates, header_bytes
from utils.evaluation.metrics import psnr_of_mse
from utils.evaluation.report import Row
from utils.processes import Processes

SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


class Variant(NamedTuple):
    """One way to spend a budget on one format."""

    format: Format
    scales_down: bool
    free_header: bool

    @property
    def title(self) -> str:
        return self.format.title + ", scaled down" * self.scales_down + ", header free" * self.free_header


class Entry(NamedTuple):
    """A variant with a budget, in bytes of the file, or of what is not header."""

    variant: Variant
    budget: int

    @property
    def name(self) -> str:
        return f"{self.variant.title}, {self.budget} bytes"


def entries_of(formats: Sequence[Format], budgets: Sequence[int], free_headers: bool) -> list[Entry]:
    """Each format plainly and scaled down, with `free_headers` also the latter without its header, at each budget.

    Of a format that is not scaled down it is plainly, with and without its header.
    """
    variants = []
    for one in formats:
        variants += [Variant(one, scales, False) for scales in sorted({False, one.scales_down})]
        variants += [Variant(one, one.scales_down, True)] * (free_headers and one.header != 0)
    return [Entry(variant, budget) for variant in variants for budget in budgets]


def parse_budgets(text: str) -> list[int]:
    """The bytes of --budgets, sorted, each once."""
    try:
        budgets = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise UserError(f"--budgets takes whole numbers such as 40,80,160, got {text}") from error
    if budgets[0] < 1:
        raise UserError(f"--budgets must be 1 byte or more, got {budgets[0]}")
    return budgets


def parse_levels(text: str) -> list[float]:
    """The decibels of --psnr."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--psnr takes numbers such as 18,20.5,22, got {text}") from error


def default_budgets(num_tokens: int, codebook_size: int) -> list[int]:
    """The bytes of 1, 2, 4, ... tokens of a tokenizer, and 2, 4, 8, 16 times its longest."""
    bits = math.log2(codebook_size)
    lengths = [2**power for power in range(num_tokens.bit_length() + 4)]
    return sorted({math.ceil(length * bits / 8) for length in [*lengths, num_tokens] if length <= 16 * num_tokens})


def best_files(pixels: np.ndarray, entries: Sequence[Entry]) -> dict[Entry, Candidate | None]:
    """For each entry the best file of an image (H, W, 3) within its budget; None where none fits."""
    best = {}
    for one, group in itertools.groupby(entries, lambda entry: entry.variant.format):
        group = list(group)
        scales = SCALES if one.scales_down else SCALES[:1]
        most, free_header = max(entry.budget for entry in group), any(entry.variant.free_header for entry in group)
        found = list(candidates(one, pixels, scales, most, free_header))
        plain = [candidate for candidate in found if candidate.scale == 1]
        for entry in group:
            variant = entry.variant
            best[entry] = best_within(found if variant.scales_down else plain, entry.budget, variant.free_header)
    return best


class FormatScores:
    """Scores of all entries over a set of images, each process its share.

    An entry whose budget does not hold every image has no scores, only the share of those that it holds.
    """

    def __init__(self, entries: Sequence[Entry], comparison: Comparison, processes: Processes):
        self.entries, self.comparison, self.processes = entries, comparison, processes
        self.fitting = dict.fromkeys(entries, 0)  # images for which some file fits
        self.wanted = set(entries)
        self.files: list[tuple[str, Entry, int, float, float, float]] = []  # of an image, one for each entry

    def update(self, pixels: Tensor, files: Sequence[Mapping[Entry, Candidate | None]], keys: Sequence[str]) -> None:
        """Add images (B, 3, H, W) uint8, `best_files` of each, and their names."""
        for key, chosen in zip(keys, files, strict=True):
            self.files += [
                (key, entry, file.num_bytes, file.error, file.encoding_time, file.decoding_time)
                for entry, file in chosen.items()
                if file is not None
            ]
        for entry in self.entries:
            num_fitting = sum(chosen[entry] is not None for chosen in files)
            self.fitting[entry] += num_fitting
            if num_fitting < len(files):
                self.wanted.discard(entry)
        scored = {entry: [chosen[entry] for chosen in files] for entry in self.entries if entry in self.wanted}
        device = self.processes.device
        versions = {entry.name: _as_tensor(chosen).to(device) for entry, chosen in scored.items()}
        sizes = {entry.name: _counted_bytes(chosen, entry.variant) for entry, chosen in scored.items()}
        self.comparison.update(pixels.to(device), versions, keys, sizes)

    def rows(self, image_size: int) -> list[Row]:
        """A row an entry; every process calls this together.

        Args:
            image_size: Pixels a side.
        """
        seen = self.comparison.count()
        counts = self.processes.add_up(torch.tensor(list(self.fitting.values()))).tolist()
        everywhere = set.intersection(*self.processes.gather(self.wanted))
        scores = self.comparison.finish([entry.name for entry in self.entries if entry in everywhere])
        rows = []
        for entry, count in zip(self.entries, counts, strict=True):
            row: Row = {"name": entry.name, "system": entry.variant.title}
            row |= {"budget": entry.budget, "fits": count / seen}
            if entry in everywhere:
                mean_bytes = scores[entry.name].pop("counted_bytes")
                row |= {"bytes_per_image": mean_bytes, "bits_per_pixel": 8 * mean_bytes / image_size**2}
                row |= scores[entry.name]
            rows.append(row)
        return rows


def without_repeats(rows: Sequence[Row]) -> list[Row]:
    """The rows of budgets that hold every image, without those whose files are the same as of a smaller budget."""
    kept: list[Row] = []
    for row in rows:
        scores = {name: value for name, value in row.items() if name not in ("name", "budget")}
        if row["fits"] == 1 and not any(scores.items() <= other.items() for other in kept):
            kept.append(row)
    return kept


def bytes_at_psnr(rows: Sequence[Row], levels: Sequence[float]) -> dict[str, dict[float, str]]:
    """{system: {level: bytes an image}} where the mean PSNR is that level, in dB, interpolated between budgets.

    "<= 180" where the least budget that holds every image reaches more, and "" where none reaches it.
    """
    found = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        curve = [(row["psnr"], row["bytes_per_image"]) for row in rows if row["system"] == system and "psnr" in row]
        curve = sorted(point for point in curve if math.isfinite(point[0]))
        if curve:
            psnr, num_bytes = np.array(curve).T
            found[system] = {level: _bytes_at(psnr, num_bytes, level) for level in levels}
    return found


def _bytes_at(psnr: np.ndarray, num_bytes: np.ndarray, level: float) -> str:
    if level > psnr[-1]:
        return ""
    value = 2 ** np.interp(level, psnr, np.log2(num_bytes))
    return f"<= {num_bytes[0]:.1f}" if level < psnr[0] else f"{value:.1f}"


def lines_at_psnr(found: Mapping[str, Mapping[float, str]]) -> list[str]:
    """What `bytes_at_psnr` gives, as a Markdown table."""
    if not found or not (levels := list(next(iter(found.values())))):
        return []
    head = ["bytes at a mean PSNR of", *(f"{level:g} dB" for level in levels)]
    body = [[system, *row.values()] for system, row in found.items()]
    return ["", *(f"| {' | '.join(cells)} |" for cells in [head, [":--", *["--:"] * len(levels)], *body]), ""]


def by_image(shares: Sequence[Sequence[tuple]]) -> list[tuple[str, str, int, int, float, float, float]]:
    """Image, system, budget, bytes, PSNR in dB and seconds of encoding and decoding of every file of all processes."""
    files = sorted((file for share in shares for file in share), key=lambda file: (file[0], file[1].name))
    return [
        (key, entry.variant.title, entry.budget, num_bytes, psnr_of_mse(error / 255**2), *seconds)
        for key, entry, num_bytes, error, *seconds in files
    ]


def write_images(path: str | os.PathLike, files: Sequence[tuple]) -> None:
    """What `by_image` gives, as a table."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names of any bytes
        table = csv.writer(file)
        table.writerow(("image", "system", "budget", "bytes", "psnr", "encoding_time", "decoding_time"))
        table.writerows(files)


def bench(rows: Sequence[Row], files: Sequence[tuple]) -> dict[str, dict[str, Any]]:
    """{file name: what CompressAI's plots read}, one for each system, of the budgets that hold every image.

    Args:
        files: As `by_image` gives them.
    """
    found: dict[str, dict[str, Any]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system and row["fits"] == 1]
        results = {"bpp": [row["bits_per_pixel"] for row in own]}
        for name in ("psnr", "ssim", "ms_ssim"):
            if own and all(name in row for row in own):
                results[f"{name.replace('_', '-')}-rgb"] = [row[name] for row in own]
        for place, title in ((5, "encoding_time"), (6, "decoding_time")):
            results[title] = [
                float(np.mean([file[place] for file in files if file[1:3] == (system, row["budget"])])) for row in own
            ]
        name = re.sub(r"[^a-z0-9]+", "_", system.lower()).strip("_")
        description = f"{system}, scripts/evaluate_image_formats.py"
        found |= {f"bench_{name}.json": {"name": name, "description": description, "results": results}} if own else {}
    return found


def _counted_bytes(files: Sequence[Candidate], variant: Variant) -> dict[str, Tensor]:
    """Bytes of each file, and those of them that count."""
    return {
        "file_bytes": torch.tensor([file.num_bytes for file in files]),
        "counted_bytes": torch.tensor([file.counted_bytes(variant.free_header) for file in files]),
    }


def _as_tensor(files: Sequence[Candidate]) -> Tensor:
    return torch.from_numpy(np.stack([file.pixels for file in files])).permute(0, 3, 1, 2)


def describe(formats: Sequence[Format], rows: Sequence[Row], image_size: int) -> list[str]:
    """A line for each format: its headers at `image_size` pixels a side, the least budget that holds every image."""
    lines = []
    for one in formats:
        titles = {Variant(one, scales_down, False).title for scales_down in (False, True)}
        whole = [row["budget"] for row in rows if row["fits"] == 1 and row["system"] in titles]
        smallest = f"every image fits into {min(whole)} bytes" if whole else "some images fit none of the budgets"
        grey, colour = (header_bytes(one, is_grey, image_size) for is_grey in (True, False))
        lines.append(f"{one.title}: header {grey} bytes (grey), {colour} (colour); {smallest}")
    return lines


def record_of(formats: Mapping[str, Format], image_size: int) -> dict[str, Any]:
    """What a protocol says of the formats and of their headers of images of `image_size` pixels a side."""
    kinds = {"grey": True, "colour": False}
    return {
        "header_bytes": {
            name: {kind: header_bytes(one, is_grey, image_size) for kind, is_grey in kinds.items()}
            for name, one in formats.items()
        },
        "scales": SCALES,
        "settings": {name: one.settings for name, one in formats.items()},
    }
