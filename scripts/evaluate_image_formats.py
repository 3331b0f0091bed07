"""Score JPEG, JPEG 2000, WebP and AVIF at given bytes per image, as a tokenizer's images are scored.

  python3 scripts/evaluate_image_formats.py --config configs/fashion/eval.yaml --features efficientnet_lite0 \\
      --beside output/evaluate_reconstruction/metrics.json

Of each image and for each budget the best file (least squared error) that fits is taken: plainly, and after scaling
the image down first, which is the fair way where headers take most of the budget. Bytes are those of whole files,
headers included; the bytes of the headers are stated apart, and --free_headers adds a variant that does not count them.
Grey images are stored as grey; JPEG 2000 as the bare codestream. A budget that does not hold every image has no
scores. On several processes: torchrun --nproc_per_node N scripts/evaluate_image_formats.py ...
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from modeling.networks.judges import Networks
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments, add_beside_argument
from utils.evaluation.image_formats import (
    FORMATS,
    Candidate,
    available,
    best_within,
    candidates,
    header_bytes,
    is_grey,
)
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, plot_curves, read_results, table, write_results
from utils.evaluation.statistics import add_up, gather
from utils.processes import Processes

SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


class Variant(NamedTuple):
    """One way to spend a budget on one format."""

    format_name: str
    scales_down: bool
    free_header: bool

    @property
    def title(self) -> str:
        title = FORMATS[self.format_name].title
        return title + ", scaled down" * self.scales_down + ", header free" * self.free_header


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion/eval.yaml", help="of the images (default: %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument(
        "--budgets",
        help="bytes, such as 40,80,160 (default: those of the config's tokenizer, up to 16 times more)",
    )
    parser.add_argument("--free_headers", action="store_true", help="also spend the budgets on what is not header")
    add_beside_argument(parser)
    add_arguments(parser, output_dir="output/evaluate_image_formats")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    exact_arithmetic()
    config = load_config(arguments.config, arguments.overrides)
    budgets = parse_budgets(arguments.budgets) if arguments.budgets else default_budgets(config)
    formats = {name: available(name) for name in arguments.formats}
    processes = Processes(arguments.device)
    try:
        evaluate(arguments, config, list(formats), budgets, processes)
    finally:
        processes.close()


def parse_budgets(text: str) -> list[int]:
    try:
        budgets = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise UserError(f"--budgets takes whole numbers such as 40,80,160, got {text}") from error
    if budgets[0] < 1:
        raise UserError(f"--budgets must be 1 byte or more, got {budgets[0]}")
    return budgets


def default_budgets(config: DictConfig) -> list[int]:
    """The bytes of 1, 2, 4, ... tokens of the config's tokenizer, and 2, 4, 8, 16 times its longest."""
    vq_model = config.model.vq_model
    bits, longest = math.log2(vq_model.codebook_size), vq_model.num_latent_tokens
    lengths = [2**power for power in range(longest.bit_length() + 4)]
    return sorted({math.ceil(length * bits / 8) for length in [*lengths, longest] if length <= 16 * longest})


def evaluate(
    arguments: argparse.Namespace, config: DictConfig, formats: list[str], budgets: list[int], processes: Processes
) -> None:
    from data.image_shards import check_count, evaluation_loader  # torchvision is slow to import, too slow for --help
    from data.transforms import EvalTransform

    size = config.dataset.preprocessing.crop_size
    networks = Networks(arguments, processes)
    comparison = networks.comparison(size)
    variants = [
        Variant(name, scales_down, free)
        for name in formats
        for scales_down, free in ((False, False), (True, False), (True, True))
        if not free or arguments.free_headers
    ]
    entries = {f"{variant.title}, {budget} bytes": (variant, budget) for variant in variants for budget in budgets}
    fitting = dict.fromkeys(entries, 0)  # images for which some file fits
    wanted = set(entries)
    batches = evaluation_loader(
        config, rank=processes.rank, world_size=processes.world_size, batch_size=arguments.batch_size
    )
    with tqdm(total=batches.expected, unit="image", disable=not processes.is_main, dynamic_ncols=True) as bar:
        for batch in batches:
            chosen: dict[str, list[Candidate | None]] = {name: [] for name in entries}
            images = batch["image"].permute(0, 2, 3, 1).contiguous().numpy()
            grey = [is_grey(pixels) for pixels in images]
            for pixels in images:
                for name, candidate in best_files(pixels, entries).items():
                    chosen[name].append(candidate)
                bar.update(processes.world_size)
            for name, files in chosen.items():
                fitting[name] += sum(file is not None for file in files)
            wanted -= {name for name, files in chosen.items() if None in files}
            versions = {name: as_tensor(chosen[name]).to(processes.device) for name in entries if name in wanted}
            sizes = {name: counted_bytes(chosen[name], entries[name][0], grey) for name in versions}
            comparison.update(batch["image"].to(processes.device), versions, batch["__key__"], sizes)

    seen = comparison.count()
    num_bad = int(add_up(torch.tensor(batches.num_bad), processes))
    check_count(seen, batches.expected, num_bad)
    counts = add_up(torch.tensor(list(fitting.values())), processes).tolist()
    everywhere = set.intersection(*gather(wanted, processes))
    scores = comparison.finish([name for name in entries if name in everywhere])
    rows: list[Row] = []
    for (name, (variant, budget)), count in zip(entries.items(), counts, strict=True):
        row: Row = {"name": name, "system": variant.title, "budget": budget, "fits": count / seen}
        if name in scores:
            mean_bytes = scores[name].pop("counted_bytes")
            row |= {"bytes_per_image": mean_bytes, "bits_per_pixel": 8 * mean_bytes / size**2, **scores[name]}
        rows.append(row)
    record = protocol(
        processes,
        originals=comparison.record(batches.expected, num_bad),
        preparation=EvalTransform(size).description,
        config=arguments.config,
        overrides=arguments.overrides,
        header_bytes={
            name: {"grey": header_bytes(name, True), "colour": header_bytes(name, False)} for name in formats
        },
        scales=SCALES,
        settings={name: FORMATS[name].settings for name in formats},
        **networks.record(),
    )
    if processes.is_main:
        report(arguments, rows, record)


def best_files(pixels: np.ndarray, entries: dict[str, tuple[Variant, int]]) -> dict[str, Candidate | None]:
    """For each entry the best file of an image (H, W, 3) within its budget."""
    grey = is_grey(pixels)
    limits = {
        name: budget + variant.free_header * header_bytes(variant.format_name, grey)
        for name, (variant, budget) in entries.items()
    }
    best = {}
    for format_name, group in itertools.groupby(entries, lambda name: entries[name][0].format_name):
        names = list(group)
        found = list(candidates(FORMATS[format_name], pixels, SCALES, max(limits[name] for name in names)))
        plain = [candidate for candidate in found if candidate.scale == 1]
        for name in names:
            best[name] = best_within(found if entries[name][0].scales_down else plain, limits[name])
    return best


def counted_bytes(files: list[Candidate], variant: Variant, grey: list[bool]) -> dict[str, torch.Tensor]:
    """Bytes of each file, and those of them that count."""
    sizes = torch.tensor([file.num_bytes for file in files])
    headers = torch.tensor([header_bytes(variant.format_name, is_grey) for is_grey in grey])
    return {"file_bytes": sizes, "counted_bytes": (sizes - headers).clamp(min=0) if variant.free_header else sizes}


def as_tensor(files: list[Candidate]) -> torch.Tensor:
    return torch.from_numpy(np.stack([file.pixels for file in files])).permute(0, 3, 1, 2)


def report(arguments: argparse.Namespace, rows: list[Row], record: dict) -> None:
    """Print what fits and the table, write metrics.json and the curves."""
    output_dir = Path(arguments.output_dir)
    shown = [row for path in arguments.beside for row in read_results(path, record["originals"]["sha256"])]
    shown += [row for row in rows if row["fits"] == 1]
    for name, header in record["header_bytes"].items():
        titles = {Variant(name, scales_down, False).title for scales_down in (False, True)}
        whole = [row["budget"] for row in rows if row["fits"] == 1 and row["system"] in titles]
        smallest = f"every image fits into {min(whole)} bytes" if whole else "some images fit none of the budgets"
        print(f"{FORMATS[name].title}: header {header['grey']} bytes (grey), {header['colour']} (colour); {smallest}")
    print(table(shown))
    write_results(output_dir / "metrics.json", {"rows": rows, "protocol": record})
    written = [output_dir / "metrics.json"]
    if shown:
        plot_curves(output_dir / "curves.png", shown, f"{record['originals']['seen']:,} images")
        written.append(output_dir / "curves.png")
    print(f"{record['originals']['seen']:,} images scored; wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    run(main)
